"""Pictures of images with boxes."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from lmim_jax.utils.plotting import class_colors, plain_text

INCHES = 3.6  # width of an image
LEGEND = 20  # classes in the legend, at most


class Boxes(NamedTuple):
    """Boxes in an image.

    Attributes:
      boxes: left, top, right, bottom in pixels.
      labels: their classes.
      scores: numbers beside them; None: none.
    """

    boxes: Float[np.ndarray, "P 4"]
    labels: Int[np.ndarray, " P"]
    scores: Float[np.ndarray, " P"] | None


class Boxed(NamedTuple):
    """An image with boxes from different sources.

    Attributes:
      image: levels 0 .. 255.
      rows: boxes by the name of their source.
    """

    image: UInt8[np.ndarray, "H W C"]
    rows: Mapping[str, Boxes]


def plot_boxes(
    images: Sequence[Boxed], names: Sequence[str], note: str
) -> UInt8[np.ndarray, "H W 3"]:
    """Plot images, each in a column, with the boxes of one source in each row.

    Args:
      images: with the same sources.
      names: of all classes, whose colors the boxes have.
      note: below the picture.
    """
    sources = list(images[0].rows)
    colors = class_colors(len(names))
    height, width = images[0].image.shape[:2]
    row_inches = INCHES * height / width
    size = (len(images) * INCHES + 0.3, len(sources) * row_inches + 0.85)
    figure = Figure(figsize=size, dpi=110)
    axes = figure.subplots(len(sources), len(images), squeeze=False)
    present: set[int] = set()
    for column, image in enumerate(images):
        pixels = image.image
        if pixels.shape[-1] != 3:
            pixels = np.repeat(pixels.mean(-1, keepdims=True), 3, axis=-1).astype(np.uint8)
        for row, source in enumerate(sources):
            ax = axes[row, column]
            ax.imshow(pixels)
            ax.set_xticks([])
            ax.set_yticks([])
            found = image.rows[source]
            present |= set(found.labels.tolist())
            for i, (left, top, right, bottom) in enumerate(found.boxes.tolist()):
                color = colors[found.labels[i]]
                ax.add_patch(
                    Rectangle((left, top), right - left, bottom - top, fill=False, lw=1, ec=color)
                )
                if found.scores is not None:
                    score = f"{found.scores[i]:.2f}"
                    ax.text(left, top - 1, score, color=color, fontsize=5, clip_on=True)
    for row, source in enumerate(sources):
        axes[row, 0].set_ylabel(source, fontsize=8)
    figure.subplots_adjust(
        left=0.25 / size[0],
        right=1 - 0.04 / size[0],
        top=1 - 0.3 / size[1],
        bottom=0.5 / size[1],
        wspace=0.03,
        hspace=0.04,
    )
    figure.suptitle("Detection", y=1 - 0.05 / size[1], fontsize=10, weight="bold")
    legend = []
    for number in sorted(present)[:LEGEND]:
        legend.append(Patch(fill=False, ec=colors[number], label=plain_text(names[number])))
    place = dict(loc="lower center", bbox_to_anchor=(0.5, 0.16 / size[1]), ncols=8)
    figure.legend(handles=legend, fontsize=7, frameon=False, **place)
    figure.text(0.5, 0.02 / size[1], note, ha="center", va="bottom", fontsize=7)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
