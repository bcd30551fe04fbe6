"""Logistic regression on frozen features, which are computed once, without augmentation.

Features are standardized by the training images. The strength of l2 is chosen on a held-out part
of the *training* images: all candidates are solved on the other training images at once. The best
one (of equally good ones, the largest) is solved again on all training images, and only this
solution is evaluated on the test images, once. The minimum is unique, so there is neither a
learning rate nor a number of epochs to choose. The protocol of MAE, with augmentation and LARS, is
the evaluator linear_probe.
"""

import dataclasses

import numpy as np
from jax.sharding import Mesh

from lmim_jax.data.eval.eval_data import EvaluationData
from lmim_jax.evaluators import base
from lmim_jax.evaluators.base import EvaluatedMethod, Params, Results
from lmim_jax.evaluators.common import classifiers
from lmim_jax.evaluators.common.image_features import Labeled, split_features
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

    needs_labels = True
    supports_pixel_baselines = True

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1 or not self.l2 or min(self.l2) <= 0:
            raise UserError(
                f"held_out={self.held_out} must be in 0 .. 1, and each of l2={self.l2} above 0"
            )

    def run(self, method: EvaluatedMethod, params: Params, data: EvaluationData) -> Results:
        """{"accuracy", "held_out", "l2"}, see `accuracies`; {} without classes or test images."""
        if not base.has_labels(data):
            return {}
        train = split_features(method, params, data, "train", self.feature, self.batch_size)
        test = split_features(method, params, data, "test", self.feature, self.batch_size)
        results: Results = {}
        results.update(self.accuracies(train, test, len(data.classes), data.mesh))
        return results

    def accuracies(
        self, train: Labeled, test: Labeled, num_classes: int, mesh: Mesh
    ) -> dict[str, float]:
        """The metrics from features and classes of both splits.

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
        )
        return {
            "accuracy": 100 * float(np.mean(found.classes == test.labels)),
            "held_out": 100 * found.held_out,
            "l2": found.l2,
        }
