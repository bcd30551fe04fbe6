"""Average precision of detections as pycocotools computes it.

Letters: N images, P detections, K classes.
"""

import contextlib
import csv
import io
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from lmim_jax.data.eval.coco import ALL_CLASSES, BoxSplit
from lmim_jax.utils.errors import UserError

NAMES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")  # of COCOeval.stats


class Detections(NamedTuple):
    """Detections in some images.

    Attributes:
      image: of each, the place of its image in the split.
      boxes: left, top, right, bottom in pixels of the image.
      scores: how sure they are.
      labels: their classes.
    """

    image: Int[np.ndarray, " P"]
    boxes: Float[np.ndarray, "P 4"]
    scores: Float[np.ndarray, " P"]
    labels: Int[np.ndarray, " P"]


class Precision(NamedTuple):
    """What pycocotools measures.

    Attributes:
      metrics: in percent, by name; those without a true box are left out.
      of_class: average precision of each class in percent, at IoU of 0.5 .. 0.95; NaN: no boxes.
      of_class_50: at IoU of 0.5.
    """

    metrics: dict[str, float]
    of_class: Float[np.ndarray, " K"]
    of_class_50: Float[np.ndarray, " K"]


def require_pycocotools() -> tuple[Any, Any]:
    """The classes COCO and COCOeval.

    Raises:
      UserError: the package is not installed.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise UserError(
            f"average precision needs the package pycocotools ({error}): "
            "pip install 'lmim_jax[detection]'"
        ) from error
    return COCO, COCOeval


def measure(
    split: BoxSplit, found: Detections, images: Int[np.ndarray, " n"] | None = None
) -> Precision:
    """Measure detections.

    Args:
      split: the images with their boxes.
      found: the detections.
      images: places of the images that count; None: all.
    """
    index_class, evaluation_class = require_pycocotools()
    if images is None:
        images = np.arange(len(split.ids))
    truth = index_class()
    predicted = index_class()
    shared = {
        "images": [{"id": int(place)} for place in range(len(split.ids))],
        "categories": [{"id": number} for number in range(len(split.classes))],
    }
    truth.dataset = {**shared, "annotations": _true_entries(split)}
    predicted.dataset = {**shared, "annotations": _found_entries(found)}
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        truth.createIndex()
        predicted.createIndex()
        evaluation = evaluation_class(truth, predicted, "bbox")
        evaluation.params.imgIds = sorted(int(place) for place in images)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    metrics = {}
    for name, value in zip(NAMES, evaluation.stats, strict=False):
        if value >= 0:
            metrics[name] = 100 * float(value)
    # [IoU, recall, class, area, most detections]: all areas, 100 detections
    precision = evaluation.eval["precision"][..., 0, -1]
    classes = len(split.classes)
    whole = np.full(classes, np.nan)
    half = np.full(classes, np.nan)
    for number in range(classes):
        if (precision[:, :, number] > -1).any():
            whole[number] = 100 * precision[:, :, number].mean()
            half[number] = 100 * precision[0, :, number].mean()
    return Precision(metrics, whole, half)


def _true_entries(split: BoxSplit) -> list[dict[str, Any]]:
    """Annotations; a region that is ignored in every class is a crowd of each."""
    entries: list[dict[str, Any]] = []
    for place in range(len(split.boxes)):
        labels = [int(split.labels[place])]
        if labels == [ALL_CLASSES]:
            labels = list(range(len(split.classes)))
        for label in labels:
            entries.append(
                {
                    "id": len(entries) + 1,  # 0 would count as unmatched
                    "image_id": int(split.image[place]),
                    "category_id": label,
                    "bbox": _left_top_sides(split.boxes[place]),
                    "area": float(split.areas[place]),
                    "iscrowd": int(split.crowd[place]),
                }
            )
    return entries


def _found_entries(found: Detections) -> list[dict[str, Any]]:
    entries = []
    for number in range(len(found.boxes)):
        bbox = _left_top_sides(found.boxes[number])
        entries.append(
            {
                "id": number + 1,
                "image_id": int(found.image[number]),
                "category_id": int(found.labels[number]),
                "bbox": bbox,
                "area": bbox[2] * bbox[3],
                "score": float(found.scores[number]),
            }
        )
    return entries


def _left_top_sides(box: Float[np.ndarray, "4"]) -> list[float]:
    left, top, right, bottom = box.tolist()
    return [left, top, right - left, bottom - top]


def class_table(train: BoxSplit, test: BoxSplit, found: Precision) -> str:
    """A CSV table with a row for each class: its boxes in both splits, and its AP in percent."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["class", "train_boxes", "test_boxes", "ap", "ap50"])
    train_counts = train.counts()
    test_counts = test.counts()
    for number, name in enumerate(test.classes):
        row: list[Any] = [name, int(train_counts[number]), int(test_counts[number])]
        for value in (found.of_class[number], found.of_class_50[number]):
            row.append("" if np.isnan(value) else f"{value:.2f}")
        writer.writerow(row)
    return file.getvalue()
