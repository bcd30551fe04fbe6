"""Number of objects and distance (tasks of CLEVR): logistic regression on a frozen image feature.

Two accuracies in percent of the test images, `count` and `distance`, and for comparison those of
always predicting the most frequent class, `count_chance` and `distance_chance`. The classes are
defined in lmim_jax/data/eval/clevr.py.
"""

import dataclasses

import numpy as np
from jax.sharding import Mesh

from lmim_jax.data.eval import clevr
from lmim_jax.data.eval.eval_data import EvaluationData
from lmim_jax.evaluators import base
from lmim_jax.evaluators.base import EvaluatedMethod, Params, Results
from lmim_jax.evaluators.common import classifiers
from lmim_jax.evaluators.common.image_features import Labeled, split_features


@dataclasses.dataclass(frozen=True)
class Evaluator(base.Evaluator):
    """Two classifiers on one feature; the fields are explained in configs/evaluate.py."""

    name: str
    dir: str
    train_split: str
    test_split: str
    feature: str
    l2: tuple[float, ...]
    iterations: int
    batch_size: int

    supports_pixel_baselines = True
    cost = 6.0

    def run(self, method: EvaluatedMethod, params: Params, data: EvaluationData) -> Results:
        """{"count", "count_chance", "distance", "distance_chance"} in percent."""
        data = clevr.open_data(
            data,
            name=self.name,
            folder=self.dir,
            train_split=self.train_split,
            test_split=self.test_split,
        )
        train = split_features(method, params, data, "train", self.feature, self.batch_size)
        test = split_features(method, params, data, "test", self.feature, self.batch_size)
        train_labels = clevr.split_label(train.labels)
        test_labels = clevr.split_label(test.labels)
        results: Results = {}
        for task in ("count", "distance"):
            accuracy, chance = self._accuracy(
                Labeled(train.features, train_labels[task]),
                Labeled(test.features, test_labels[task]),
                data.mesh,
            )
            results[task] = accuracy
            results[f"{task}_chance"] = chance
        return results

    def _accuracy(self, train: Labeled, test: Labeled, mesh: Mesh) -> tuple[float, float]:
        """Accuracies of the classifier and of the most frequent class, in percent."""
        classes, labels = np.unique(train.labels, return_inverse=True)
        predicted = classifiers.predict_by_regression(
            train.features,
            labels,
            test.features,
            num_classes=len(classes),
            l2=self.l2,
            iterations=self.iterations,
            mesh=mesh,
        )
        most_frequent = classes[np.bincount(labels).argmax()]
        accuracy = 100 * float(np.mean(classes[predicted.classes] == test.labels))
        chance = 100 * float(np.mean(most_frequent == test.labels))
        return accuracy, chance
