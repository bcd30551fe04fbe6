"""Logistic regression on frozen features, which are computed once, without augmentation.

Features are standardized by the training images. The strength of l2 is chosen on a held-out part
of the *training* images: all candidates are solved on the other training images at once. The best
one (of equally good ones, the largest) is solved again on all training images, and only this
solution is evaluated on the test images, once. The minimum is unique, so there is neither a
learning rate nor a number of epochs to choose. The protocol of MAE, with augmentation and LARS, is
the evaluator linear_probe.

Metrics:
  accuracy   percent of the test images
  held_out   percent of the held-out training images
  l2         the chosen strength
  majority   percent of the most frequent class of the test images
On request, also the accuracy of features that need no encoder: pixels_accuracy, histogram_accuracy.
"""

import dataclasses
import functools

import numpy as np
from jax.sharding import Mesh

from lmim_jax.data.eval.eval_data import EvaluationData
from lmim_jax.evaluators import base
from lmim_jax.evaluators.base import EvaluatedMethod, Params, Results
from lmim_jax.evaluators.common import classifiers
from lmim_jax.evaluators.common.image_features import ENCODER_FREE, Labeled, labeled_features
from lmim_jax.utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class Evaluator(base.Evaluator):
    """Logistic regression on one feature; the fields are explained in configs/evaluate.py."""

    feature: str
    batch_size: int
    l2: tuple[float, ...]
    held_out: float
    iterations: int
    seed: int
    baselines: bool

    needs_labels = True
    supports_pixel_baselines = True
    cost = 4.0

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1 or not self.l2 or min(self.l2) <= 0:
            raise UserError(
                f"held_out={self.held_out} must be in 0 .. 1, and each of l2={self.l2} above 0"
            )

    def run(self, method: EvaluatedMethod, params: Params, data: EvaluationData) -> Results:
        """{"accuracy", "held_out", "l2", "majority", ...}; {} if labels have no meaning."""
        if not base.is_possible(self, data):
            return {}
        results: Results = {}
        results.update(self.evaluate_feature(method, params, data, self.feature))
        if self.baselines:
            for feature in ENCODER_FREE:
                metrics = _baseline(self, method, data, feature)
                results[f"{feature}_accuracy"] = metrics["accuracy"]
        return results

    def evaluate_feature(
        self, method: EvaluatedMethod, params: Params, data: EvaluationData, feature: str
    ) -> dict[str, float]:
        """The metrics of any image feature."""
        train = labeled_features(method, params, data, "train", feature, self.batch_size)
        test = labeled_features(method, params, data, "test", feature, self.batch_size)
        metrics = self.accuracies(train, test, len(data.classes), data.mesh, overwrite=True)
        return {**metrics, "majority": classifiers.majority(test.labels)}

    def accuracies(
        self, train: Labeled, test: Labeled, num_classes: int, mesh: Mesh, overwrite: bool = False
    ) -> dict[str, float]:
        """The metrics from features and classes of both splits.

        Args:
          train: of the training images.
          test: of the test images.
          num_classes: number of classes.
          mesh: devices that the training images are divided over.
          overwrite: the training features may be overwritten, so that no copy of them is made.

        Returns:
          {"accuracy": percent of the test images, "held_out": percent of the held-out training
          images, "l2": the chosen strength}.
        """
        found = classifiers.predict_by_regression(
            train.features,
            train.labels,
            test.features,
            num_classes=num_classes,
            l2=self.l2,
            iterations=self.iterations,
            mesh=mesh,
            held_out=self.held_out,
            seed=self.seed,
            overwrite=overwrite,
        )
        return {
            "accuracy": 100 * float(np.mean(found.classes == test.labels)),
            "held_out": 100 * found.held_out,
            "l2": found.l2,
        }


@functools.lru_cache(maxsize=8)
def _baseline(
    evaluator: Evaluator, method: EvaluatedMethod, data: EvaluationData, feature: str
) -> dict[str, float]:
    """The metrics of a feature without an encoder, which never change: computed once."""
    return evaluator.evaluate_feature(method, {}, data, feature)
