"""Multinomial logistic regression on frozen features, solved to the minimum: no learning rate, no epochs to choose.

  mean over images of the cross-entropy  +  l2 / 2 x the sum of squared weights (not biases)

In scikit-learn's terms C = 1 / (l2 N). Letters: N images, D width of a feature, K classes, G strengths of l2 at once.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from lmim_jax import sharding

CHUNK = 16384  # images whose G x K logits are in memory at a time
TOLERANCE = 1e-6  # largest entry of the gradient at which the minimum is reached
EXACT = jax.lax.Precision.HIGHEST  # the line search compares values that differ little


@dataclasses.dataclass(frozen=True)
class Fit:
    """G solutions: weights [G, D, K] and biases [G, K], float32; gradient [G], its largest entry at the end."""

    weights: np.ndarray
    biases: np.ndarray
    gradient: np.ndarray

    def predict(self, x):
        """Classes [G, N] int of features [N, D], standardised as those of the fit."""
        return np.stack([(x @ w + b).argmax(axis=1) for w, b in zip(self.weights, self.biases, strict=True)])


def statistics(x):
    """(mean, deviation) [D] of features; a feature that is constant has deviation 1, so that it becomes 0."""
    mean, deviation = x.mean(axis=0, dtype=np.float64), x.std(axis=0, dtype=np.float64)
    return mean.astype(np.float32), np.where(deviation > 1e-6, deviation, 1).astype(np.float32)


def fit(x, labels, num_classes, l2, iterations, mesh=None):
    """Solve for each strength.

    Args:
      x: float32 [N, D], the same on all processes. labels: int [N]. l2: G numbers. iterations: of L-BFGS, at most.
      mesh: divide the images over its devices; None: each process solves the same on one device.

    Returns:
      A Fit.
    """
    parts = mesh.size if mesh else 1
    chunks = -(-len(x) // (CHUNK * parts))
    rows = -(-len(x) // (chunks * parts)) * parts
    split = NamedSharding(mesh, PartitionSpec(None, sharding.AXES)) if mesh else None

    def place(array):
        padding = [(0, chunks * rows - len(x))] + [(0, 0)] * (array.ndim - 1)
        array = np.pad(array, padding).reshape(chunks, rows, *array.shape[1:])
        return jnp.asarray(array) if mesh is None else sharding.place(array, split)

    share = np.full(len(x), 1 / len(x), np.float32)
    placed = (place(array) for array in (np.asarray(x, np.float32), np.asarray(labels, np.int32), share))
    solve = _solver(num_classes, iterations, sharding.replicated(mesh) if mesh else None)
    return Fit(*jax.device_get(solve(*placed, np.asarray(l2, np.float32))))


@functools.lru_cache(maxsize=8)
def _solver(num_classes, iterations, out):
    """Jitted (x [S, R, D], labels [S, R], share [S, R] of each image in the mean, l2 [G]) -> what a Fit holds."""

    def solve(x, labels, share, l2):
        def loss(theta, l2):
            def of_chunk(total, chunk):
                x, labels, share = chunk
                logits = jnp.matmul(x, theta["weights"], precision=EXACT) + theta["biases"][None]
                entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
                return total + jnp.vdot(share, entropy), None

            data, _ = jax.lax.scan(jax.checkpoint(of_chunk), 0.0, (x, labels, share))
            return data + l2 / 2 * jnp.vdot(theta["weights"], theta["weights"])

        def one(l2):
            optimizer = optax.lbfgs()
            value_and_grad = optax.value_and_grad_from_state(lambda theta: loss(theta, l2))

            def step(carry):
                theta, state, _, count = carry
                value, grad = value_and_grad(theta, state=state)
                of = dict(value=value, grad=grad, value_fn=lambda theta: loss(theta, l2))
                updates, state = optimizer.update(grad, state, theta, **of)
                theta = optax.apply_updates(theta, updates)
                return theta, state, _largest(optax.tree.get(state, "grad")), count + 1

            theta = {"weights": jnp.zeros((x.shape[-1], num_classes)), "biases": jnp.zeros(num_classes)}
            unfinished = lambda carry: (carry[2] > TOLERANCE) & (carry[3] < iterations)
            theta, _, gradient, _ = jax.lax.while_loop(unfinished, step, (theta, optimizer.init(theta), jnp.inf, 0))
            return theta["weights"], theta["biases"], gradient

        return jax.vmap(one)(l2)

    return jax.jit(solve, out_shardings=out)


def _largest(tree):
    """The largest absolute entry of a tree."""
    return jnp.stack([jnp.abs(leaf).max() for leaf in jax.tree.leaves(tree)]).max()
