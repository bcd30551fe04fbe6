"""k-NN classification: nearest neighbors by cosine similarity of frozen features.

Metrics, in percent of the test images:
  nn1        the class of the nearest training image
  knn<k>     k nearest training images vote with weight exp(cosine / temperature) (Wu et al. 2018;
             DINO, Caron et al. 2021)
  loo1       the nearest *other test image*, leave-one-out (the official k-NN of Latent MIM; much
             lower than the others); where a class has two test images
  majority   the most frequent class of the test images, always
For labels that are no classes (data/label_file.py), means of the neighbors' labels with these
weights, for each k: knn<k>_map, the mean average precision of 0/1 labels in percent, or knn<k>_r2
and knn<k>_mae of numbers; prevalence_map, for equal answers, or mean_mae, for the training mean.
For additional test images, nn1_<name> and knn<k>_<name>.
On request, the first two for features that need no encoder: pixels_nn1, histogram_knn<k>, ...
"""

import dataclasses
import logging

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from lmim_jax.data.eval.eval_data import EvaluationData
from lmim_jax.data.label_file import CLASSES, MULTILABEL, REGRESSION
from lmim_jax.evaluators import base
from lmim_jax.evaluators.base import ENCODER_FREE, EvaluatedMethod, Params, Results
from lmim_jax.evaluators.common import classifiers, image_features, target_metrics
from lmim_jax.evaluators.common.image_features import Labeled, labeled_features
from lmim_jax.utils.errors import UserError
from lmim_jax.utils.logging import log_once

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Evaluator(base.Evaluator):
    """k-NN on one feature; the fields are explained in configs/evaluate.py."""

    feature: str
    k: tuple[int, ...]
    temperature: float
    batch_size: int
    baselines: bool

    needs_labels = True
    label_kinds = (CLASSES, MULTILABEL, REGRESSION)
    supports_pixel_baselines = True
    cost = 2.0

    def __post_init__(self) -> None:
        if not self.k or min(self.k) < 1 or self.temperature <= 0:
            raise UserError(
                f"temperature={self.temperature} must be above 0, and each of k={self.k} at least 1"
            )

    def run(self, method: EvaluatedMethod, params: Params, data: EvaluationData) -> Results:
        """{"nn1", "knn<k>", "loo1", "majority", ...} in percent; {} if labels have no meaning."""
        if not base.is_possible(self, data):
            return {}
        results: Results = {}
        results.update(self.evaluate_feature(method, params, data, self.feature))
        if self.baselines:
            for feature in ENCODER_FREE:
                for metric, value in self.evaluate_feature(method, {}, data, feature).items():
                    if metric not in ("loo1", "majority", "prevalence_map", "mean_mae"):
                        results[f"{feature}_{metric}"] = value
        return results

    def evaluate_feature(
        self, method: EvaluatedMethod, params: Params, data: EvaluationData, feature: str
    ) -> dict[str, float]:
        """The metrics of any image feature."""
        train = labeled_features(method, params, data, "train", feature, self.batch_size)
        test = labeled_features(method, params, data, "test", feature, self.batch_size)
        if data.targets:
            return self._measure_targets(train, test, data)
        metrics = accuracies(
            train,
            test,
            ks=self.k,
            temperature=self.temperature,
            num_classes=len(data.classes),
            mesh=data.mesh,
        )
        for name, accepted in data.accepted.items():
            more = labeled_features(method, params, data, name, feature, self.batch_size)
            voted = votes(train, more, self.k, self.temperature, len(data.classes), data.mesh)
            for metric, predicted in voted.items():
                metrics[f"{metric}_{name}"] = accepted.accuracy(more.places, predicted)
        return {**metrics, "majority": classifiers.majority(test.labels)}

    def _measure_targets(
        self, train: Labeled, test: Labeled, data: EvaluationData
    ) -> dict[str, float]:
        """The metrics of labels that are no classes."""
        targets = data.targets
        assert targets is not None
        values = image_features.targets_of_rows(data, "train", train)
        truth = image_features.targets_of_rows(data, "test", test)
        ks = _ks_in_bank(self.k, len(values))
        scores, index = classifiers.nearest_neighbors(
            test.features, train.features, ks[-1], data.mesh
        )
        weights = _weights(scores, self.temperature)
        metrics = {}
        for k in ks:
            predicted = _weighted_mean(values, index[:, :k], weights[:, :k])
            for name, value in target_metrics.summarize(targets.kind, predicted, truth).items():
                metrics[f"knn{k}_{name}"] = value
        return {**metrics, **target_metrics.baselines(targets.kind, values, truth)}


def accuracies(
    train: Labeled,
    test: Labeled,
    *,
    ks: tuple[int, ...],
    temperature: float,
    num_classes: int,
    mesh: Mesh,
) -> dict[str, float]:
    """The metrics "nn1", "knn<k>" and, where a class has two test images, "loo1" in percent.

    Args:
      train: features and classes of the training images.
      test: features and classes of the test images.
      ks: numbers of neighbors, each limited to the number of training images.
      temperature: of the weights of the votes.
      num_classes: number of classes.
      mesh: devices that the training images are divided over.
    """

    def percent(predicted: Int[np.ndarray, " Q"]) -> float:
        return 100 * float(np.mean(predicted == test.labels))

    metrics = {}
    for name, predicted in votes(train, test, ks, temperature, num_classes, mesh).items():
        metrics[name] = percent(predicted)
    if np.bincount(test.labels).max() > 1:
        metrics["loo1"] = percent(test.labels[_nearest_other(test.features, mesh)])
    return metrics


def votes(
    train: Labeled,
    queries: Labeled,
    ks: tuple[int, ...],
    temperature: float,
    num_classes: int,
    mesh: Mesh,
) -> dict[str, Int[np.ndarray, " Q"]]:
    """The predicted classes of queries, as "nn1" and "knn<k>"; see `accuracies`."""
    ks_in_bank = _ks_in_bank(ks, len(train.labels))
    scores, index = classifiers.nearest_neighbors(
        queries.features, train.features, ks_in_bank[-1], mesh
    )
    neighbor_labels = train.labels[index]
    weights = _weights(scores, temperature)
    predicted = {"nn1": neighbor_labels[:, 0]}
    for k in ks_in_bank:
        predicted[f"knn{k}"] = classifiers.weighted_vote(
            neighbor_labels[:, :k], weights[:, :k], num_classes
        )
    return predicted


def _weights(scores: Float[np.ndarray, "Q k"], temperature: float) -> Float[np.ndarray, "Q k"]:
    """exp(score / temperature), over that of the nearest, as it may be too large for float32.

    Args:
      scores: the nearest neighbor's first.
      temperature: of the votes.
    """
    return np.exp((scores - scores[:, :1]) / temperature)


def _ks_in_bank(ks: tuple[int, ...], images: int) -> list[int]:
    """Numbers of neighbors, each limited to the number of training images; sorted."""
    if max(ks) > images:
        log_once(log, f"k-NN: there are only {images} labeled training images, and all vote")
    return sorted({min(k, images) for k in ks})


def _weighted_mean(
    values: Float[np.ndarray, "N T"],
    index: Int[np.ndarray, "Q k"],
    weights: Float[np.ndarray, "Q k"],
) -> Float[np.ndarray, "Q T"]:
    """The weighted mean of the labels of the neighbors of each query."""
    total = np.zeros((len(index), values.shape[1]))
    for rank in range(index.shape[1]):
        total += weights[:, rank, None] * values[index[:, rank]]
    return total / weights.sum(axis=1, keepdims=True)


def _nearest_other(queries: np.ndarray, mesh: Mesh) -> Int[np.ndarray, " Q"]:
    """Index of the most similar other row of each row."""
    _, index = classifiers.nearest_neighbors(queries, queries, min(2, len(queries)), mesh)
    # The first neighbor is the row itself, unless a duplicate comes before it
    is_itself = index[:, 0] == np.arange(len(queries))
    return np.where(is_itself, index[:, -1], index[:, 0])
