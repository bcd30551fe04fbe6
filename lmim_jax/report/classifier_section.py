"""The section of the report on classifiers: accuracy of each class, and the most confused pairs."""

import csv
import functools
import io
from typing import Any

import numpy as np
from PIL import Image

from lmim_jax.data.label_file import CLASSES
from lmim_jax.evaluators.common import kept_classifier
from lmim_jax.report import elements
from lmim_jax.utils import buckets, html
from lmim_jax.utils.html import Html, Section

LISTED = 10  # classes, and pairs of classes
PICTURE_SIDE = 720  # pixels


def section(folder: buckets.Pathname) -> Section | None:
    """What evaluations left in RUN/evaluations/NAME/; None if there is nothing.

    Args:
      folder: of the run.
    """
    content: list[Html | str] = []
    for entry in buckets.matching(buckets.path(folder, "evaluations"), "*"):
        if not (entry / kept_classifier.DESCRIPTION).is_file():
            continue
        content += elements.unless_damaged(entry.name, functools.partial(_of_one, entry))
    if not content:
        return None
    look = (
        "Classifiers of the last evaluation, on the test images: which classes they know, and "
        "which they take for one another. The files are in evaluations/NAME/."
    )
    return html.explained_section(
        "classifiers", "Classifiers", look, "", elements.concatenate(content)
    )


def _of_one(entry: buckets.Path) -> list[Html | str]:
    """The heading and the tables of one classifier."""
    description = kept_classifier.read_description(entry)
    heading = elements.heading(f"{entry.name}, step {description['origin']['step']}")
    if description["kind"] == CLASSES:
        return [heading, *_classes(entry)]
    header, *rows = _rows(entry / kept_classifier.PER_LABEL)
    return [heading, html.table(header, rows, numbers=range(1, len(header)))]


def _classes(entry: buckets.Path) -> list[Html | str]:
    """The classes with the lowest accuracy, the most confused pairs, and the picture."""
    header, *rows = _rows(entry / kept_classifier.PER_CLASS)
    tested = [row for row in rows if int(row[1])]
    tested.sort(key=_accuracy)
    shown = tested[:LISTED]
    title = f"the {len(shown)} classes with the lowest accuracy, of {len(tested)}"
    if len(shown) == len(tested):
        title = "accuracy of each class"
    content: list[Html | str] = [
        elements.paragraph([title]),
        html.table(header, shown, numbers=range(1, len(header))),
    ]
    pairs = _confused(_rows(entry / kept_classifier.CONFUSION))
    if pairs:
        content.append(elements.paragraph(["most confused pairs"]))
        content.append(html.table(["class", "taken for", "images", "of"], pairs, numbers=(2, 3)))
    picture = entry / kept_classifier.PICTURE
    if picture.is_file():
        with Image.open(io.BytesIO(picture.read_bytes())) as image:
            pixels = np.asarray(image.convert("RGB"))
        content.append(html.image(pixels, f"confusion matrix of {entry.name}", PICTURE_SIDE))
    return content


def _accuracy(row: list[str]) -> float:
    return float(row[3])


def _confused(table: list[list[str]]) -> list[list[Any]]:
    """(class, predicted class, images, of) of the largest numbers beside the diagonal."""
    names = table[0][1:]
    counts = np.array([[int(cell) for cell in row[1:]] for row in table[1:]])
    totals = counts.sum(axis=1)
    np.fill_diagonal(counts, 0)
    pairs: list[list[Any]] = []
    for place in np.argsort(-counts, axis=None, kind="stable")[:LISTED]:
        row, column = divmod(int(place), len(names))
        if counts[row, column]:
            pairs.append([names[row], names[column], counts[row, column], totals[row]])
    return pairs


def _rows(path: buckets.Path) -> list[list[str]]:
    """The rows of a CSV file, with its header."""
    text = path.read_bytes().decode("utf-8", "surrogateescape")
    return list(csv.reader(io.StringIO(text)))
