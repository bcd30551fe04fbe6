"""What a classifier learned, and what it answers for test images.

Letters: Q test images, T labels or classes, B batch.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Float, Int, Shaped

from lmim_jax.data.label_file import CLASSES, MULTILABEL, REGRESSION
from lmim_jax.evaluators.common import target_metrics
from lmim_jax.evaluators.common.classifiers import majority

TOP_K = 5  # of the second accuracy, where there are more classes


class Answers(NamedTuple):
    """Of a classifier, for images.

    Attributes:
      indices: of the images in their source.
      truth: classes [Q], or labels [Q, T].
      predicted: the most likely classes, the most likely first, [Q, 1 or TOP_K]; or labels [Q, T]:
        probabilities, or numbers.
      probability: of the most likely class [Q]; None: labels are no classes.
    """

    indices: Int[np.ndarray, " Q"]
    truth: Shaped[np.ndarray, "Q ..."]
    predicted: Shaped[np.ndarray, "Q k"]
    probability: Float[np.ndarray, " Q"] | None


class Outcome(NamedTuple):
    """Of a classifier that was trained.

    Attributes:
      evaluator: that trained it.
      kind: of labels, see data/label_file.py.
      names: of the classes, or of the labels.
      answers: for the test images.
      weights: arrays by name, for the evaluator's `outputs`.
      statistics: {"mean", "deviation"} by which its numbers were standardized; {}: they were not,
        or the weights take account of it.
    """

    evaluator: Any
    kind: str
    names: tuple[str, ...]
    answers: Answers
    weights: dict[str, np.ndarray]
    statistics: Mapping[str, tuple[float, ...]]


def activate(kind: str, outputs: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """Probabilities of classes or of labels; numbers as they are."""
    if kind == CLASSES:
        return jax.nn.softmax(outputs)
    if kind == MULTILABEL:
        return jax.nn.sigmoid(outputs)
    return outputs


def summarize(
    kind: str, probabilities: Float[Array, "B T"], top: int
) -> dict[str, Shaped[Array, "B ..."]]:
    """The part of `activate`'s result that answers need: {"predicted", "probability"}.

    Args:
      kind: of labels.
      probabilities: or numbers.
      top: how many of the most likely classes.
    """
    if kind != CLASSES:
        return {"predicted": probabilities}
    largest, predicted = jax.lax.top_k(probabilities, top)
    return {"predicted": predicted, "probability": largest[:, 0]}


def measure(kind: str, answers: Answers) -> dict[str, float]:
    """The accuracies of answers, percent: top1 and, if it is there, top5; else see `summarize`."""
    if kind != CLASSES:
        return target_metrics.summarize(kind, answers.predicted, answers.truth)
    correct = answers.predicted == answers.truth[:, None]
    metrics = {"top1": 100 * float(np.mean(correct[:, 0]))}
    if correct.shape[1] == TOP_K:
        metrics["top5"] = 100 * float(np.mean(correct.any(axis=1)))
    return metrics


def baselines(
    kind: str, answers: Answers, train: Float[np.ndarray, "N T"] | None
) -> dict[str, float]:
    """The metrics of an answer that needs no image; `train`: labels that are no classes."""
    if kind == CLASSES or train is None:
        return {"majority": majority(answers.truth)}
    return target_metrics.baselines(kind, train, answers.truth)


def fetch(tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """{path with slashes: array} of a tree on the devices; all processes must call it."""
    if jax.process_count() > 1:
        tree = multihost_utils.process_allgather(tree, tiled=True)
    arrays = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(tree)):
        arrays["/".join(str(part.key) for part in path)] = np.asarray(leaf)
    return arrays


def standardization(
    kind: str, values: Float[np.ndarray, "N T"] | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation (1 where constant) by which numbers are standardized; else ((), ())."""
    if kind != REGRESSION or values is None:
        return (), ()
    wide = values.astype(np.float64)
    deviation = wide.std(axis=0)
    deviation = np.where(deviation > 0, deviation, 1.0)
    return tuple(wide.mean(axis=0).tolist()), tuple(deviation.tolist())
