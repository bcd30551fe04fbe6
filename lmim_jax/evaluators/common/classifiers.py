"""Classifiers on frozen features: nearest neighbors that vote, and logistic regression.

Letters: N training vectors, Q queries, D width, k neighbors, G strengths of l2.

Features are the same numpy arrays on all processes; the work is divided over the devices of a mesh.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from lmim_jax.distributed import sharding
from lmim_jax.evaluators.common import lbfgs_logistic

log = logging.getLogger(__name__)

CHUNK = 512  # queries at a time: CHUNK x N similarities in memory, over all devices


def l2_normalize_rows(x: Float[np.ndarray, "*B D"]) -> Float[np.ndarray, "*B D"]:
    """Scale the last axis to length 1 (a length is at least 1e-12), float32."""
    length = np.linalg.norm(x, axis=-1, keepdims=True)
    return (x / np.maximum(length, 1e-12)).astype(np.float32)


@functools.lru_cache(maxsize=4)
def _jit_cosines(mesh: Mesh) -> Callable[[Array, Array], Array]:
    """Jitted (queries [Q, D], bank [N, D]) -> cosines [Q, N], divided over the devices."""

    def cosines(queries: Array, bank: Array) -> Array:
        return jnp.matmul(queries, bank.T, precision=jax.lax.Precision.HIGHEST)

    return jax.jit(cosines, out_shardings=sharding.batch_sharding(mesh))


@functools.lru_cache(maxsize=4)
def _jit_top_k(mesh: Mesh) -> Callable[[Array, int], tuple[Array, Array]]:
    """Jitted (cosines [Q, N], k) -> the largest ones and their indices, both [Q, k], replicated."""
    return jax.jit(jax.lax.top_k, static_argnums=1, out_shardings=sharding.replicated(mesh))


def nearest_neighbors(
    queries: Float[np.ndarray, "Q D"], bank: Float[np.ndarray, "N D"], k: int, mesh: Mesh
) -> tuple[Float[np.ndarray, "Q k"], Int[np.ndarray, "Q k"]]:
    """The rows of the bank that are most similar to each query, the most similar first.

    Args:
      queries: rows of length 1, see `l2_normalize_rows`.
      bank: rows of length 1.
      k: number of neighbors, at most N.
      mesh: devices that the queries are divided over.

    Returns:
      Cosine similarities and indices in the bank.
    """
    cosines = _jit_cosines(mesh)
    top_k = _jit_top_k(mesh)
    bank_on_devices = sharding.place_array(bank, sharding.replicated(mesh))
    rows = -(-CHUNK // mesh.size) * mesh.size
    scores = []
    indices = []
    for start in range(0, len(queries), rows):
        chunk = queries[start : start + rows]
        padded = np.pad(chunk, ((0, rows - len(chunk)), (0, 0)))  # one shape, one compilation
        placed = sharding.place_array(padded, sharding.batch_sharding(mesh))
        found = jax.device_get(top_k(cosines(placed, bank_on_devices), k))
        scores.append(np.asarray(found[0])[: len(chunk)])
        indices.append(np.asarray(found[1])[: len(chunk)])
    return np.concatenate(scores), np.concatenate(indices)


def weighted_vote(
    labels: Int[np.ndarray, "Q k"], weights: Float[np.ndarray, "Q k"], num_classes: int
) -> Int[np.ndarray, " Q"]:
    """The class with the largest total weight among the neighbors of each query."""
    votes = np.zeros((len(labels), num_classes))
    rows = np.arange(len(labels))[:, None]
    np.add.at(votes, (rows, labels), weights)
    return votes.argmax(axis=1)


def majority(labels: Int[np.ndarray, " Q"]) -> float:
    """Percent of the most frequent class: the accuracy of always answering it."""
    return 100 * float(np.bincount(labels).max()) / len(labels)


def predict_by_neighbors(
    train: Float[np.ndarray, "N D"],
    labels: Int[np.ndarray, " N"],
    queries: Float[np.ndarray, "Q D"],
    *,
    k: int,
    num_classes: int,
    mesh: Mesh,
) -> Int[np.ndarray, " Q"]:
    """The most frequent class among the k nearest training vectors (by cosine) of each query.

    If classes are equally frequent, that of the nearest vector is preferred. k is limited to N.
    """
    k = min(k, len(train))
    _, index = nearest_neighbors(l2_normalize_rows(queries), l2_normalize_rows(train), k, mesh)
    weights = np.ones(k)
    weights[0] = 1.5  # half a vote more decides between equally frequent classes
    return weighted_vote(labels[index], np.broadcast_to(weights, index.shape), num_classes)


@dataclasses.dataclass(frozen=True)
class RegressionPredictions:
    """What `predict_by_regression` returns.

    Attributes:
      classes: predicted class of each query.
      held_out: share of the held-out training vectors that are classified correctly, 0 .. 1.
      l2: the strength with the largest such share.
    """

    classes: Int[np.ndarray, " Q"]
    held_out: float
    l2: float


def predict_by_regression(
    train: Float[np.ndarray, "N D"],
    labels: Int[np.ndarray, " N"],
    queries: Float[np.ndarray, "Q D"],
    *,
    num_classes: int,
    l2: Sequence[float],
    iterations: int,
    mesh: Mesh,
    held_out: float = 0.1,
    seed: int = 0,
) -> RegressionPredictions:
    """Logistic regression on standardized features.

    The strength of l2 is chosen on held-out training vectors, with a solution on the other training
    vectors for each candidate; of equally good candidates, the largest one is chosen. Then the
    problem is solved with this strength on all training vectors. Only this solution is applied to
    the queries.

    Args:
      train: training vectors, float32.
      labels: their classes.
      queries: vectors to classify.
      num_classes: number of classes.
      l2: strengths to choose from, see lbfgs_logistic.py.
      iterations: the largest number of iterations of L-BFGS.
      mesh: devices that the training vectors are divided over.
      held_out: share of the training vectors that are held out.
      seed: seed of their choice.
    """
    order = np.random.default_rng(seed).permutation(len(train))
    count = max(1, round(held_out * len(train)))
    held = np.sort(order[:count])
    rest = np.sort(order[count:])
    strengths = sorted(l2, reverse=True)
    predicted, _ = _solve_and_predict(
        train[rest], labels[rest], train[held], num_classes, strengths, iterations, mesh
    )
    accuracies = (predicted == labels[held]).mean(axis=1)
    best = int(accuracies.argmax())
    if len(strengths) > 1 and best in (0, len(strengths) - 1):
        log.info(
            "the best l2 is the last of the candidates, %g: also try others beyond it",
            strengths[best],
        )
    predicted, gradient = _solve_and_predict(
        train, labels, queries, num_classes, [strengths[best]], iterations, mesh
    )
    if gradient[0] > 1e-3:
        log.warning(
            "after %d iterations the gradient is %.1e: the minimum is not reached yet",
            iterations,
            gradient[0],
        )
    return RegressionPredictions(predicted[0], float(accuracies[best]), strengths[best])


def _solve_and_predict(
    train: Float[np.ndarray, "N D"],
    labels: Int[np.ndarray, " N"],
    queries: Float[np.ndarray, "Q D"],
    num_classes: int,
    l2: Sequence[float],
    iterations: int,
    mesh: Mesh,
) -> tuple[Int[np.ndarray, "G Q"], Float[np.ndarray, " G"]]:
    """Predicted classes, and the largest entry of the final gradient, for each strength of l2."""
    mean, deviation = lbfgs_logistic.mean_and_deviation(train)
    standardized = (train - mean) / deviation
    fit = lbfgs_logistic.fit(standardized, labels, num_classes, l2, iterations, mesh)
    return fit.predict((queries - mean) / deviation), fit.gradient
