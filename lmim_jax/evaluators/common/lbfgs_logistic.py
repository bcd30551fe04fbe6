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

from lmim_jax.distributed import sharding

CHUNK = 16384  # images whose G x K logits are in memory at a time
SMALL = (16, 64, 256, 1024, 4096)  # to which fewer images are padded: few shapes to compile for
TOLERANCE = (
    1e-6  # largest entry of the gradient, in the units of `fit`, at which the minimum is reached
)
MEMORY = 10  # steps that L-BFGS remembers
EXACT = jax.lax.Precision.HIGHEST  # the line search compares values that differ little


@dataclasses.dataclass(frozen=True)
class Fit:
    """G solutions: weights [G, D, K] and biases [G, K], float32; gradient [G], its largest entry at the end,
    in units in which the curvature is about 1."""

    weights: np.ndarray
    biases: np.ndarray
    gradient: np.ndarray

    def predict(self, x):
        """Classes [G, N] int of features [N, D], standardised as those of the fit."""
        return np.stack(
            [(x @ w + b).argmax(axis=1) for w, b in zip(self.weights, self.biases, strict=True)]
        )


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
    x, basis, variances = principal(np.asarray(x, np.float32))
    # Where the curvature of the cross-entropy is about 1 / K of the variance, these units make it 1 in all directions
    units = np.sqrt(variances[None] / num_classes + np.asarray(l2, np.float32)[:, None])
    parts = mesh.size if mesh else 1
    chunks = -(-len(x) // (CHUNK * parts))
    rows = -(-len(x) // (chunks * parts)) * parts
    rows = next((size for size in SMALL if size >= rows and size % parts == 0), rows)
    split = NamedSharding(mesh, PartitionSpec(None, sharding.AXES)) if mesh else None

    def place(array):
        padding = [(0, chunks * rows - len(x))] + [(0, 0)] * (array.ndim - 1)
        array = np.pad(array, padding).reshape(chunks, rows, *array.shape[1:])
        return jnp.asarray(array) if mesh is None else sharding.place_array(array, split)

    share = np.full(len(x), 1 / len(x), np.float32)
    placed = (place(array) for array in (x, np.asarray(labels, np.int32), share))
    solve = _solver(num_classes, iterations, sharding.replicated(mesh) if mesh else None)
    weights, biases, gradient = jax.device_get(solve(*placed, np.asarray(l2, np.float32), units))
    return Fit(weights if basis is None else basis @ weights, biases, gradient)


def principal(x):
    """Features [N, D] along their principal axes: (coordinates [N, R], axes [D, R] or None, mean squares [R]), float32.

    A rotation changes neither the minimum nor l2, and where there are fewer images than dimensions, weights lie in the
    span of the images; but along these axes it is known how curved the loss is, so that far fewer turns are needed. R
    is a size out of SMALL, or D. Left as they are where neither side is small enough to be decomposed in seconds.
    """
    rank = next((size for size in SMALL if size >= len(x)), len(x))
    if min(rank, x.shape[1]) > SMALL[-1]:
        return x, None, np.zeros(x.shape[1], np.float32)
    span = np.linalg.qr(x.T)[0] if rank < x.shape[1] else np.eye(x.shape[1], dtype=np.float32)
    inside = x @ span if rank < x.shape[1] else x
    squares, axes = np.linalg.eigh((inside.T @ inside / len(x)).astype(np.float64))
    axes, squares = axes.astype(np.float32), np.maximum(squares, 0).astype(np.float32)
    missing = max(0, min(rank, x.shape[1]) - len(squares))
    coordinates = np.pad(inside @ axes, ((0, 0), (0, missing)))
    return coordinates, np.pad(span @ axes, ((0, 0), (0, missing))), np.pad(squares, (0, missing))


@functools.lru_cache(maxsize=8)
def _solver(num_classes, iterations, out):
    """Jitted (x [S, R, D], labels and share in the mean [S, R], l2 [G], units [G, D]) -> what a Fit holds."""

    def solve(x, labels, share, l2, units):
        def split(theta, units):
            weights = theta[:-num_classes].reshape(-1, num_classes) / units[:, None]
            return weights, theta[-num_classes:] * num_classes**0.5

        def loss(theta, l2, units):
            weights, biases = split(theta, units)

            def of_chunk(total, chunk):
                x, labels, share = chunk
                logits = jnp.matmul(x, weights, precision=EXACT) + biases[None]
                entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
                return total + jnp.vdot(share, entropy), None

            data, _ = jax.lax.scan(jax.checkpoint(of_chunk), 0.0, (x, labels, share))
            return data + l2 / 2 * jnp.vdot(weights, weights)

        def one(l2, units):
            size = (x.shape[-1] + 1) * num_classes
            theta, gradient = lbfgs(
                jax.value_and_grad(lambda theta: loss(theta, l2, units)), size, iterations
            )
            return *split(theta, units), gradient

        return jax.vmap(one)(l2, units)

    return jax.jit(solve, out_shardings=out)


def lbfgs(value_and_grad, size, iterations):
    """Minimise a smooth convex function from 0 by L-BFGS: (argument [size], largest entry of its gradient).

    Every turn is one evaluation, accepted where it goes down enough (Armijo), else tried again at half the length: the
    function is compiled once. (optax.lbfgs holds several copies of it, and takes 2.5 times as long to compile.)
    """
    dot = lambda a, b: jnp.vdot(a, b, precision=EXACT)

    def direction(grad, steps, changes):
        """-H grad, from the last changes of the argument and of the gradient, newest first [M, size]; 0: unused."""
        curvature = jax.vmap(dot)(steps, changes)
        rho = jnp.where(curvature > 0, 1 / jnp.where(curvature > 0, curvature, 1), 0)

        def first(q, pair):
            step, change, rho = pair
            alpha = rho * dot(step, q)
            return q - alpha * change, alpha

        def second(q, pair):
            step, change, rho, alpha = pair
            return q + (alpha - rho * dot(change, q)) * step, None

        q, alpha = jax.lax.scan(first, grad, (steps, changes, rho))
        scale = jnp.where(
            rho[0] > 0, curvature[0] / jnp.maximum(dot(changes[0], changes[0]), 1e-30), 1
        )
        q, _ = jax.lax.scan(second, scale * q, (steps, changes, rho, alpha), reverse=True)
        return -q

    def turn(now):
        trial = now["theta"] + now["length"] * now["direction"]
        value, grad = value_and_grad(trial)
        enough = now["value"] + 1e-4 * now["length"] * dot(now["grad"], now["direction"])
        accepted = value <= enough + 1e-7 * jnp.abs(
            now["value"]
        )  # float32 knows no smaller difference
        step, change = trial - now["theta"], grad - now["grad"]
        push = lambda memory, row: jnp.concatenate([row[None], memory[:-1]])
        curved = dot(step, change) > 1e-12 * dot(change, change)
        remember = lambda memory, row: jnp.where(curved, push(memory, row), memory)
        steps, changes = remember(now["steps"], step), remember(now["changes"], change)
        after = dict(theta=trial, value=value, grad=grad, length=1.0, steps=steps, changes=changes)
        after["direction"] = direction(grad, steps, changes)
        shorter = {**now, "length": now["length"] / 2}
        after["turns"] = shorter["turns"] = now["turns"] + 1
        return jax.tree.map(lambda a, b: jnp.where(accepted, a, b), after, shorter)

    value, grad = value_and_grad(jnp.zeros(size))
    memory = jnp.zeros((MEMORY, size))
    start = dict(
        theta=jnp.zeros(size), value=value, grad=grad, direction=-grad, steps=memory, changes=memory
    )
    start |= dict(length=jnp.float32(1), turns=0)
    unfinished = lambda now: (jnp.abs(now["grad"]).max() > TOLERANCE) & (now["turns"] < iterations)
    end = jax.lax.while_loop(unfinished, turn, start)
    return end["theta"], jnp.abs(end["grad"]).max()
