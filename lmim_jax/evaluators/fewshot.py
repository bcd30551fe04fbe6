"""A linear classifier from few labels: logistic regression on the frozen features of a few images of each class.

Features are standardised by all training images, which takes no labels. Which images are labelled is drawn several
times, the same ones for every encoder. Nothing is chosen by test images: the strength of l2 follows from a rule.
Shares of the labels are drawn class by class (at least one image each); the lists in use for 1 % and 10 % of ImageNet
are not taken.
"""

import dataclasses
import logging
import statistics

import numpy as np

from lmim_jax.evaluators.base import labelled, split_features
from lmim_jax.evaluators.common import lbfgs_logistic
from lmim_jax.utils.errors import UserError

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Logistic regression with few labels; the fields are explained in configs/evaluate.py."""

    feature: str
    batch_size: int
    shots: tuple[int, ...]
    percent: tuple[int, ...]
    draws: int
    prior: float
    iterations: int
    seed: int

    labelled = takes_pixels = True

    def __post_init__(self):
        if self.draws < 1 or self.prior <= 0 or min((*self.shots, *self.percent, 1)) <= 0:
            raise UserError(
                f"draws={self.draws}, prior={self.prior}, shots={self.shots}, percent={self.percent}: must be above 0"
            )

    def run(self, method, params, data):
        """{"shots<n>", "shots<n>_std", "labels<p>pct", "labels<p>pct_std"}, percent of the test images over the draws.

        {} where there are no labels or no test images; a class with too few images for n of them leaves shots<n> out.
        """
        if not labelled(data):
            return {}
        train, test = (
            split_features(method, params, data, split, self.feature, self.batch_size)
            for split in ("train", "test")
        )
        return self.accuracies(train, test, len(data.classes))

    def accuracies(self, train, test, num_classes):
        """The figures from (features [N, D], labels [N]) of both splits."""
        mean, deviation = lbfgs_logistic.statistics(train[0])
        x, test_x = ((x - mean) / deviation for x, _ in (train, test))
        of_class = [np.flatnonzero(train[1] == label) for label in range(num_classes)]
        smallest = min(map(len, of_class))
        if not smallest:
            raise UserError(
                "a class has no training image that can be read; leave it out (config.data.classes)"
            )
        counts = {f"shots{n}": [n] * num_classes for n in self.shots if n <= smallest}
        if left_out := [n for n in self.shots if n > smallest]:
            log.warning(
                "a class has %d training images: no figure for %s shots", smallest, left_out
            )
        share = lambda p: [max(1, round(p / 100 * len(members))) for members in of_class]
        counts |= {f"labels{p}pct": share(p) for p in self.percent}
        result = {}
        for name, of_each in counts.items():
            found = []
            for draw in range(self.draws):
                rng = np.random.default_rng([self.seed, draw])
                chosen = [
                    rng.permutation(members)[:n]
                    for members, n in zip(of_class, of_each, strict=True)
                ]
                chosen = np.concatenate(chosen)
                l2 = 1 / (self.prior**2 * len(chosen))
                fit = lbfgs_logistic.fit(
                    x[chosen], train[1][chosen], num_classes, (l2,), self.iterations
                )
                found.append(100 * float(np.mean(fit.predict(test_x)[0] == test[1])))
            result[name] = statistics.mean(found)
            result[f"{name}_std"] = statistics.stdev(found) if len(found) > 1 else 0.0
        return result
