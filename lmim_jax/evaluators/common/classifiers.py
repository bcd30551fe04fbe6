"""What can be read from frozen features with labels: neighbours that vote, and logistic regression.

Letters: N training vectors, Q queries, D width. Features are the same numpy arrays on all processes; the work is
divided over the devices of a mesh.
"""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np

from lmim_jax.distributed import sharding
from lmim_jax.evaluators.common import lbfgs_logistic

log = logging.getLogger(__name__)

CHUNK = 512  # queries at a time: CHUNK x N similarities in memory, over all devices


def unit(x):
    """Rows scaled to length 1, float32."""
    return (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)).astype(np.float32)


@functools.lru_cache(maxsize=4)
def _programs(mesh):
    """Jitted (queries [Q, D], split over the devices, bank [N, D]) -> cosines [Q, N]; and their top k, on all."""
    similar = lambda queries, bank: jnp.matmul(queries, bank.T, precision=jax.lax.Precision.HIGHEST)
    top = jax.jit(jax.lax.top_k, static_argnums=1, out_shardings=sharding.replicated(mesh))
    return jax.jit(similar, out_shardings=sharding.batch_sharding(mesh)), top


def nearest(queries, bank, k, mesh):
    """(cosines, indices) [Q, k] of the nearest bank rows, best first; rows of both have length 1, see `unit`."""
    similarities, top = _programs(mesh)
    bank, results = sharding.place_array(bank, sharding.replicated(mesh)), []
    rows = -(-CHUNK // mesh.size) * mesh.size
    for start in range(0, len(queries), rows):
        chunk = queries[start : start + rows]
        padded = np.pad(chunk, ((0, rows - len(chunk)), (0, 0)))  # one shape, one compilation
        found = top(similarities(sharding.place_array(padded, sharding.batch_sharding(mesh)), bank), k)
        results.append([np.asarray(jax.device_get(x))[: len(chunk)] for x in found])
    return tuple(np.concatenate(column) for column in zip(*results, strict=True))


def vote(labels, weights, num_classes):
    """The class with most weight [Q] among neighbours' classes [Q, k]; weights [Q, k]."""
    votes = np.zeros((len(labels), num_classes))
    np.add.at(votes, (np.arange(len(labels))[:, None], labels), weights)
    return votes.argmax(axis=1)


def neighbours(train, labels, queries, k, num_classes, mesh):
    """Classes [Q] that most of the k nearest training vectors (by cosine) have; of equals, the nearest one's.

    train [N, D], labels int [N], queries [Q, D]; k is cut to N.
    """
    _, index = nearest(unit(queries), unit(train), min(k, len(train)), mesh)
    weights = np.where(
        np.arange(index.shape[1]) == 0, 1.5, 1.0
    )  # half a vote more decides between equals
    return vote(labels[index], np.broadcast_to(weights, index.shape), num_classes)


@dataclasses.dataclass(frozen=True)
class Linear:
    """What `linear` predicts: classes int [Q], the share of held-out vectors told right, and the l2 that was best."""

    classes: np.ndarray
    held_out: float
    l2: float


def linear(train, labels, queries, num_classes, l2, iterations, mesh, held_out=0.1, seed=0):
    """Logistic regression on standardised features, of which only the final solution sees the queries.

    Args:
      train: float32 [N, D]. labels: int [N]. queries: [Q, D].
      l2: strengths to choose from, see logistic.py. The best one (of equals, the largest) on held-out training vectors,
        each being solved on the rest, is solved on all of them.
      iterations: of L-BFGS, at most. held_out: share of the training vectors. seed: draws them.

    Returns:
      A Linear.
    """
    order, strengths = np.random.default_rng(seed).permutation(len(train)), sorted(l2, reverse=True)
    count = max(1, round(held_out * len(train)))
    held, rest = np.sort(order[:count]), np.sort(order[count:])
    predicted, _ = _solve(
        train[rest], labels[rest], train[held], num_classes, strengths, iterations, mesh
    )
    accuracies = (predicted == labels[held]).mean(axis=1)
    best = int(accuracies.argmax())
    if best in (0, len(strengths) - 1) and len(strengths) > 1:
        log.info(
            "the best l2 is the last of the candidates, %g: try others beyond it", strengths[best]
        )
    (classes,), (gradient,) = _solve(
        train, labels, queries, num_classes, strengths[best : best + 1], iterations, mesh
    )
    if gradient > 1e-3:
        log.warning(
            "after %d iterations the gradient is %.1e: not at the minimum yet", iterations, gradient
        )
    return Linear(classes, float(accuracies[best]), strengths[best])


def _solve(train, labels, queries, num_classes, l2, iterations, mesh):
    """(classes [G, Q] by what is solved on the training vectors, largest gradients left [G]), for each of l2."""
    mean, deviation = lbfgs_logistic.statistics(train)
    fit = lbfgs_logistic.fit((train - mean) / deviation, labels, num_classes, l2, iterations, mesh)
    return fit.predict((queries - mean) / deviation), fit.gradient
