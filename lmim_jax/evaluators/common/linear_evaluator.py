"""The base class of evaluators that solve for a linear function of frozen features.

Features are computed once, without augmentation, and standardized by the training images. The
strength of l2 is chosen on a held-out part of the *training* images: all candidates are solved on
the other training images at once. The best one (of equally good ones, the largest) is solved again
on all training images, and only this solution is evaluated on the test images, once. The minimum is
unique, so there is neither a learning rate nor a number of epochs to choose.

Letters: N training images, Q test images, D width of a feature, K classes or labels.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Shaped

from lmim_jax.data.eval.eval_data import EvaluationData
from lmim_jax.data.label_file import CLASSES, MULTILABEL, REGRESSION
from lmim_jax.evaluators import base
from lmim_jax.evaluators.base import ENCODER_FREE, EvaluatedMethod, Params, Results
from lmim_jax.evaluators.common import classifiers, image_features, lbfgs_logistic, outcome
from lmim_jax.evaluators.common.classifiers import LinearModel
from lmim_jax.evaluators.common.image_features import Labeled, labeled_features
from lmim_jax.evaluators.common.outcome import Answers, Outcome
from lmim_jax.evaluators.common.probe_training import Task
from lmim_jax.utils.errors import UserError

LOSSES = {
    CLASSES: lbfgs_logistic.SOFTMAX,
    MULTILABEL: lbfgs_logistic.SIGMOID,
    REGRESSION: lbfgs_logistic.SQUARED,
}


class Found(NamedTuple):
    """What was measured with a feature, and what was learned from it."""

    metrics: dict[str, float]
    outcome: Outcome


@dataclasses.dataclass(frozen=True)
class LinearEvaluator(base.Evaluator):
    """A linear function of one feature; the fields are explained in configs/evaluate.py."""

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
        """The metrics; {} if labels have no meaning."""
        if not base.is_possible(self, data):
            return {}
        found = self._evaluate(method, params, data, self.feature)
        if data.keep:
            data.keep(found.outcome)
        results: Results = {}
        results.update(found.metrics)
        if self.baselines:
            for feature in ENCODER_FREE:
                for name, value in self.evaluate_feature(method, {}, data, feature).items():
                    if name in ("accuracy", "map", "r2", "mae"):
                        results[f"{feature}_{name}"] = value
        return results

    def evaluate_feature(
        self, method: EvaluatedMethod, params: Params, data: EvaluationData, feature: str
    ) -> dict[str, float]:
        """The metrics of any image feature."""
        return self._evaluate(method, params, data, feature).metrics

    def _evaluate(
        self, method: EvaluatedMethod, params: Params, data: EvaluationData, feature: str
    ) -> Found:
        def features(split: str) -> Labeled:
            return labeled_features(method, params, data, split, feature, self.batch_size)

        train = features("train")
        test = features("test")
        targets = data.targets
        if targets is None:
            model = self.fit(train, len(data.classes), data.mesh, overwrite=True)
            answers = self._answers(test, CLASSES, model.outputs(test.features), test.labels)
            metrics = self._accuracies(model, test)
            metrics.update(outcome.baselines(CLASSES, answers, None))
            for name, accepted in data.accepted.items():
                more = features(name)
                predicted = model.fit.predict(more.features, model.mean, model.deviation)[0]
                metrics[f"accuracy_{name}"] = accepted.accuracy(more.places, predicted)
            learned = Outcome(self, CLASSES, data.classes, answers, _weights(model, (), ()), {})
            return Found(metrics, learned)
        values = image_features.targets_of_rows(data, "train", train)
        mean, deviation = outcome.standardization(targets.kind, values)
        scaled = values
        if mean:
            scaled = ((values - np.array(mean)) / np.array(deviation)).astype(np.float32)
        model = self._fit(
            train.features, scaled, targets.kind, len(targets.names), data.mesh, overwrite=True
        )
        outputs = model.outputs(test.features)
        if mean:
            outputs = outputs * np.array(deviation) + np.array(mean)
        truth = image_features.targets_of_rows(data, "test", test)
        answers = self._answers(test, targets.kind, outputs, truth)
        metrics = {**outcome.measure(targets.kind, answers), "l2": model.l2}
        metrics.update(outcome.baselines(targets.kind, answers, values))
        weights = _weights(model, mean, deviation)
        return Found(metrics, Outcome(self, targets.kind, targets.names, answers, weights, {}))

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
        return self._accuracies(self.fit(train, num_classes, mesh, overwrite), test)

    def fit(self, train: Labeled, num_classes: int, mesh: Mesh, overwrite: bool) -> LinearModel:
        """The model of classes; see `accuracies`."""
        return self._fit(train.features, train.labels, CLASSES, num_classes, mesh, overwrite)

    def outputs(
        self, task: Task, params: Params, weights: Params, images: Float[Array, "B H W C"]
    ) -> Float[Array, "B K"]:
        """Probabilities or numbers, by stored weights; see `Probe.outputs`."""
        x = image_features.image_vectors(task.method, task.augment, params, images, self.feature)
        x = (x - weights["mean"][None]) / weights["deviation"][None]
        exact = jax.lax.Precision.HIGHEST
        outputs = jnp.matmul(x, weights["kernel"], precision=exact) + weights["bias"][None]
        return outcome.activate(task.kind, outputs)

    def _fit(
        self,
        features: Float[np.ndarray, "N D"],
        labels: Shaped[np.ndarray, "N ..."],
        kind: str,
        count: int,
        mesh: Mesh,
        overwrite: bool,
    ) -> LinearModel:
        return classifiers.fit_regression(
            features,
            labels,
            num_classes=count,
            l2=self.l2,
            iterations=self.iterations,
            mesh=mesh,
            held_out=self.held_out,
            seed=self.seed,
            overwrite=overwrite,
            loss=LOSSES[kind],
        )

    def _accuracies(self, model: LinearModel, test: Labeled) -> dict[str, float]:
        predicted = model.fit.predict(test.features, model.mean, model.deviation)[0]
        return {
            "accuracy": 100 * float(np.mean(predicted == test.labels)),
            "held_out": 100 * model.held_out,
            "l2": model.l2,
        }

    def _answers(
        self,
        test: Labeled,
        kind: str,
        outputs: Float[np.ndarray, "Q K"],
        truth: Shaped[np.ndarray, "Q ..."],
    ) -> Answers:
        indices = test.indices
        if indices is None:
            indices = np.arange(len(test.features))
        answered = jax.device_get(
            outcome.summarize(kind, outcome.activate(kind, jnp.asarray(outputs)), 1)
        )
        return Answers(indices, truth, answered["predicted"], answered.get("probability"))


def _weights(
    model: LinearModel, mean: tuple[float, ...], deviation: tuple[float, ...]
) -> dict[str, np.ndarray]:
    """What `LinearEvaluator.outputs` needs; numbers come out in their own unit."""
    kernel = model.fit.weights[0]
    bias = model.fit.biases[0]
    if mean:
        kernel = (kernel * np.array(deviation)).astype(np.float32)
        bias = (bias * np.array(deviation) + np.array(mean)).astype(np.float32)
    return {"kernel": kernel, "bias": bias, "mean": model.mean, "deviation": model.deviation}
