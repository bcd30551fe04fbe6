"""The section of the report on segmentation and detection: pictures, and a table of classes."""

import csv
import functools
import io

import numpy as np
from PIL import Image

from lmim_jax.report import elements
from lmim_jax.utils import buckets, html
from lmim_jax.utils.html import Html, Section

PICTURE_SIDE = 1000  # pixels
PICTURES = {"_classes.csv": "_segments.png", "_class_ap.csv": "_boxes.png"}  # by table


def section(folder: buckets.Pathname) -> Section | None:
    """What segmentation and detection left in RUN/evaluations; None if there is nothing.

    Args:
      folder: of the run.
    """
    evaluations = buckets.path(folder, "evaluations")
    content: list[Html | str] = []
    for table, picture in PICTURES.items():
        for path in buckets.matching(evaluations / "tables", f"*{table}"):
            title = path.name.removesuffix(table)
            file = evaluations / "pictures" / f"{title}{picture}"
            content += elements.unless_damaged(
                path.name, functools.partial(_of_one, path, title, file)
            )
    if not content:
        return None
    look = (
        "Classes of pixels by the nearest labeled patches, a linear classifier of patches or a "
        "trained head, and boxes of objects, at the last evaluation; IoU or average precision of "
        "each class in percent."
    )
    return html.explained_section(
        "segmentation-probes", "Segmentation and detection", look, "", elements.concatenate(content)
    )


def _of_one(path: buckets.Path, title: str, picture: buckets.Path) -> list[Html | str]:
    """The heading, the picture and the table of one evaluation."""
    header, *rows = list(csv.reader(io.StringIO(path.read_text())))
    content: list[Html | str] = [elements.heading(title)]
    if picture.is_file():
        with Image.open(io.BytesIO(picture.read_bytes())) as image:
            pixels = np.asarray(image.convert("RGB"))
        content.append(html.image(pixels, f"pictures of {title}", PICTURE_SIDE))
    content.append(html.table(header, rows, numbers=range(1, len(header))))
    return content
