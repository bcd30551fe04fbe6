"""The section of the report on segmentation probes: their pictures, and the IoU of each class."""

import csv
import io

import numpy as np
from PIL import Image

from lmim_jax.report import elements
from lmim_jax.utils import buckets, html
from lmim_jax.utils.html import Html, Section

PICTURE_SIDE = 1000  # pixels
TABLE = "_classes.csv"
PICTURE = "_segments.png"


def section(folder: buckets.Pathname) -> Section | None:
    """What segmentation probes left in RUN/evaluations; None if there is nothing.

    Args:
      folder: of the run.
    """
    evaluations = buckets.path(folder, "evaluations")
    content: list[Html | str] = []
    for path in buckets.matching(evaluations / "tables", f"*{TABLE}"):
        title = path.name.removesuffix(TABLE)
        header, *rows = list(csv.reader(io.StringIO(path.read_text())))
        content.append(elements.heading(title))
        picture = evaluations / "pictures" / f"{title}{PICTURE}"
        if picture.is_file():
            with Image.open(io.BytesIO(picture.read_bytes())) as image:
                pixels = np.asarray(image.convert("RGB"))
            content.append(html.image(pixels, f"segmentation of {title}", PICTURE_SIDE))
        content.append(html.table(header, rows, numbers=range(1, len(header))))
    if not content:
        return None
    look = (
        "Classes of pixels by the nearest labeled patches and by a linear classifier of patches, "
        "at the last evaluation, and the IoU of each class in percent."
    )
    return html.explained_section(
        "segmentation-probes", "Segmentation probes", look, "", elements.concatenate(content)
    )
