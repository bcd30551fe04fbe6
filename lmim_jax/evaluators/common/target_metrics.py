"""Metrics of several 0/1 labels and of numbers; see data/label_file.py.

Letters: Q images, T labels.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from lmim_jax.data.label_file import MULTILABEL


def average_precision(scores: Float[np.ndarray, " Q"], truth: Float[np.ndarray, " Q"]) -> float:
    """Area under the steps of precision over recall, as scikit-learn's average_precision_score.

    Args:
      scores: the larger, the more likely is the label; equal ones are one threshold.
      truth: 0 or 1; at least one is 1.
    """
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(truth[order], dtype=np.float64)
    last = np.append(np.diff(scores[order]) != 0, True)  # of images with equal scores
    precision = (hits / np.arange(1, len(hits) + 1))[last]
    recall = hits[last] / hits[-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * precision))


def average_precisions(
    scores: Float[np.ndarray, "Q T"], truth: Float[np.ndarray, "Q T"]
) -> Float[np.ndarray, " T"]:
    """Of each label, 0 .. 1; NaN for one that no image has."""
    found = np.full(truth.shape[1], np.nan)
    for label in np.flatnonzero(truth.any(axis=0)):
        found[label] = average_precision(scores[:, label], truth[:, label])
    return found


def determination(
    predicted: Float[np.ndarray, "Q T"], truth: Float[np.ndarray, "Q T"]
) -> Float[np.ndarray, " T"]:
    """R^2 of each label, as scikit-learn's r2_score; NaN for one that is constant."""
    wide = truth.astype(np.float64)
    residual = np.square(wide - predicted).sum(axis=0)
    total = np.square(wide - wide.mean(axis=0)).sum(axis=0)
    varies = np.ptp(truth, axis=0) > 0
    found = np.full(truth.shape[1], np.nan)
    found[varies] = 1 - residual[varies] / total[varies]
    return found


def absolute_errors(
    predicted: Float[np.ndarray, "Q T"], truth: Float[np.ndarray, "Q T"]
) -> Float[np.ndarray, " T"]:
    """The mean absolute error of each label, in its unit."""
    return np.abs(truth.astype(np.float64) - predicted).mean(axis=0)


def summarize(
    kind: str, predicted: Float[np.ndarray, "Q T"], truth: Float[np.ndarray, "Q T"]
) -> dict[str, float]:
    """The metrics of predictions, means over the labels that have a meaning on these images.

    Args:
      kind: MULTILABEL: {"map": in percent}; REGRESSION: {"r2", "mae"}.
      predicted: scores, or numbers.
      truth: the labels.
    """
    if kind == MULTILABEL:
        return {"map": 100 * float(np.nanmean(average_precisions(predicted, truth)))}
    r2 = float(np.nanmean(determination(predicted, truth)))
    return {"r2": r2, "mae": float(absolute_errors(predicted, truth).mean())}


def baselines(
    kind: str, train: Float[np.ndarray, "N T"], truth: Float[np.ndarray, "Q T"]
) -> dict[str, float]:
    """What needs no image: {"prevalence_map": mAP of equal scores for all images, which is the
    share of images with a label} or {"mean_mae": that of always answering the training mean}.
    """
    if kind == MULTILABEL:
        return {"prevalence_map": summarize(kind, np.zeros_like(truth), truth)["map"]}
    constant = np.broadcast_to(train.astype(np.float64).mean(axis=0), truth.shape)
    return {"mean_mae": float(absolute_errors(constant, truth).mean())}


def each(
    kind: str,
    names: Sequence[str],
    predicted: Float[np.ndarray, "Q T"],
    truth: Float[np.ndarray, "Q T"],
) -> list[dict[str, str | float]]:
    """A row of metrics for each label; see `summarize`."""
    rows: list[dict[str, str | float]] = []
    if kind == MULTILABEL:
        precisions = average_precisions(predicted, truth)
        for label, name in enumerate(names):
            count = int(truth[:, label].sum())
            rows.append({"label": name, "images": count, "ap": 100 * float(precisions[label])})
        return rows
    r2 = determination(predicted, truth)
    errors = absolute_errors(predicted, truth)
    for label, name in enumerate(names):
        rows.append({"label": name, "r2": float(r2[label]), "mae": float(errors[label])})
    return rows
