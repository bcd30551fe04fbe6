"""A linear classifier on frozen features, in seconds: logistic regression on features computed once, unaugmented.

Features are standardised by the training images. The strength of l2 is chosen on a held-out part of the *training*
images, each candidate being solved on the rest, all of them at once; the best one (of equals the strongest) is then
solved on all training images, and only that solution sees the test images, once. The minimum is unique: there is no
learning rate and no number of epochs to choose. MAE's protocol, with augmentation and LARS, is another evaluator.
"""

import dataclasses
import logging

import numpy as np

from lmim_jax import logistic
from lmim_jax.errors import UserError
from lmim_jax.evaluators.base import labelled, split_features

log = logging.getLogger(__name__)


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
            raise UserError(f"held_out={self.held_out} must be in 0 .. 1, and each of l2={self.l2} above 0")

    def run(self, method, params, data):
        """{"accuracy": percent of the test images, "held_out": percent of the held-out images, "l2": the chosen one}.

        {} where there are no labels or no test images.
        """
        if not labelled(data):
            return {}
        train, test = (
            split_features(method, params, data, split, self.feature, self.batch_size) for split in ("train", "test")
        )
        return self.accuracies(train, test, len(data.classes), data.mesh)

    def accuracies(self, train, test, num_classes, mesh):
        """The figures from (features [N, D], labels [N]) of both splits."""
        (x, y), order = train, np.random.default_rng(self.seed).permutation(len(train[1]))
        count = max(1, round(self.held_out * len(y)))
        held, rest = np.sort(order[:count]), np.sort(order[count:])
        candidates = sorted(self.l2, reverse=True)
        accuracy, _ = self._solve((x[rest], y[rest]), (x[held], y[held]), num_classes, candidates, mesh)
        best = int(np.argmax(accuracy))
        if best in (0, len(candidates) - 1) and len(candidates) > 1:
            log.info("the best l2 is the last of the candidates, %g: try others beyond it", candidates[best])
        (final,), (gradient,) = self._solve(train, test, num_classes, candidates[best : best + 1], mesh)
        if gradient > 1e-3:
            log.warning("after %d iterations the gradient is %.1e: not at the minimum yet", self.iterations, gradient)
        return {"accuracy": final, "held_out": accuracy[best], "l2": candidates[best]}

    def _solve(self, train, test, num_classes, l2, mesh):
        """(accuracies in percent on `test` of what is solved on `train`, largest gradients left), for each of l2."""
        mean, deviation = logistic.statistics(train[0])
        scaled = [(x - mean) / deviation for x, _ in (train, test)]
        fit = logistic.fit(scaled[0], train[1], num_classes, l2, self.iterations, mesh)
        accuracies = [100 * float(np.mean(predicted == test[1])) for predicted in fit.predict(scaled[1])]
        return accuracies, fit.gradient
