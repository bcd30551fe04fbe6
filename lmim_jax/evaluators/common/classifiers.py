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
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, Shaped

from lmim_jax.distributed import sharding
from lmim_jax.evaluators.common import lbfgs_logistic
from lmim_jax.utils import array_memory

log = logging.getLogger(__name__)

QUERIES = 512  # compared at a time
BANK_ROWS = 32_768  # training vectors that are on the devices at a time
VOTERS = 4096  # queries whose votes are counted at a time: VOTERS x classes numbers in memory

Best = tuple[Array, Array]  # the largest cosines so far and their indices in the bank, [QUERIES, k]


def l2_normalize_rows(x: Float[np.ndarray, "*B D"]) -> Float[np.ndarray, "*B D"]:
    """Scale the last axis to length 1 (a length is at least 1e-12), float32."""
    length = np.linalg.norm(x, axis=-1, keepdims=True)
    return (x / np.maximum(length, 1e-12)).astype(np.float32, copy=False)


def _padded(x: Float[np.ndarray, "n D"], rows: int) -> Float[np.ndarray, "rows D"]:
    """Rows of length 1 in the direction of those of `x`, and rows of zeros."""
    unit = l2_normalize_rows(x)
    if len(x) == rows:
        return unit
    return np.pad(unit, ((0, rows - len(x)), (0, 0)))


@functools.lru_cache(maxsize=4)
def _jit_search(mesh: Mesh) -> Callable[[Best, Array, Array, int, int], Best]:
    """Jitted (best, queries, block of the bank, its start, N) -> best with this block.

    The rows of the block are divided over the devices; all else is replicated. Of equal cosines,
    that with the lower index comes first, as without blocks.
    """

    def search(best: Best, queries: Array, block: Array, start: Array, total: Array) -> Best:
        rows = len(block)
        places = start + jax.lax.axis_index(sharding.AXES) * rows + jnp.arange(rows)
        cosines = jnp.matmul(queries, block.T, precision=jax.lax.Precision.HIGHEST)
        cosines = jnp.where(places[None] < total, cosines, -jnp.inf)
        k = best[0].shape[1]
        scores, chosen = jax.lax.top_k(cosines, min(k, rows))
        scores = jax.lax.all_gather(scores, sharding.AXES, axis=1, tiled=True)
        indices = jax.lax.all_gather(places[chosen], sharding.AXES, axis=1, tiled=True)
        scores = jnp.concatenate([best[0], scores], axis=1)
        indices = jnp.concatenate([best[1], indices], axis=1)
        largest, chosen = jax.lax.top_k(scores, k)
        return largest, jnp.take_along_axis(indices, chosen, axis=1)

    replicated = PartitionSpec()
    divided = jax.shard_map(
        search,
        mesh=mesh,
        in_specs=(replicated, replicated, sharding.BATCH, replicated, replicated),
        out_specs=replicated,
        check_vma=False,  # equal on all devices after the gathering
    )
    return jax.jit(divided)


def nearest_neighbors(
    queries: Float[np.ndarray, "Q D"], bank: Float[np.ndarray, "N D"], k: int, mesh: Mesh
) -> tuple[Float[np.ndarray, "Q k"], Int[np.ndarray, "Q k"]]:
    """The rows of the bank that are most similar to each query, the most similar first.

    The bank is compared in blocks of BANK_ROWS that are divided over the devices, so that neither
    the host nor a device needs memory for a copy of it.

    Args:
      queries: vectors of any length.
      bank: vectors of any length.
      k: number of neighbors, at most N.
      mesh: devices that the bank is divided over.

    Returns:
      Cosine similarities and indices in the bank.
    """
    search = _jit_search(mesh)
    replicated = sharding.replicated(mesh)
    parts = []
    best = []
    for start in range(0, len(queries), QUERIES):
        part = _padded(queries[start : start + QUERIES], QUERIES)  # one shape, one compilation
        parts.append(sharding.place_array(part, replicated))
        none = np.full((QUERIES, k), -np.inf, np.float32), np.zeros((QUERIES, k), np.int32)
        best.append(tuple(sharding.place_array(array, replicated) for array in none))
    rows = -(-min(len(bank), BANK_ROWS) // mesh.size) * mesh.size
    for start in range(0, len(bank), rows):
        block = _padded(bank[start : start + rows], rows)
        placed = sharding.place_array(block, sharding.batch_sharding(mesh))
        for i, part in enumerate(parts):
            best[i] = search(best[i], part, placed, start, len(bank))
        jax.block_until_ready(best)  # one block on the devices at a time
    found = jax.device_get(best)
    scores = np.concatenate([part[0] for part in found])
    indices = np.concatenate([part[1] for part in found])
    return scores[: len(queries)], indices[: len(queries)]


class PlacedBank:
    """A bank of vectors that stays on the devices, for queries that come in batches.

    Args:
      bank: the vectors.
      metric: "cosine", or "l2", the Euclidean distance.
      mesh: devices that the bank is divided over.
    """

    def __init__(self, bank: Float[np.ndarray, "N D"], metric: str, mesh: Mesh) -> None:
        self._metric = metric
        self._mesh = mesh
        self._count = len(bank)
        self._rows = -(-min(len(bank), BANK_ROWS) // mesh.size) * mesh.size
        self._blocks: list[Array] = []
        for start in range(0, len(bank), self._rows):
            block = bank[start : start + self._rows]
            if metric == "l2":  # the nearest has the largest q.b - b.b / 2
                squares = np.square(block, dtype=np.float32).sum(axis=1, keepdims=True)
                block = np.concatenate([block, -squares / 2], axis=1)
            padded = self._padded(block, self._rows)
            self._blocks.append(sharding.place_array(padded, sharding.batch_sharding(mesh)))

    def nearest(self, queries: Float[np.ndarray, "Q D"], k: int) -> Int[np.ndarray, "Q k"]:
        """The indices of the k nearest vectors of each query, the nearest first; k is at most N."""
        if self._metric == "l2":
            ones = np.ones((len(queries), 1), np.float32)
            queries = np.concatenate([queries, ones], axis=1)
        search = _jit_search(self._mesh)
        replicated = sharding.replicated(self._mesh)
        none = np.full((QUERIES, k), -np.inf, np.float32), np.zeros((QUERIES, k), np.int32)
        found = []
        for start in range(0, len(queries), QUERIES):
            part = self._padded(queries[start : start + QUERIES], QUERIES)
            placed = sharding.place_array(part, replicated)
            best: Best = tuple(sharding.place_array(array, replicated) for array in none)
            for number, block in enumerate(self._blocks):
                best = search(best, placed, block, number * self._rows, self._count)
            found.append(best[1])
        return np.concatenate(jax.device_get(found))[: len(queries)]

    def _padded(self, x: Float[np.ndarray, "n D"], rows: int) -> Float[np.ndarray, "rows D"]:
        if self._metric == "cosine":
            return _padded(x, rows)
        return np.pad(x, ((0, rows - len(x)), (0, 0)))


def weighted_vote(
    labels: Int[np.ndarray, "Q k"], weights: Float[np.ndarray, "Q k"], num_classes: int
) -> Int[np.ndarray, " Q"]:
    """The class with the largest total weight among the neighbors of each query."""
    voted = []
    for start in range(0, len(labels), VOTERS):
        chosen = labels[start : start + VOTERS]
        votes = np.zeros((len(chosen), num_classes))
        rows = np.arange(len(chosen))[:, None]
        np.add.at(votes, (rows, chosen), weights[start : start + VOTERS])
        voted.append(votes.argmax(axis=1))
    return np.concatenate(voted)


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
    _, index = nearest_neighbors(queries, train, k, mesh)
    weights = np.ones(k)
    weights[0] = 1.5  # half a vote more decides between equally frequent classes
    return weighted_vote(labels[index], np.broadcast_to(weights, index.shape), num_classes)


@dataclasses.dataclass(frozen=True)
class LinearModel:
    """A linear function of features that are standardized first.

    Attributes:
      fit: the solution, of one strength of l2.
      mean: of the training features.
      deviation: of them.
      held_out: how good solutions without the held-out training vectors are for these: share of
        correct classes, 0 .. 1; for other losses, minus the mean loss.
      l2: the strength with the largest such value.
    """

    fit: lbfgs_logistic.Fit
    mean: Float[np.ndarray, " D"]
    deviation: Float[np.ndarray, " D"]
    held_out: float
    l2: float

    def outputs(self, queries: Float[np.ndarray, "Q D"]) -> Float[np.ndarray, "Q K"]:
        """The linear function of queries: logits, or numbers."""
        parts = []
        for start in range(0, len(queries), lbfgs_logistic.CHUNK):
            rows = (queries[start : start + lbfgs_logistic.CHUNK] - self.mean) / self.deviation
            parts.append(rows @ self.fit.weights[0] + self.fit.biases[0])
        return np.concatenate(parts)


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
    overwrite: bool = False,
) -> RegressionPredictions:
    """Logistic regression on standardized features.

    The strength of l2 is chosen on held-out training vectors, with a solution on the other training
    vectors for each candidate; of equally good candidates, the largest one is chosen. Then the
    problem is solved with this strength on all training vectors. Only this solution is applied to
    the queries. Features are standardized by all training vectors, which needs no labels.

    Args:
      train: training vectors, float32; standardized and rotated in place with `overwrite`.
      labels: their classes.
      queries: vectors to classify.
      num_classes: number of classes.
      l2: strengths to choose from, see lbfgs_logistic.py.
      iterations: the largest number of iterations of L-BFGS.
      mesh: devices that the training vectors are divided over.
      held_out: share of the training vectors that are held out.
      seed: seed of their choice.
      overwrite: `train` is not needed afterwards, so that no copy of it is made.
    """
    model = fit_regression(
        train,
        labels,
        num_classes=num_classes,
        l2=l2,
        iterations=iterations,
        mesh=mesh,
        held_out=held_out,
        seed=seed,
        overwrite=overwrite,
    )
    classes = model.fit.predict(queries, model.mean, model.deviation)[0]
    return RegressionPredictions(classes, model.held_out, model.l2)


def fit_regression(
    train: Float[np.ndarray, "N D"],
    labels: Shaped[np.ndarray, "N ..."],
    *,
    num_classes: int,
    l2: Sequence[float],
    iterations: int,
    mesh: Mesh,
    held_out: float = 0.1,
    seed: int = 0,
    overwrite: bool = False,
    loss: str = lbfgs_logistic.SOFTMAX,
) -> LinearModel:
    """The model of `predict_by_regression`; with another loss, labels are [N, num_classes]."""
    order = np.random.default_rng(seed).permutation(len(train))
    count = max(1, round(held_out * len(train)))
    held = np.sort(order[:count])
    is_rest = np.ones(len(train), bool)
    is_rest[held] = False
    strengths = sorted(l2, reverse=True)
    if not overwrite:
        train = array_memory.copy(train)
    mean, deviation = lbfgs_logistic.mean_and_deviation(train)
    lbfgs_logistic.standardize(train, mean, deviation)
    problem = lbfgs_logistic.prepare(train, labels, num_classes, mesh, loss)
    candidates = problem.solve(strengths, iterations, is_rest)
    if loss == lbfgs_logistic.SOFTMAX:
        predicted = candidates.classify(problem.coordinates, held)
        accuracies = (predicted == labels[held]).mean(axis=1)
    else:
        accuracies = -candidates.losses(problem.coordinates, held, labels, loss)
    best = int(accuracies.argmax())
    if len(strengths) > 1 and best in (0, len(strengths) - 1):
        log.info(
            "the best l2 is the last of the candidates, %g: also try others beyond it",
            strengths[best],
        )
    final = problem.solve([strengths[best]], iterations)
    if final.gradient[0] > 1e-3:
        log.warning(
            "after %d iterations the gradient is %.1e: the minimum is not reached yet",
            iterations,
            final.gradient[0],
        )
    return LinearModel(final, mean, deviation, float(accuracies[best]), strengths[best])
