"""A picture of a confusion matrix."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, UInt8
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lmim_jax.utils.plotting import plain_text

NUMBERED = 20  # classes up to which cells show numbers
NAME = 20  # letters of the name of a class


def plot_confusion(
    counts: Int[np.ndarray, "K K"], names: Sequence[str], title: str
) -> UInt8[np.ndarray, "H W 3"]:
    """Plot how the images of each class are classified, as shares of its images.

    Args:
      counts: images of the class of the row that were taken for the class of the column.
      names: of the classes.
      title: of the figure.
    """
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = 3.2 + 0.32 * len(names)
    figure = Figure(figsize=(side + 1, side), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    ax = figure.subplots()
    image = ax.imshow(100 * shares, cmap="Blues", vmin=0, vmax=100)
    labels = [plain_text(name[:NAME]) for name in names]
    ax.set_xticks(range(len(names)), labels, rotation=90, fontsize=8)
    ax.set_yticks(range(len(names)), labels, fontsize=8)
    ax.set_xlabel("predicted class")
    ax.set_ylabel("class of the image")
    ax.set_title(title, fontsize=10)
    if len(names) <= NUMBERED:
        for row in range(len(names)):
            for column in np.flatnonzero(counts[row]).tolist():
                color = "white" if shares[row, column] > 0.5 else "black"
                text = str(counts[row, column])
                ax.text(column, row, text, ha="center", va="center", color=color, fontsize=7)
    bar = figure.colorbar(image, ax=ax, shrink=0.8)
    bar.set_label("% of the images of the class")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
