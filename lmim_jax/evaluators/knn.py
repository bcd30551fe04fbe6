"""Nearest neighbours by cosine similarity of frozen features.

Figures, in percent of the test images:
  nn1        the class of the nearest training image
  knn<k>     k nearest training images vote with weight exp(cosine / temperature) (Wu et al. 2018; DINO)
  loo1       the nearest *other test image* (the official Latent MIM figure; much harsher than the others)
and all but the last on what needs no encoder, where asked for: pixels_nn1, pixels_knn<k>, histogram_nn1, ...
"""

import dataclasses
import functools

import numpy as np

from lmim_jax.evaluators.base import labelled, split_features
from lmim_jax.evaluators.common import classifiers, image_features


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
        for name in image_features.FIXED if self.baselines else ():
            found = _baseline(self, method, data, name)
            result |= {
                f"{name}_{figure}": value for figure, value in found.items() if figure != "loo1"
            }
        return result

    def _accuracies(self, method, params, data, feature):
        train, test = (
            split_features(method, params, data, split, feature, self.batch_size)
            for split in ("train", "test")
        )
        return accuracies(train, test, self.k, self.temperature, len(data.classes), data.mesh)


@functools.lru_cache(maxsize=8)
def _baseline(evaluator, method, data, name):
    """The figures of a fixed feature: they never change, so they are computed once."""
    return evaluator._accuracies(method, {}, data, name)


def accuracies(train, test, ks, temperature, num_classes, mesh):
    """The figures from (features [N, D], labels [N]) of both splits. Each of `ks` is cut to the size of the bank."""
    bank, queries = classifiers.unit(train[0]), classifiers.unit(test[0])
    ks = sorted({min(k, len(bank)) for k in ks})
    scores, index = classifiers.nearest(queries, bank, ks[-1], mesh)
    nearest, weights = train[1][index], np.exp(scores / temperature)
    _, others = classifiers.nearest(queries, queries, min(2, len(queries)), mesh)
    own = np.arange(len(queries))
    other = np.where(
        others[:, 0] == own, others[:, -1], others[:, 0]
    )  # a duplicate may come before the image itself
    percent = lambda predicted: 100 * float(np.mean(predicted == test[1]))
    voted = {
        f"knn{k}": percent(classifiers.vote(nearest[:, :k], weights[:, :k], num_classes))
        for k in ks
    }
    return {"nn1": percent(nearest[:, 0]), **voted, "loo1": percent(test[1][other])}
