"""Between patches and the pixels of a mask at its full resolution.

An axis of the mask is mapped onto the grid of patches by `Axis`. The center of the first patch is
at 0.5, that of the last of n at n - 0.5.

Letters: H W height and width of a mask, h w rows and columns of scores, C classes, q label cells
along each side of a patch.
"""

import csv
import dataclasses
import functools
import io
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int16

from lmim_jax.data.augment.device import Augment, Squash

BAND = 16  # rows of a mask that are computed at a time
BLOCK = 128  # masks are padded to multiples of this: few compilations
UPSAMPLING = ("bilinear", "nearest")


@dataclasses.dataclass(frozen=True)
class Axis:
    """Where the pixels of an axis of a mask lie on the grid of patches.

    Attributes:
      first: the first pixel that the model sees.
      stop: one behind the last.
      scale: patches per pixel.
      offset: pixel p lies at (p + 1/2) scale + offset.
    """

    first: int
    stop: int
    scale: float
    offset: float

    def positions(self) -> Float[np.ndarray, " n"]:
        """Where the centers of the pixels first .. stop lie."""
        return (np.arange(self.first, self.stop) + 0.5) * self.scale + self.offset


def axes(size: tuple[int, int], augment: Augment, patch_size: int) -> tuple[Axis, Axis]:
    """The two axes of an image.

    Args:
      size: (height, width) of the image and its mask.
      augment: its `evaluation` is what the model sees: the whole image, or the middle.
      patch_size: side of a patch in pixels of the model's input.
    """
    resized = augment.eval_size
    if not isinstance(augment, Squash):
        height, width = augment.resized(np.array(size), xp=np).tolist()
        resized = (height, width)
    found = []
    for side, scaled, seen in zip(size, resized, augment.eval_size, strict=True):
        before = round((scaled - seen) / 2)
        first = max(0, int(np.ceil(before * side / scaled - 0.5)))
        stop = min(side, int(np.ceil((before + seen) * side / scaled - 0.5)))
        found.append(Axis(first, stop, scaled / (side * patch_size), offset=-before / patch_size))
    rows, columns = found
    return rows, columns


def crop(mask: Int16[np.ndarray, "_ _"], rows: Axis, columns: Axis) -> Int16[np.ndarray, "H W"]:
    """The part of a mask that the model sees."""
    return mask[rows.first : rows.stop, columns.first : columns.stop]


def patch_labels(
    mask: Int16[np.ndarray, "H W"], rows: Axis, columns: Axis, grid: tuple[int, int], classes: int
) -> Int[np.ndarray, " N"]:
    """The most frequent class of the pixels of each patch; -1 if most are ignored or none exist.

    Of equally frequent ones, that with the lower number.

    Args:
      mask: classes, -1: ignored; what `crop` returns.
      rows: axis of the mask.
      columns: the other axis.
      grid: rows and columns of patches.
      classes: C.
    """
    row = np.clip(rows.positions().astype(int), 0, grid[0] - 1)
    column = np.clip(columns.positions().astype(int), 0, grid[1] - 1)
    patch = row[:, None] * grid[1] + column[None, :]
    kind = np.where(mask < 0, classes, mask)
    shape = (grid[0] * grid[1], classes + 1)
    counts = np.bincount((patch * shape[1] + kind).ravel(), minlength=shape[0] * shape[1])
    counts = counts.reshape(shape)
    labels = counts.argmax(axis=1)
    labels[(labels == classes) | ~counts.any(axis=1)] = -1
    return labels


def cell_labels(
    mask: Int16[np.ndarray, "H W"], rows: Axis, columns: Axis, grid: tuple[int, int], cells: int
) -> Int16[np.ndarray, "N c"]:
    """The class at the center of each of q x q equal parts of each patch, row by row; -1: ignored.

    Args:
      mask: classes; what `crop` returns.
      rows: axis of the mask.
      columns: the other axis.
      grid: rows and columns of patches.
      cells: q.
    """
    index = []
    for axis, number, side in zip((rows, columns), grid, mask.shape, strict=True):
        centers = (np.arange(number * cells) + 0.5) / cells
        pixels = np.floor((centers - axis.offset) / axis.scale).astype(int) - axis.first
        index.append(np.clip(pixels, 0, side - 1))
    found = mask[np.ix_(index[0], index[1])]
    found = found.reshape(grid[0], cells, grid[1], cells).transpose(0, 2, 1, 3)
    return found.reshape(grid[0] * grid[1], cells * cells)


def pixel_classes(
    scores: Float[Array, "h w C"],
    rows: Axis,
    columns: Axis,
    grid: tuple[int, int],
    upsampling: str,
) -> Int16[np.ndarray, "H W"]:
    """The class with the largest score at each pixel of a mask.

    Scores are interpolated between their centers, and constant outside of these.

    Args:
      scores: on a grid of equal parts of the patches.
      rows: axis of the mask.
      columns: the other axis.
      grid: rows and columns of patches.
      upsampling: one of UPSAMPLING; "nearest": the score of the part in which the pixel lies.
    """
    places = []
    for axis, number, count in zip((rows, columns), scores.shape, grid, strict=False):
        position = axis.positions() * (number / count)
        missing = -len(position) % BLOCK
        places.append(np.pad(position, (0, missing), mode="edge").astype(np.float32))
    found = _jit_pixel_classes(upsampling)(scores, *places)
    height = rows.stop - rows.first
    width = columns.stop - columns.first
    return np.asarray(jax.device_get(found))[:height, :width]


@functools.lru_cache(maxsize=2)
def _jit_pixel_classes(upsampling: str) -> Callable[[Array, Array, Array], Array]:
    """Jitted (scores [h, w, C], positions of rows [H], of columns [W]) -> classes int16 [H, W]."""

    def along(x: Array, positions: Array) -> Array:
        """Sample the first axis of x at positions in units of its elements."""
        last = len(x) - 1
        if upsampling == "nearest":
            return x[jnp.clip(jnp.floor(positions).astype(int), 0, last)]
        positions = jnp.clip(positions - 0.5, 0, last)
        below = jnp.floor(positions).astype(int)
        share = (positions - below)[:, None, None]
        return x[below] * (1 - share) + x[jnp.minimum(below + 1, last)] * share

    def classes(scores: Array, row_positions: Array, column_positions: Array) -> Array:
        def band(positions: Array) -> Array:
            sampled = along(scores, positions)
            sampled = along(sampled.transpose(1, 0, 2), column_positions)
            return sampled.argmax(axis=-1).astype(jnp.int16).T

        bands = jax.lax.map(band, row_positions.reshape(-1, BAND))
        return bands.reshape(len(row_positions), len(column_positions))

    return jax.jit(classes)


class Confusion:
    """Counts pixels by their true and their predicted class.

    Attributes:
      table: int64 [C, C], true class by predicted class.
    """

    def __init__(self, classes: int) -> None:
        self.table = np.zeros((classes, classes), np.int64)

    def add(self, truth: Int[np.ndarray, "..."], predicted: Int[np.ndarray, "..."]) -> None:
        """Count pixels; those with the true class -1 are ignored."""
        classes = len(self.table)
        counted = truth >= 0
        pairs = truth[counted].astype(np.int64) * classes + predicted[counted]
        counts = np.bincount(pairs, minlength=classes * classes)
        self.table += counts.reshape(classes, classes)

    def iou(self) -> Float[np.ndarray, " C"]:
        """Intersection over union of each class, 0 .. 1; NaN if neither true nor predicted."""
        intersection = np.diag(self.table).astype(float)
        union = self.table.sum(axis=0) + self.table.sum(axis=1) - intersection
        return np.where(union > 0, intersection / np.maximum(union, 1), np.nan)

    def mean_iou(self) -> float:
        """Mean of `iou` over the classes that are true or predicted somewhere."""
        return float(np.nanmean(self.iou()))

    def accuracy(self) -> float:
        """Share of the pixels that are classified correctly, 0 .. 1."""
        return float(np.trace(self.table) / self.table.sum())

    def majority(self) -> float:
        """Share of the pixels of the most frequent class, 0 .. 1."""
        return float(self.table.sum(axis=1).max() / self.table.sum())


def class_table(names: Sequence[str], counts: dict[str, Confusion]) -> str:
    """A CSV table with a row for each class: its share of the pixels and its IoU, in percent."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["class", "share_of_pixels", *(f"{name}_iou" for name in counts)])
    truth = next(iter(counts.values())).table.sum(axis=1)
    ious = [count.iou() for count in counts.values()]
    for number, name in enumerate(names):
        values = [100 * truth[number] / truth.sum()]
        for iou in ious:
            values.append(100 * iou[number])
        cells = ["" if np.isnan(value) else f"{value:.2f}" for value in values]
        writer.writerow([name, *cells])
    return file.getvalue()
