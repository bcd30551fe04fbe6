"""Nearest neighbours by cosine similarity of frozen features.

Three figures, in percent of the test images:
  nn1        the class of the nearest training image
  knn<k>     k nearest training images vote with weight exp(cosine / temperature) (Wu et al. 2018; DINO)
  loo1       the nearest *other test image* (the official Latent MIM figure; much harsher than the other two)
and the first two on what needs no encoder, where asked for: pixels_nn1, pixels_knn<k>, histogram_nn1, ...
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from lmim_jax.evaluators.base import FIXED, split_features

CHUNK = 512  # queries at a time: CHUNK x bank similarities in memory


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """k-NN on one feature; the fields are explained in configs/vit_b.py."""

    feature: str
    k: int
    temperature: float
    batch_size: int
    baselines: bool

    def run(self, method, params, data):
        """{"nn1", "knn<k>", "loo1", ...} in percent; {} where there are no labels or no test images."""
        if not data.classes or data.sources["test"] is None:
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
        return accuracies(train, test, self.k, self.temperature, len(data.classes))


@functools.lru_cache(maxsize=8)
def _baseline(evaluator, method, data, name):
    """The figures of a fixed feature: they never change, so they are computed once."""
    return evaluator._accuracies(method, {}, data, name)


def accuracies(train, test, k, temperature, num_classes):
    """The three figures from (features [N, D], labels [N]) of both splits. k is cut to the size of the bank."""
    bank, queries = _unit(train[0]), _unit(test[0])
    k = min(k, len(bank))
    scores, index = _nearest(queries, bank, k)
    nearest = train[1][index]
    votes = np.zeros((len(queries), num_classes))
    np.add.at(votes, (np.arange(len(queries))[:, None], nearest), np.exp(scores / temperature))
    _, others = _nearest(queries, queries, min(2, len(queries)))
    own = np.arange(len(queries))
    other = np.where(others[:, 0] == own, others[:, -1], others[:, 0])  # a duplicate may come before the image itself
    percent = lambda predicted: 100 * float(np.mean(predicted == test[1]))
    return {"nn1": percent(nearest[:, 0]), f"knn{k}": percent(votes.argmax(1)), "loo1": percent(test[1][other])}


def _unit(x):
    """Rows scaled to length 1, float32."""
    return (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)).astype(np.float32)


@jax.jit
def _similarities(queries, bank):
    return jnp.matmul(queries, bank.T, precision=jax.lax.Precision.HIGHEST)


_top = jax.jit(jax.lax.top_k, static_argnums=1)


def _nearest(queries, bank, k):
    """(cosines, indices) [Q, k] of the nearest bank rows, best first."""
    bank, results = jax.device_put(bank), []
    for start in range(0, len(queries), CHUNK):
        chunk = queries[start : start + CHUNK]
        padded = np.pad(chunk, ((0, CHUNK - len(chunk)), (0, 0)))  # one shape, one compilation
        top = _top(_similarities(jax.device_put(padded), bank), k)
        results.append([np.asarray(jax.device_get(x))[: len(chunk)] for x in top])
    return tuple(np.concatenate(column) for column in zip(*results, strict=True))
