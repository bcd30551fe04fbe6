"""A linear classifier on frozen features, in seconds: logistic regression on features computed once, unaugmented.

Features are standardised by the training images. The strength of l2 is chosen on a held-out part of the *training*
images, each candidate being solved on the rest, all of them at once; the best one (of equals the strongest) is then
solved on all training images, and only that solution sees the test images, once. The minimum is unique: there is no
learning rate and no number of epochs to choose. MAE's protocol, with augmentation and LARS, is another evaluator.
"""

import dataclasses

import numpy as np

from lmim_jax.evaluators.base import labelled, split_features
from lmim_jax.evaluators.common import classifiers
from lmim_jax.utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Logistic regression on one feature; the fields are explained in configs/evaluate.py."""

    feature: str
    batch_size: int
    l2: tuple[float, ...]
    held_out: float
    iterations: int
    seed: int

    labelled = takes_pixels = True

    def __post_init__(self):
        if not 0 < self.held_out < 1 or not self.l2 or min(self.l2) <= 0:
            raise UserError(
                f"held_out={self.held_out} must be in 0 .. 1, and each of l2={self.l2} above 0"
            )

    def run(self, method, params, data):
        """{"accuracy": percent of the test images, "held_out": percent of the held-out images, "l2": the chosen one}.

        {} where there are no labels or no test images.
        """
        if not labelled(data):
            return {}
        train, test = (
            split_features(method, params, data, split, self.feature, self.batch_size)
            for split in ("train", "test")
        )
        return self.accuracies(train, test, len(data.classes), data.mesh)

    def accuracies(self, train, test, num_classes, mesh):
        """The figures from (features [N, D], labels [N]) of both splits."""
        found = classifiers.linear(
            *train, test[0], num_classes, self.l2, self.iterations, mesh, self.held_out, self.seed
        )
        accuracy = 100 * float(np.mean(found.classes == test[1]))
        return {"accuracy": accuracy, "held_out": 100 * found.held_out, "l2": found.l2}
