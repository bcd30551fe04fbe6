"""Metrics of evaluators as a text table."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from lmim_jax.train.summary import ROWS

DESCRIPTIONS = (  # (regular expression for the whole name of a metric, what the metric is)
    (r"nn1", "class of the nearest training image"),
    (r"knn(\d+)", r"vote of the \1 nearest training images"),
    (r"loo1", "class of the nearest other test image"),
    (r"accuracy", "logistic regression on frozen features: test accuracy"),
    (r"held_out", "accuracy on held-out training images"),
    (r"l2", "l2 regularization chosen on held-out images"),
    (r"base_lr", "learning rate per 256 images, chosen on held-out images"),
    (r"weight_decay", "weight decay, chosen on held-out images"),
    (r"shots1", "1 labeled image per class"),
    (r"shots(\d+)", r"\1 labeled images per class"),
    (r"labels(\d+)pct", r"\1 % of the labels"),
    (r"list_(.+)", r"labels of the images listed in \1"),
    (r"(top1|accuracy|nn1|knn\d+)_v2", "the same on ImageNet-V2"),
    (r"(top1|accuracy|nn1|knn\d+)_real", "the same by the labels ReaL"),
    (r"map", "mean average precision of the labels, percent"),
    (r"knn(\d+)_map", r"the same by the \1 nearest training images"),
    (r"prevalence_map", "the same for equal answers: the share of images with a label"),
    (r"r2", "R^2 of the numbers"),
    (r"mae", "mean absolute error, in their unit"),
    (r"knn(\d+)_r2", r"R^2 of the mean of the \1 nearest training images"),
    (r"knn(\d+)_mae", "its mean absolute error"),
    (r"mean_mae", "mean absolute error of the training mean"),
    (r"majority", "always the most frequent class of the test images"),
    (r"top1", "accuracy on the test images"),
    (r"top(\d)", r"test images whose class is among the \1 most likely"),
    (r"miou(\d)", r"unsupervised segmentation into \1 clusters per image: mean IoU"),
    (r"(knn|linear)_miou", r"segmentation with labeled patches: mean IoU"),
    (r"(knn|linear)_accuracy", r"segmentation with labeled patches: accuracy"),
    (r"(knn|linear)_pixels", r"segmentation with labeled patches: accuracy of pixels"),
    (r"majority_pixels", "always the most frequent class of pixels"),
    (r"J", "video object segmentation: region similarity"),
    (r"F", "video object segmentation: contour accuracy"),
    (r"JF", "video object segmentation: mean of J and F"),
    (r"still_JF", "J&F if the first mask is kept for all frames"),
    (r"count", "number of objects"),
    (r"distance", "distance of the two nearest objects, in bins"),
    (r"\w+_chance", "the same by guessing"),
)
STD_SUFFIX = "_std"  # a metric of this name is the spread of the metric without the suffix

Metrics = Mapping[str, Mapping[str, float]]  # {"title/name": {column: value}}


def describe(name: str) -> str:
    """What a metric "title/name" is; "" if its name is not known."""
    metric = name.partition("/")[2]
    for pattern, description in DESCRIPTIONS:
        if re.fullmatch(pattern, metric):
            return re.sub(pattern, description, metric)
    return ""


def format_value(value: float | None, spread: float | None = None) -> str:
    """A number with one decimal, or three digits if it is small, and its spread if there is one."""
    if value is None:
        return ""
    text = f"{value:.1f}"
    if abs(value) < 1 and value != 0:
        text = f"{value:.3g}"
    if spread is None:
        return text
    return f"{text} ± {spread:.1f}"


def without_spreads(names: Iterable[str]) -> list[str]:
    """The names of metrics, without those that are the spread of another one."""
    known = list(names)
    kept = []
    for name in known:
        is_spread = name.endswith(STD_SUFFIX) and name.removesuffix(STD_SUFFIX) in known
        if not is_spread:
            kept.append(name)
    return kept


def line(metrics: Mapping[str, float]) -> str:
    """The metrics {name: value} in one line."""
    parts = []
    for name in without_spreads(metrics):
        spread = metrics.get(name + STD_SUFFIX)
        parts.append(f"{name} {format_value(metrics[name], spread)}")
    return "  ".join(parts)


def table(evaluated: Mapping[str, Any], metrics: Metrics) -> str:
    """The metrics as a text of several lines, with a row per metric.

    Args:
      evaluated: what was evaluated, with the keys run, step, checkpoint, weights, images and
        classes; see cli/evaluate.py.
      metrics: {"title/name": {column: value}}, columns as in `summary.ROWS`.
    """
    columns = []
    titles = []
    for column, title in ROWS.items():
        if any(column in values for values in metrics.values()):
            columns.append(column)
            titles.append(title)
    rows = [[""] + titles + [""]]
    for name in without_spreads(metrics):
        rows.append(_row(name, metrics, columns))
    lines = [""] + _heading(evaluated) + [""] + _align(rows) + [""]
    return "\n".join(lines)


def _row(name: str, metrics: Metrics, columns: Iterable[str]) -> list[str]:
    """The cells of one metric: its name, a value for each column, and its description."""
    values = metrics[name]
    spreads = metrics.get(name + STD_SUFFIX, {})
    cells = [format_value(values.get(column), spreads.get(column)) for column in columns]
    return [name] + cells + [describe(name)]


def _heading(evaluated: Mapping[str, Any]) -> list[str]:
    """Two lines on what was evaluated."""
    weights = " and ".join(sorted(set(evaluated["weights"].values())))
    images = " and ".join(f"{count:,} {split}" for split, count in evaluated["images"].items())
    classes = evaluated["classes"]
    chance = ""
    if classes > 1:
        chance = f", {classes} classes: guessing gives {100 / classes:.3g} %"
    return [
        f"{evaluated['run']}: step {evaluated['step']}, {weights} weights, "
        f"checkpoint {evaluated['checkpoint'][:12]}",
        f"{images} images{chance}. Accuracies are in percent.",
    ]


def _align(rows: list[list[str]]) -> list[str]:
    """Rows of cells as lines: the first and last cell aligned left, the others right."""
    last = len(rows[0]) - 1
    widths = [max(len(row[i]) for row in rows) for i in range(last)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        for i in range(1, last):
            cells.append(row[i].rjust(widths[i]))
        cells.append(row[last])
        lines.append("  ".join(cells).rstrip())
    return lines
