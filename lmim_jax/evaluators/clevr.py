"""How many objects there are and how far: logistic regression on a frozen feature of the whole image (CLEVR's tasks).

Two accuracies in percent of the test images, `count` and `distance`, and beside each that of always saying the most
frequent class, `count_chance` and `distance_chance`. What is counted and what is far: lmim_jax/data/eval/clevr.py.
"""

import dataclasses

import numpy as np

from lmim_jax.evaluators.base import split_features
from lmim_jax.evaluators.common import classifiers


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Two probes on one feature; the fields are explained in configs/evaluate.py."""

    name: str
    dir: str
    train_split: str
    test_split: str
    feature: str
    l2: tuple[float, ...]
    iterations: int
    batch_size: int

    takes_pixels = True

    def run(self, method, params, data):
        """{"count", "count_chance", "distance", "distance_chance"} in percent."""
        data, bins = data.attributed(self.name, self.dir, (self.train_split, self.test_split))
        (x, x_labels), (y, y_labels) = (
            split_features(method, params, data, split, self.feature, self.batch_size)
            for split in ("train", "test")
        )
        result = {}
        for task, of in (("count", np.floor_divide), ("distance", np.mod)):
            classes, labels = np.unique(of(x_labels, bins), return_inverse=True)
            truth = of(y_labels, bins)
            found = classifiers.linear(
                x, labels, y, len(classes), self.l2, self.iterations, data.mesh
            )
            result[task] = 100 * float(np.mean(classes[found.classes] == truth))
            result[f"{task}_chance"] = 100 * float(
                np.mean(classes[np.bincount(labels).argmax()] == truth)
            )
        return result
