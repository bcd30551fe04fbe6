"""Views of whole images for dense tasks: resized, then cropped or padded, and maybe mirrored.

One view is applied to the pixels, the boxes and the mask of an image. Nothing is stretched, except
by rounding to whole pixels.

Source: large-scale jitter of Ghiasi et al. (CVPR 2021), as in detectron2's ResizeScale and
FixedSizeCrop, which ViTDet uses.

Letters: K side of the canvas, C channels, S T rows and columns of the output, M boxes.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from lmim_jax.data.augment.device import Augment, resample

MIN_SIDE = 1.0  # of a box that is left of a crop, in pixels


class View(NamedTuple):
    """What of an image is seen, and where.

    Attributes:
      resized: height and width to which the image is resized, int32.
      corner: the first row and column of it that are seen, int32.
      flip: whether what is seen is mirrored.
    """

    resized: Int[Array, "2"]
    corner: Int[Array, "2"]
    flip: Bool[Array, ""]


def fitting_scale(size: Int[Array, "2"], out: tuple[int, int]) -> Float[Array, ""]:
    """The factor by which an image is enlarged until it touches the border of the output.

    Args:
      size: height and width.
      out: (S, T).
    """
    return (jnp.asarray(out, jnp.float32) / size).min()


def resized(size: Int[Array, "2"], scale: Float[Array, ""]) -> Int[Array, "2"]:
    """Height and width of an image that is enlarged by a factor, int32."""
    return jnp.maximum(jnp.round(scale * size), 1).astype(jnp.int32)


def whole_view(size: Int[Array, "2"], out: tuple[int, int]) -> View:
    """The whole image, as large as fits, at the top left."""
    whole = resized(size, fitting_scale(size, out))
    return View(whole, jnp.zeros(2, jnp.int32), jnp.bool_(False))


def draw_view(
    key: Array,
    size: Int[Array, "2"],
    out: tuple[int, int],
    whole: Float[Array, ""],
    scale: tuple[float, float],
    flip: bool,
) -> View:
    """A random view. Where the image is larger than the output, a part of that size is cut out at
    random; where it is smaller, the rest of the output is padding.

    Args:
      key: of the image.
      size: height and width of the image.
      out: (S, T).
      whole: factor by which the image is enlarged, such as `fitting_scale`.
      scale: range of another factor, drawn uniformly.
      flip: mirror half of the images.
    """
    scale_key, corner_key, flip_key = jax.random.split(key, 3)
    factor = jax.random.uniform(scale_key, (), minval=scale[0], maxval=scale[1])
    enlarged = resized(size, whole * factor)
    room = jnp.maximum(enlarged - jnp.asarray(out), 0)
    corner = jnp.floor(jax.random.uniform(corner_key, (2,)) * (room + 1)).astype(jnp.int32)
    flipped = jax.random.bernoulli(flip_key) & flip
    return View(enlarged, jnp.minimum(corner, room), flipped)


def seen(view: View, out: tuple[int, int]) -> Bool[Array, "S T"]:
    """Where the output shows the image and no padding."""
    rows = jnp.arange(out[0]) + view.corner[0] < view.resized[0]
    columns = jnp.arange(out[1]) + view.corner[1] < view.resized[1]
    columns = jnp.where(view.flip, columns[::-1], columns)
    return rows[:, None] & columns[None, :]


def view_pixels(
    view: View,
    image: UInt8[Array, "K K C"],
    size: Int[Array, "2"],
    out: tuple[int, int],
    augment: Augment,
) -> Float[Array, "S T C"]:
    """The normalized pixels; padding is 0, the mean.

    Args:
      view: of the image.
      image: its canvas.
      size: height and width of the image on it.
      out: (S, T).
      augment: gives interpolation and normalization.
    """
    grids = (
        (0, view.corner[0], size[0], view.resized[0]),
        (0, view.corner[1], size[1], view.resized[1]),
    )
    pixels = resample(image, grids, (0, 0, size[0], size[1]), out, augment.kernel)
    pixels = jnp.where(view.flip, pixels[:, ::-1], pixels)
    return jnp.where(seen(view, out)[..., None], augment.normalize(pixels), 0.0)


def view_boxes(
    view: View, boxes: Float[Array, "M 4"], out: tuple[int, int]
) -> tuple[Float[Array, "M 4"], Bool[Array, " M"]]:
    """The boxes in pixels of the output, cut off at its border.

    Args:
      view: of the image.
      boxes: left, top, right, bottom as shares of the image.
      out: (S, T).

    Returns:
      The boxes, and which of them are seen: their sides are at least MIN_SIDE.
    """
    scale = jnp.tile(view.resized[::-1], 2).astype(jnp.float32)
    shift = jnp.tile(view.corner[::-1], 2).astype(jnp.float32)
    left, top, right, bottom = jnp.moveaxis(boxes * scale[None] - shift[None], 1, 0)
    mirrored = jnp.stack([out[1] - right, top, out[1] - left, bottom], axis=1)
    found = jnp.where(view.flip, mirrored, jnp.stack([left, top, right, bottom], axis=1))
    limits = jnp.asarray((out[1], out[0], out[1], out[0]), jnp.float32)
    found = jnp.clip(found, 0.0, limits[None])
    sides = found[:, 2:] - found[:, :2]
    return found, (sides >= MIN_SIDE).all(axis=1)


def view_mask(
    view: View,
    mask: UInt8[Array, "K K"],
    size: Int[Array, "2"],
    out: tuple[int, int],
    padding: int,
) -> UInt8[Array, "S T"]:
    """The numbers of a mask at the nearest pixels.

    Args:
      view: of the image.
      mask: on a canvas.
      size: height and width of the mask on it.
      out: (S, T).
      padding: number outside of the image.
    """
    index = []
    for axis in range(2):
        middles = 2 * (jnp.arange(out[axis]) + view.corner[axis]) + 1
        nearest = middles * size[axis] // (2 * view.resized[axis])
        index.append(jnp.minimum(nearest, size[axis] - 1))
    found = mask[index[0][:, None], index[1][None, :]]
    found = jnp.where(view.flip, found[:, ::-1], found)
    return jnp.where(seen(view, out), found, jnp.asarray(padding, mask.dtype))


@dataclasses.dataclass(frozen=True)
class Fit(Augment):
    """Test images are seen as a whole at `eval_size`, with padding at the bottom or the right."""

    def _check_resize(self) -> None:
        """Nothing is cropped."""

    def evaluation(self, batch: dict[str, Array]) -> Float[Array, "B S T C"]:
        """The whole images, normalized; see `whole_view`."""

        def one(image: Array, size: Array) -> Array:
            view = whole_view(size, self.eval_size)
            return view_pixels(view, image, size, self.eval_size, self)

        return jax.vmap(one)(batch["image"], batch["size"])
