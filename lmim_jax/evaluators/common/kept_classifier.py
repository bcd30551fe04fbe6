"""The folder of a classifier: its weights, what it answers for the test images, and how well.

classifier.json      evaluator with its options, kind and names of labels, origin
config.json          of the run whose encoder it uses
weights.safetensors  what was trained; of a fine-tuned classifier, with the encoder
predictions.csv      image,label,prediction,probability of each labeled test image
per_class.csv        class,images,correct,accuracy; for other labels per_label.csv
confusion.csv        images of the class of the row, by the predicted class of the column
confusion.png        the same as a picture, of at most PICTURED classes
"""

import csv
import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int
from PIL import Image

from lmim_jax.data.label_file import CLASSES
from lmim_jax.evaluators.common import target_metrics
from lmim_jax.evaluators.common.outcome import Outcome
from lmim_jax.utils import array_io, atomic_io, buckets, confusion_plot
from lmim_jax.utils.errors import UserError

DESCRIPTION = "classifier.json"
CONFIG = "config.json"
WEIGHTS = "weights.safetensors"
PREDICTIONS = "predictions.csv"
PER_CLASS = "per_class.csv"
PER_LABEL = "per_label.csv"
CONFUSION = "confusion.csv"
PICTURE = "confusion.png"
PICTURED = 50  # classes, at most

Row = Sequence[Any]


def write(
    folder: buckets.Pathname,
    outcome: Outcome,
    source: Any,
    config: Mapping[str, Any],
    origin: Mapping[str, Any],
) -> None:
    """Write the folder, over what an earlier evaluation left there.

    Args:
      folder: of the classifier.
      outcome: what is to be kept.
      source: the test images.
      config: of the run, plain values.
      origin: {"run", "step", "checkpoint", "weights", "modalities"}, of the encoder; the last are
        names of some of the run's, if the images had not all of them.
    """
    for name in (DESCRIPTION, PREDICTIONS, PER_CLASS, PER_LABEL, CONFUSION, PICTURE):
        buckets.path(folder, name).unlink(missing_ok=True)
    evaluator = outcome.evaluator
    description = {
        "evaluator": type(evaluator).__module__.rpartition(".")[2],
        "options": dataclasses.asdict(evaluator),
        "kind": outcome.kind,
        "names": list(outcome.names),
        "statistics": outcome.statistics,
        "origin": dict(origin),
    }
    with buckets.local_folder(folder) as local:
        (local / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        array_io.write(local / WEIGHTS, outcome.weights)
        if outcome.kind == CLASSES:
            _write_classes(local, outcome, source)
        else:
            _write_labels(local, outcome, source)
    # The last: a folder without it, as an interrupt leaves it, is not that of a classifier
    atomic_io.write(buckets.path(folder, DESCRIPTION), json.dumps(description, indent=2) + "\n")


def _write_classes(folder: pathlib.Path, outcome: Outcome, source: Any) -> None:
    answers = outcome.answers
    names = outcome.names
    predicted = answers.predicted[:, 0]
    assert answers.probability is not None
    rows: list[Row] = []
    for i, index in enumerate(answers.indices):
        probability = f"{answers.probability[i]:.4f}"
        truth = names[answers.truth[i]]
        rows.append([image_name(source, index), truth, names[predicted[i]], probability])
    write_csv(folder / PREDICTIONS, ["image", "label", "prediction", "probability"], rows)
    counts = confusion(answers.truth, predicted, len(names))
    rows = []
    for number, name in enumerate(names):
        images = int(counts[number].sum())
        correct = int(counts[number, number])
        accuracy = f"{100 * correct / images:.2f}" if images else ""
        rows.append([name, images, correct, accuracy])
    write_csv(folder / PER_CLASS, ["class", "images", "correct", "accuracy"], rows)
    table = [[name, *counts[number].tolist()] for number, name in enumerate(names)]
    write_csv(folder / CONFUSION, ["class", *names], table)
    if len(names) <= PICTURED:
        share = 100 * np.trace(counts) / counts.sum()
        title = f"{counts.sum():,} test images, {share:.1f} % are classified correctly"
        picture = confusion_plot.plot_confusion(counts, names, title)
        Image.fromarray(picture).save(folder / PICTURE)


def _write_labels(folder: pathlib.Path, outcome: Outcome, source: Any) -> None:
    answers = outcome.answers
    header = ["image"]
    for name in outcome.names:
        header += [name, f"{name} predicted"]
    rows = []
    for i, index in enumerate(answers.indices):
        row = [image_name(source, index)]
        for label in range(len(outcome.names)):
            row += [f"{answers.truth[i, label]:g}", f"{answers.predicted[i, label]:.5g}"]
        rows.append(row)
    write_csv(folder / PREDICTIONS, header, rows)
    each = target_metrics.each(outcome.kind, outcome.names, answers.predicted, answers.truth)
    table = []
    for figures in each:
        cells = []
        for value in figures.values():
            if isinstance(value, float):
                value = "" if np.isnan(value) else f"{value:.5g}"
            cells.append(value)
        table.append(cells)
    write_csv(folder / PER_LABEL, list(each[0]), table)


def confusion(
    truth: Int[np.ndarray, " Q"], predicted: Int[np.ndarray, " Q"], classes: int
) -> Int[np.ndarray, "K K"]:
    """Numbers of images by their class (rows) and predicted class (columns)."""
    return np.bincount(truth * classes + predicted, minlength=classes**2).reshape(classes, classes)


def image_name(source: Any, index: int) -> str:
    """The path of an image below its folder; the name of a record."""
    files = getattr(source, "files", None)
    if files is None:
        return source.name(int(index))
    return files[int(index)]


def write_csv(path: pathlib.Path, header: Row, rows: Iterable[Row]) -> None:
    """Write a table."""
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def read_description(folder: buckets.Pathname) -> dict[str, Any]:
    """The content of classifier.json.

    Raises:
      UserError: there is none.
    """
    path = buckets.path(folder, DESCRIPTION)
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} is not the folder of a classifier, which lmim evaluate writes, such as "
            f"RUN/evaluations/finetune ({error})"
        ) from error


def read_weights(folder: buckets.Pathname) -> dict[str, np.ndarray]:
    """The arrays of a classifier, by name."""
    with buckets.local_file(buckets.path(folder, WEIGHTS)) as file:
        arrays, _ = array_io.read(file)
    return arrays
