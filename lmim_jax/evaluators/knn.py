"""Nearest neighbours by cosine similarity of frozen features.

Figures, in percent of the test images:
  nn1        the class of the nearest training image
  knn<k>     k nearest training images vote with weight exp(cosine / temperature) (Wu et al. 2018; DINO)
  loo1       the nearest *other test image* (the official Latent MIM figure; much harsher than the others)
and all but the last on what needs no encoder, where asked for: pixels_nn1, pixels_knn<k>, histogram_nn1, ...
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from lmim_jax import sharding
from lmim_jax.evaluators.base import FIXED, labelled, split_features

CHUNK = 512  # queries at a time: CHUNK x bank similarities in memory, over all devices


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """k-NN on one feature; the fields are explained in configs/vit_b.py."""

    feature: str
    k: tuple[int, ...]
    temperature: float
    batch_size: int
    baselines: bool

    labelled = takes_pixels = True

    def run(self, method, params, data):
        """{"nn1", "knn<k>", "loo1", ...} in percent; {} where there are no labels or no test images."""
        if not labelled(data):
            return {}
        result = self._accuracies(method, params, data, self.feature)
        for name in FIXED if self.baselines else ():
            found = _baseline(self, method, data, name)
            result |= {f"{name}_{figure}": value for figure, value in found.items() if figure != "loo1"}
        return result

    def _accuracies(self, method, params, data, feature):
        train, test = (
            split_features(method, params, data, split, feature, self.batch_size) for split in ("train", "test")
        )
        return accuracies(train, test, self.k, self.temperature, len(data.classes), data.mesh)


@functools.lru_cache(maxsize=8)
def _baseline(evaluator, method, data, name):
    """The figures of a fixed feature: they never change, so they are computed once."""
    return evaluator._accuracies(method, {}, data, name)


def accuracies(train, test, ks, temperature, num_classes, mesh):
    """The figures from (features [N, D], labels [N]) of both splits. Each of `ks` is cut to the size of the bank."""
    bank, queries = _unit(train[0]), _unit(test[0])
    ks = sorted({min(k, len(bank)) for k in ks})
    scores, index = _nearest(queries, bank, ks[-1], mesh)
    nearest, weights = train[1][index], np.exp(scores / temperature)
    _, others = _nearest(queries, queries, min(2, len(queries)), mesh)
    own = np.arange(len(queries))
    other = np.where(others[:, 0] == own, others[:, -1], others[:, 0])  # a duplicate may come before the image itself
    percent = lambda predicted: 100 * float(np.mean(predicted == test[1]))
    voted = {f"knn{k}": percent(_vote(nearest[:, :k], weights[:, :k], num_classes)) for k in ks}
    return {"nn1": percent(nearest[:, 0]), **voted, "loo1": percent(test[1][other])}


def _vote(labels, weights, num_classes):
    """The class with most weight [Q] among neighbours' classes [Q, k]."""
    votes = np.zeros((len(labels), num_classes))
    np.add.at(votes, (np.arange(len(labels))[:, None], labels), weights)
    return votes.argmax(axis=1)


def _unit(x):
    """Rows scaled to length 1, float32."""
    return (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)).astype(np.float32)


@functools.lru_cache(maxsize=4)
def _programs(mesh):
    """Jitted (queries [Q, D], split over the devices, bank [N, D]) -> cosines [Q, N]; and their top k, on all."""
    similar = lambda queries, bank: jnp.matmul(queries, bank.T, precision=jax.lax.Precision.HIGHEST)
    top = jax.jit(jax.lax.top_k, static_argnums=1, out_shardings=sharding.replicated(mesh))
    return jax.jit(similar, out_shardings=sharding.of_batch(mesh)), top


def _nearest(queries, bank, k, mesh):
    """(cosines, indices) [Q, k] of the nearest bank rows, best first."""
    similarities, top = _programs(mesh)
    bank, results = sharding.place(bank, sharding.replicated(mesh)), []
    rows = -(-CHUNK // mesh.size) * mesh.size
    for start in range(0, len(queries), rows):
        chunk = queries[start : start + rows]
        padded = np.pad(chunk, ((0, rows - len(chunk)), (0, 0)))  # one shape, one compilation
        found = top(similarities(sharding.place(padded, sharding.of_batch(mesh)), bank), k)
        results.append([np.asarray(jax.device_get(x))[: len(chunk)] for x in found])
    return tuple(np.concatenate(column) for column in zip(*results, strict=True))
