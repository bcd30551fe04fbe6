"""Image augmentation on the device: crop, antialiased resize, flip, normalize, in pure JAX.

The host only decodes. An image lies at the top left of a fixed uint8 canvas [K, K, C], beside its
true size; a crop is resized by two matrix products, columns then rows, equal to Pillow's
antialiased resize within one level.

Letters: B batch, K side of the canvas, C channels, S T rows and columns of the output.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped, UInt8
from ml_collections import ConfigDict

from lmim_jax.utils.errors import UserError, did_you_mean
from lmim_jax.utils.platform import current_platform

CROP_TRIES = 10
PUBLISHED_RESIZE = 256 / 224  # short side of test images / their crop, in most publications
TABLE_BITS = 12  # crop shapes are drawn from tables of this many bits

Kernel = Callable[[Array], Array]
AxisGrid = tuple[Any, Any, Any, Any]  # see `resize_weights`
CropDraw = dict[str, Shaped[Any, "..."]]  # see `draw_crop`


def bicubic(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Keys' cubic convolution kernel with a = -0.5, Pillow's BICUBIC; support 2."""
    x = jnp.abs(x)
    inner = (1.5 * x - 2.5) * x * x + 1
    outer = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return jnp.where(x < 1, inner, jnp.where(x < 2, outer, 0.0))


def bilinear(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Triangle kernel, Pillow's BILINEAR; support 1."""
    return jnp.maximum(1 - jnp.abs(x), 0.0)


KERNELS: dict[str, Kernel] = {"bicubic": bicubic, "bilinear": bilinear}


def resize_weights(
    grid: AxisGrid,
    low: Int[Array, ""] | int,
    high: Int[Array, ""] | int,
    canvas: int,
    size: int,
    kernel: Kernel,
) -> Float[Array, "S K"]:
    """The matrix that resamples an axis of the canvas.

    Where the axis is shrunk, the kernel is widened by the scale (antialiasing). Weights outside
    [low, high), the samples that may be read, are 0, and each row sums to 1, as in Pillow.

    Args:
      grid: int32 (start, first, numerator, denominator): output i lies at
        start + (first + i + 1/2) numerator / denominator. Distances are divided once, as whole
        numbers: float32 positions would be off by 3e-5 of a pixel.
      low, high: the valid range: the box itself when the image is cropped first (training), the
        image otherwise.
      canvas: K.
      size: S.
      kernel: function of the distance in source samples.
    """
    start, first, numerator, denominator = grid
    samples = jnp.arange(canvas)
    sources = (2 * samples - 2 * start + 1) * denominator
    targets = (2 * (first + jnp.arange(size)) + 1) * numerator
    distances = sources[None, :] - targets[:, None]
    weights = kernel(distances / (2 * jnp.maximum(numerator, denominator)))
    weights = jnp.where((samples >= low) & (samples < high), weights, 0.0)
    return weights / weights.sum(axis=1, keepdims=True)


def resample(
    image: UInt8[Array, "K K C"],
    grids: tuple[AxisGrid, AxisGrid],
    valid: tuple[Any, Any, Any, Any],
    size: tuple[int, int],
    kernel: Kernel,
) -> Float[Array, "S T C"]:
    """Resample the rows and columns of one canvas, rounded to whole levels after each axis.

    Args:
      image: the canvas.
      grids: of rows and columns, see `resize_weights`.
      valid: (top, left, bottom, right), the pixels that may be read.
      size: (S, T), rows and columns of the output.
      kernel: a value of KERNELS.

    Returns:
      float32 [S, T, C] of whole numbers in 0 .. 255.
    """
    canvas = image.shape[0]
    top, left, bottom, right = valid
    row_weights = resize_weights(grids[0], top, bottom, canvas, size[0], kernel)
    column_weights = resize_weights(grids[1], left, right, canvas, size[1], kernel)
    pixels = _weighted_levels("tj,ijc->itc", column_weights, image)
    return _weighted_levels("si,itc->stc", row_weights, pixels)


def _weighted_levels(
    equation: str, weights: Float[Array, "T J"], levels: Array
) -> Float[Array, "..."]:
    """Multiply whole levels 0 .. 255 by a matrix of weights; whole levels again, float32.

    bfloat16 holds every level exactly, so on accelerators only the weights are split, in two
    bfloat16 parts: products at full speed whose sums are off by 0.003 levels at most. (At default
    precision, float32 products would keep 8 to 11 bits of both.)
    """
    if current_platform() == "cpu":
        product = jnp.einsum(equation, weights, levels.astype(jnp.float32), precision="highest")
        return _round_levels(product)
    levels = levels.astype(jnp.bfloat16)
    high = weights.astype(jnp.bfloat16)
    low = (weights - high.astype(jnp.float32)).astype(jnp.bfloat16)
    product = jnp.einsum(equation, high, levels, preferred_element_type=jnp.float32)
    product += jnp.einsum(equation, low, levels, preferred_element_type=jnp.float32)
    return _round_levels(product)


def _round_levels(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Round to whole levels 0 .. 255, halves up, as Pillow does."""
    return jnp.clip(jnp.floor(x + 0.5), 0, 255)


def crop_resize(
    image: UInt8[Array, "K K C"],
    box: Int[Array, "4"],
    size: tuple[int, int],
    kernel: Kernel,
) -> Float[Array, "S T C"]:
    """Crop a box (top, left, height, width), int32, out of one canvas and resize it.

    See `resample`.
    """
    top, left, height, width = box
    grids = ((top, 0, height, size[0]), (left, 0, width, size[1]))
    return resample(image, grids, (top, left, top + height, left + width), size, kernel)


def draw_crop(key: Array, scale: tuple[float, float], ratio: tuple[float, float]) -> CropDraw:
    """The random numbers of a random-resized crop: ten shapes to try, and a position.

    A shape has a share of the area uniform on `scale` and an aspect ratio log-uniform on `ratio`,
    as in torchvision's `RandomResizedCrop`. All numbers are looked up in tables of 4,096 values or
    made of random bits, so that every backend draws the same to the bit.

    Returns:
      {"sides": float32 [2, 10], heights and widths divided by the square root of the image's area;
      "place": float32 [2] in [0, 1), the position}.
    """
    middles = (np.arange(1 << TABLE_BITS) + 0.5) / (1 << TABLE_BITS)
    side_table = np.sqrt(scale[0] + (scale[1] - scale[0]) * middles)
    aspect_table = np.sqrt(ratio[0] * (ratio[1] / ratio[0]) ** middles)
    share_key, aspect_key, place_key = jax.random.split(key, 3)
    sides = jnp.asarray(side_table, jnp.float32)[_draw_table_index(share_key)]
    aspect = _draw_table_index(aspect_key)
    heights = sides * jnp.asarray(1 / aspect_table, jnp.float32)[aspect]
    widths = sides * jnp.asarray(aspect_table, jnp.float32)[aspect]
    return {
        "sides": jnp.stack([heights, widths]),
        "place": jax.random.uniform(place_key, (2,)),
    }


def _draw_table_index(key: Array) -> Int[Array, "10"]:
    """Uniform random indices of a table of TABLE_BITS bits, one per try."""
    return jax.random.bits(key, (CROP_TRIES,), "uint32") >> (32 - TABLE_BITS)


def fit_crop(
    draw: CropDraw,
    size: Int[Any, "2"],
    longest: int,
    ratio: tuple[float, float],
    xp: ModuleType = jnp,
) -> Int[Any, "4"]:
    """The crop box (top, left, height, width) for an image of a given size, int32.

    The first of the drawn shapes that fits; if none does, the center with the nearest allowed
    aspect ratio. Only whole numbers, looked-up square roots and single float32 products: numpy
    (`xp=np`) and every backend get the same box.

    Args:
      draw: the result of `draw_crop`.
      size: int32 (height, width).
      longest: no side is longer (the side of the canvas).
      ratio: the range of aspect ratios that was drawn from.
      xp: jax.numpy or numpy.
    """
    roots = xp.asarray(_square_roots(longest))[size]
    sides = xp.rint(draw["sides"] * (roots[0] * roots[1])).astype(np.int32)
    fits = ((sides > 0) & (sides <= size[:, None])).all(0)
    crop = sides[:, xp.argmax(fits)]
    corner = xp.floor(draw["place"] * (size - crop + 1).astype(np.float32)).astype(np.int32)
    drawn_box = xp.concatenate([xp.minimum(corner, size - crop), crop])

    limits = xp.rint(size[::-1] * np.array([1 / ratio[0], ratio[1]], np.float32)).astype(np.int32)
    center = xp.minimum(size, limits)
    center_box = xp.concatenate([(size - center) // 2, center])
    return xp.where(fits.any(), drawn_box, center_box)


@functools.cache
def _square_roots(longest: int) -> Float[np.ndarray, " n"]:
    """Square roots of 0 .. longest, float32."""
    return np.sqrt(np.arange(longest + 1)).astype(np.float32)


def published_resize(eval_size: tuple[int, int]) -> int:
    """The `eval_resize` for a crop of test images: 256 for 224, the same ratio for other sizes."""
    return round(min(eval_size) * PUBLISHED_RESIZE)


@dataclasses.dataclass(frozen=True)
class Augment:
    """The augmentation of training images, and the transform of test images (`evaluation`).

    Attributes:
      scale: range of the crop's share of the image area.
      ratio: range of the crop's aspect ratio, width over height.
      flip: mirror half of the training images.
      interpolation: one of KERNELS.
      mean: per channel, of pixel values in 0 .. 1.
      std: per channel.
      image_size: (height, width) of training images.
      eval_resize: test images are resized to this short side; where `eval_size` is not square, see
        `resized`.
      eval_size: (height, width) of the center crop of test images.

    Raises:
      UserError: unknown interpolation, a std that is not above 0, another number of means than of
        stds, or test images that would be smaller than their crop.
    """

    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: bool
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: tuple[int, int]
    eval_resize: int
    eval_size: tuple[int, int]

    def __post_init__(self) -> None:
        if self.interpolation not in KERNELS:
            raise UserError(
                f"config.augment.interpolation={self.interpolation!r} must be one of: "
                f"{' | '.join(KERNELS)}{did_you_mean(self.interpolation, KERNELS)}"
            )
        if len(self.mean) != len(self.std) or min(self.std) <= 0:
            raise UserError(
                f"config.augment.mean={tuple(self.mean)} and std={tuple(self.std)} must have a "
                "number for each channel, and each std must be above 0"
            )
        self._check_resize()

    def _check_resize(self) -> None:
        """Raise a UserError unless the crop of test images fits into the resized images."""
        smallest = min(self.eval_size)
        if self.eval_resize < smallest:
            raise UserError(
                f"config.augment.eval_resize={self.eval_resize} is less than the {smallest} pixels "
                "of config.method.grid x patch_size, so that test images would be smaller than "
                f"their crop; set it to {published_resize(self.eval_size)}, for example"
            )

    @classmethod
    def from_config(
        cls, config: ConfigDict, *, image_size: tuple[int, int], eval_size: tuple[int, int]
    ) -> "Augment":
        """The augmentation of `config.augment`; the sizes come from the method.

        An `eval_resize` of None follows from `eval_size`, see `published_resize`.
        """
        height, width = image_size
        eval_height, eval_width = eval_size
        options = dict(config)
        if options["eval_resize"] is None:
            options["eval_resize"] = published_resize(eval_size)
        return cls(**options, image_size=(height, width), eval_size=(eval_height, eval_width))

    @property
    def kernel(self) -> Kernel:
        """The interpolation kernel."""
        return KERNELS[self.interpolation]

    def normalize(self, images: Shaped[Array, "... C"]) -> Float[Array, "... C"]:
        """Levels 0 .. 255 -> (x / 255 - mean) / std, float32."""
        mean = _per_channel(self.mean, images.ndim)
        std = _per_channel(self.std, images.ndim)
        return (images / 255 - mean) / std

    def denormalize(self, images: Float[Array, "... C"]) -> Float[Array, "... C"]:
        """The inverse of `normalize`: whole levels 0 .. 255, float32."""
        mean = _per_channel(self.mean, images.ndim)
        std = _per_channel(self.std, images.ndim)
        return jnp.round((images * std + mean) * 255)

    def draw(self, key: Array) -> CropDraw:
        """All random numbers of one image: those of `draw_crop`, and "flip", a bool."""
        crop_key, flip_key = jax.random.split(key)
        draw = draw_crop(crop_key, self.scale, self.ratio)
        draw["flip"] = jax.random.bernoulli(flip_key) & self.flip
        return draw

    def crop_box(self, draw: CropDraw, size: Int[Array, "2"], longest: int) -> Int[Array, "4"]:
        """The crop (top, left, height, width) of an image, int32; see `fit_crop`."""
        return fit_crop(draw, size, longest, self.ratio)

    def __call__(
        self, keys: Shaped[Array, " B"], batch: dict[str, Array]
    ) -> Float[Array, "B S T C"]:
        """Random-resized crop, flip, normalize.

        Args:
          keys: one key per image.
          batch: "image" [B, K, K, C] uint8 and "size" [B, 2] int32 (height, width); or, without
            "size", crops [B, S, T, C] made on the host, which are only normalized.

        Returns:
          float32 [B, *image_size, C].
        """
        if "size" not in batch:
            return self.normalize(batch["image"])

        def augment_image(key: Array, image: Array, size: Array) -> Array:
            draw = self.draw(key)
            box = self.crop_box(draw, size, image.shape[0])
            crop = crop_resize(image, box, self.image_size, self.kernel)
            return jnp.where(draw["flip"], crop[:, ::-1], crop)

        return self.normalize(jax.vmap(augment_image)(keys, batch["image"], batch["size"]))

    def resized(self, size: Int[Any, "2"], xp: ModuleType = jnp) -> Int[Any, "2"]:
        """(height, width) of a test image before the center crop, int32.

        The image covers `eval_size`, enlarged so that the short side of `eval_size` is
        `eval_resize`. For a square crop this is torchvision's resize: the short side is
        `eval_resize`, the long side int(eval_resize * long / short).

        Args:
          size: (height, width) of the image, int32.
          xp: jax.numpy or numpy.
        """
        divisor = math.gcd(*self.eval_size)
        rows = self.eval_size[0] // divisor
        columns = self.eval_size[1] // divisor
        is_tight = rows * size[1] >= columns * size[0]  # whether rows need the larger scale
        unit = xp.where(is_tight, rows, columns)
        side = xp.where(is_tight, size[0], size[1])
        return self.eval_resize * unit * size // (side * min(rows, columns))

    def evaluation(self, batch: dict[str, Array]) -> Float[Array, "B S T C"]:
        """Resize (see `resized`), center-crop to `eval_size`, normalize.

        The resize may read the whole image, so it equals resizing first and cropping afterwards.

        Args:
          batch: "image" [B, K, K, C] uint8 and "size" [B, 2] int32 (height, width).

        Returns:
          float32 [B, *eval_size, C].
        """

        def transform_image(image: Array, size: Array) -> Array:
            return resample(
                image,
                grids=self._evaluation_grids(size),
                valid=(0, 0, size[0], size[1]),
                size=self.eval_size,
                kernel=self.kernel,
            )

        return self.normalize(jax.vmap(transform_image)(batch["image"], batch["size"]))

    def _evaluation_grids(self, size: Int[Array, "2"]) -> tuple[AxisGrid, AxisGrid]:
        """The grids of `evaluation`, of rows and columns, see `resize_weights`."""
        # torchvision: the offsets of the center crop are rounded half to even
        resized = self.resized(size)
        first = jnp.round((resized - jnp.asarray(self.eval_size)) / 2).astype(jnp.int32)
        return ((0, first[0], size[0], resized[0]), (0, first[1], size[1], resized[1]))


@dataclasses.dataclass(frozen=True)
class SingleTry(Augment):
    """Tries one shape of a crop, and cuts it off where it is larger than the image.

    Source: MAE, `util/crop.py`, for its linear probe; after the TensorFlow code of BYOL.
    """

    def crop_box(self, draw: CropDraw, size: Int[Array, "2"], longest: int) -> Int[Array, "4"]:
        """The crop (top, left, height, width) of an image, int32."""
        roots = jnp.asarray(_square_roots(longest))[size]
        sides = jnp.rint(draw["sides"][:, 0] * (roots[0] * roots[1])).astype(jnp.int32)
        crop = jnp.clip(sides, 1, size)
        corner = jnp.floor(draw["place"] * (size - crop + 1).astype(jnp.float32)).astype(jnp.int32)
        return jnp.concatenate([jnp.minimum(corner, size - crop), crop])


@dataclasses.dataclass(frozen=True)
class Squash(Augment):
    """Resizes the whole test image to `eval_size`, whatever its aspect ratio.

    For tasks in which objects at the border of the image count, too.
    """

    def _check_resize(self) -> None:
        """Nothing is cropped."""

    def _evaluation_grids(self, size: Int[Array, "2"]) -> tuple[AxisGrid, AxisGrid]:
        height, width = self.eval_size
        return ((0, 0, size[0], height), (0, 0, size[1], width))


def _per_channel(values: tuple[float, ...], ndim: int) -> Float[Array, "... C"]:
    """Constants of the channels, to be broadcast against an array of `ndim` axes."""
    shape = [1] * ndim
    shape[-1] = -1
    return jnp.asarray(values, jnp.float32).reshape(shape)
