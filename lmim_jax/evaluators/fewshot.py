"""Few-shot classification: logistic regression on the frozen features of a few images per class.

Features are standardized by all training images, which needs no labels. The labeled images are
drawn several times, the same ones for every encoder. Nothing is chosen on the test images: the
strength of l2 follows from a rule. Percentages of the labels are drawn class by class, at least one
image each, and left out where these would be half as many again. The published 1 % and 10 % of
ImageNet are lists of files, `lists`.
"""

import dataclasses
import logging
import pathlib
import statistics

import numpy as np
from jaxtyping import Float, Int

from lmim_jax.data.eval.eval_data import EvaluationData
from lmim_jax.data.eval.file_names import find_listed
from lmim_jax.evaluators import base
from lmim_jax.evaluators.base import EvaluatedMethod, Params, Results
from lmim_jax.evaluators.common import classifiers, lbfgs_logistic
from lmim_jax.evaluators.common.image_features import Labeled, labeled_features
from lmim_jax.utils.errors import UserError

log = logging.getLogger(__name__)

LISTED = 3  # names in a message
MAX_EXCESS = 1.5  # drawn labels / asked for, as each class needs one


@dataclasses.dataclass(frozen=True)
class Evaluator(base.Evaluator):
    """Logistic regression with few labels; the fields are explained in configs/evaluate.py."""

    feature: str
    batch_size: int
    shots: tuple[int, ...]
    percent: tuple[int, ...]
    lists: tuple[str, ...]
    draws: int
    prior: float
    iterations: int
    seed: int

    needs_labels = True
    supports_pixel_baselines = True
    cost = 3.0

    def __post_init__(self) -> None:
        smallest = min(self.shots + self.percent, default=1)
        if self.draws < 1 or self.prior <= 0 or smallest <= 0:
            raise UserError(
                f"draws={self.draws}, prior={self.prior}, shots={self.shots}, "
                f"percent={self.percent}: must be above 0"
            )

    def run(self, method: EvaluatedMethod, params: Params, data: EvaluationData) -> Results:
        """{"shots<n>", "shots<n>_std", "labels<p>pct", "labels<p>pct_std"}; see `accuracies`.

        "list_<name>" for each list of labeled images; and "majority", percent of the most frequent
        class of the test images; {} if labels have no meaning.
        """
        if not base.is_possible(self, data):
            return {}
        train = labeled_features(method, params, data, "train", self.feature, self.batch_size)
        test = labeled_features(method, params, data, "test", self.feature, self.batch_size)
        results: Results = {}
        results.update(self.accuracies(train, test, len(data.classes)))
        for path in self.lists:
            name = pathlib.PurePath(path).stem
            results[f"list_{name}"] = self._accuracy_of_list(path, train, test, data)
        results["majority"] = classifiers.majority(test.labels)
        return results

    def _accuracy_of_list(
        self, path: str, train: Labeled, test: Labeled, data: EvaluationData
    ) -> float:
        """The accuracy with the labels of the images in a file, percent."""
        found = find_listed(path, data.sources["train"])
        if found.missing:
            log.warning(
                "%s: %d of its names are not among the training images: %s",
                path,
                len(found.missing),
                ", ".join(found.missing[:LISTED]),
            )
        chosen = np.flatnonzero(np.isin(train.places, found.indices))
        if not len(chosen):
            raise UserError(f"{path}: none of its images is readable and has a class")
        labeled = Labeled(train.features[chosen], train.labels[chosen])
        absent = len(data.classes) - len(np.unique(labeled.labels))
        if absent:
            log.warning("%s names no image of %d classes", path, absent)
        log.info("%s: %d labeled images", path, len(chosen))
        statistics_of_all = lbfgs_logistic.mean_and_deviation(train.features)
        return self._accuracy(labeled, test, statistics_of_all, len(data.classes))

    def accuracies(self, train: Labeled, test: Labeled, num_classes: int) -> dict[str, float]:
        """Mean and standard deviation of the accuracy over the draws, in percent.

        shots<n> is left out if a class has fewer than n images, and labels<p>pct if one image of
        each class were many more than p percent.

        Raises:
          UserError: a class has no readable training image.
        """
        statistics_of_all = lbfgs_logistic.mean_and_deviation(train.features)
        members = [np.flatnonzero(train.labels == label) for label in range(num_classes)]
        metrics = {}
        for name, counts in self._labels_per_class(members).items():
            drawn = []
            for draw in range(self.draws):
                rng = np.random.default_rng([self.seed, draw])
                chosen = _draw_labeled(rng, members, counts)
                labeled = Labeled(train.features[chosen], train.labels[chosen])
                drawn.append(self._accuracy(labeled, test, statistics_of_all, num_classes))
            metrics[name] = statistics.mean(drawn)
            metrics[f"{name}_std"] = statistics.stdev(drawn) if len(drawn) > 1 else 0.0
        return metrics

    def _labels_per_class(self, members: list[Int[np.ndarray, " n"]]) -> dict[str, list[int]]:
        """For each metric, how many images of each class are labeled."""
        smallest = min(len(indices) for indices in members)
        if not smallest:
            raise UserError(
                "a class has no readable training image; leave it out (config.data.classes)"
            )
        counts = {}
        too_many = []
        for shots in self.shots:
            if shots <= smallest:
                counts[f"shots{shots}"] = [shots] * len(members)
            else:
                too_many.append(shots)
        if too_many:
            log.warning(
                "a class has %d training images: no accuracy for %s shots", smallest, too_many
            )
        total = sum(len(indices) for indices in members)
        for percent in self.percent:
            drawn = [max(1, round(percent / 100 * len(indices))) for indices in members]
            if sum(drawn) > MAX_EXCESS * percent / 100 * total:
                log.warning(
                    "one image of each class is more than %g %% of %d labels: no accuracy for this",
                    percent,
                    total,
                )
                continue
            counts[f"labels{percent}pct"] = drawn
        return counts

    def _accuracy(
        self,
        train: Labeled,
        test: Labeled,
        standardization: tuple[Float[np.ndarray, " D"], Float[np.ndarray, " D"]],
        num_classes: int,
    ) -> float:
        """Percent of the test images, by a solution for some training images.

        Args:
          train: the chosen training images.
          test: the test images.
          standardization: mean and deviation of all training images.
          num_classes: number of classes.
        """
        l2 = 1 / (self.prior**2 * len(train.labels))
        mean, deviation = standardization
        x = (train.features - mean) / deviation
        fit = lbfgs_logistic.fit(x, train.labels, num_classes, (l2,), self.iterations)
        predicted = fit.predict(test.features, mean, deviation)[0]
        return 100 * float(np.mean(predicted == test.labels))


def _draw_labeled(
    rng: np.random.Generator, members: list[Int[np.ndarray, " n"]], counts: list[int]
) -> Int[np.ndarray, " m"]:
    """Indices of randomly chosen images, so many of each class."""
    chosen = []
    for indices, count in zip(members, counts, strict=True):
        chosen.append(rng.permutation(indices)[:count])
    return np.concatenate(chosen)
