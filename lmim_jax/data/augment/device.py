"""Image augmentation on the device: crop, antialiased resize, flip, normalise, as pure JAX on uint8 canvases.

The host only decodes. An image lies at the top left of a fixed canvas [K, K, C] uint8 with its true size; a crop is
resized by two matrix products, columns then rows, equal to Pillow's antialiased resize within 1 level.

Letters: B batch, K canvas side, C channels, S output side.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from lmim_jax.utils.errors import UserError

TABLE_BITS = 12
PRECISION = jax.lax.Precision.HIGH  # pixel values need more than bfloat16's 8 bits


def bicubic(x):
    """Keys' cubic convolution kernel with a = -0.5, Pillow's BICUBIC; support 2."""
    x = jnp.abs(x)
    inner = (1.5 * x - 2.5) * x * x + 1
    outer = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return jnp.where(x < 1, inner, jnp.where(x < 2, outer, 0.0))


def bilinear(x):
    """Triangle kernel, Pillow's BILINEAR; support 1."""
    return jnp.maximum(1 - jnp.abs(x), 0.0)


KERNELS = {"bicubic": bicubic, "bilinear": bilinear}


def resize_weights(grid, low, high, canvas, size, kernel):
    """The matrix [S, K] that resamples an axis of the canvas.

    Where the axis is shrunk the kernel is widened by the scale (antialiasing); weights outside [low, high), the samples
    that may be read, are 0, and each row sums to 1, as in Pillow.

    Args:
      grid: int32 (start, first, numerator, denominator): output i lies at start + (first + i + 1/2) numerator /
        denominator. Distances are divided once, as whole numbers: float32 positions would be off by 3e-5 of a pixel.
      low, high: valid range: the box itself when the image is cropped first (training), the image otherwise.
      canvas: K. size: S. kernel: function of the distance in source samples.
    """
    start, first, numerator, denominator = grid
    samples = jnp.arange(canvas)
    sources = (2 * samples - 2 * start + 1) * denominator
    targets = (2 * (first + jnp.arange(size)) + 1) * numerator
    weights = kernel(
        (sources[None, :] - targets[:, None]) / (2 * jnp.maximum(numerator, denominator))
    )
    weights = jnp.where((samples >= low) & (samples < high), weights, 0.0)
    return weights / weights.sum(axis=1, keepdims=True)


def resample(image, grids, valid, size, kernel):
    """Resample the rows and columns of one canvas, rounded to whole levels after each axis, as Pillow does.

    Args:
      image: [K, K, C] uint8. grids: of rows and columns, see `resize_weights`. valid: (top, left, bottom, right), what
      may be read. size: (S, S'), rows and columns. kernel: a value of KERNELS.

    Returns:
      float32 [S, S', C] of whole numbers in 0 .. 255.
    """
    canvas = image.shape[0]
    rows = resize_weights(grids[0], valid[0], valid[2], canvas, size[0], kernel)
    columns = resize_weights(grids[1], valid[1], valid[3], canvas, size[1], kernel)
    level = lambda x: jnp.clip(jnp.floor(x + 0.5), 0, 255)
    x = level(jnp.einsum("sj,ijc->isc", columns, image.astype(jnp.float32), precision=PRECISION))
    return level(jnp.einsum("ti,isc->tsc", rows, x, precision=PRECISION))


def crop_resize(image, box, size, kernel):
    """Crop a box (top, left, height, width), int32, out of one canvas and resize it; see `resample`."""
    top, left, height, width = box
    grids = (top, 0, height, size[0]), (left, 0, width, size[1])
    return resample(image, grids, (top, left, top + height, left + width), size, kernel)


def draw_crop(key, scale, ratio):
    """The random part of a random-resized crop, as torchvision's `RandomResizedCrop` draws it: ten tries and a place.

    A try has an area share uniform on `scale` and an aspect log-uniform on `ratio`. All numbers are looked up in tables
    (of 4096 values) or made of random bits, so that every backend draws the same to the bit.

    Returns:
      {"sides": float32 [2, 10], heights and widths over the square root of the image's area; "place": float32 [2]}.
    """
    middles = (np.arange(1 << TABLE_BITS) + 0.5) / (1 << TABLE_BITS)
    shares = np.sqrt(scale[0] + (scale[1] - scale[0]) * middles)
    aspects = np.sqrt(ratio[0] * (ratio[1] / ratio[0]) ** middles)
    share_key, aspect_key, place_key = jax.random.split(key, 3)
    index = lambda key: jax.random.bits(key, (10,), "uint32") >> (32 - TABLE_BITS)
    share, aspect = jnp.asarray(shares, jnp.float32)[index(share_key)], index(aspect_key)
    heights, widths = (
        share * jnp.asarray(table, jnp.float32)[aspect] for table in (1 / aspects, aspects)
    )
    return {"sides": jnp.stack([heights, widths]), "place": jax.random.uniform(place_key, (2,))}


def fit_crop(draw, size, longest, ratio, xp=jnp):
    """The crop box (top, left, height, width) that a draw gives in an image, int32 [4].

    The first of the tries that fits; if none does, the centre with the nearest allowed aspect. Only whole numbers,
    looked-up square roots and single float32 products: numpy (`xp=np`) and every backend get the same box.

    Args:
      draw: of `draw_crop`. size: int32 [2], (height, width). longest: no side is longer (the canvas).
    """
    root = xp.asarray(_roots(longest))[size]
    sides = xp.rint(draw["sides"] * (root[0] * root[1])).astype(np.int32)
    fits = ((sides > 0) & (sides <= size[:, None])).all(0)
    crop = sides[:, xp.argmax(fits)]
    corner = xp.floor(draw["place"] * (size - crop + 1).astype(np.float32)).astype(np.int32)
    limits = xp.rint(size[::-1] * np.array([1 / ratio[0], ratio[1]], np.float32)).astype(np.int32)
    center = xp.minimum(size, limits)
    found = xp.concatenate([xp.minimum(corner, size - crop), crop])
    return xp.where(fits.any(), found, xp.concatenate([(size - center) // 2, center]))


@functools.cache
def _roots(longest):
    """Square roots of 0 .. longest, float32."""
    return np.sqrt(np.arange(longest + 1)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Augment:
    """The fields are `config.augment`. Called on a batch it gives training images, `evaluation` gives test images."""

    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: bool
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: tuple[int, int]
    eval_resize: int
    eval_size: tuple[int, int]

    def __post_init__(self):
        if self.interpolation not in KERNELS:
            raise UserError(
                f"config.augment.interpolation={self.interpolation!r} is none of: {' | '.join(KERNELS)}"
            )

    def _constants(self, images):
        shape = (1,) * (images.ndim - 1) + (-1,)
        return (jnp.asarray(x, jnp.float32).reshape(shape) for x in (self.mean, self.std))

    def normalize(self, images):
        """Levels 0 .. 255 [..., C] -> (x / 255 - mean) / std, float32."""
        mean, std = self._constants(images)
        return (images / 255 - mean) / std

    def levels(self, images):
        """The inverse of `normalize`: whole levels 0 .. 255, float32."""
        mean, std = self._constants(images)
        return jnp.round((images * std + mean) * 255)

    def draw(self, key):
        """All random numbers of one image: those of `draw_crop`, and "flip", a bool."""
        crop_key, flip_key = jax.random.split(key)
        flip = jax.random.bernoulli(flip_key) & self.flip
        return {**draw_crop(crop_key, self.scale, self.ratio), "flip": flip}

    def __call__(self, keys, batch):
        """Random-resized crop, flip, normalise.

        Args:
          keys: [B], one key per image.
          batch: image [B, K, K, C] uint8, size [B, 2] int32 (height, width); or crops without "size", which are only
            normalised.

        Returns:
          float32 [B, *image_size, C].
        """
        kernel = KERNELS[self.interpolation]

        def one(key, image, size):
            draw = self.draw(key)
            box = fit_crop(draw, size, image.shape[0], self.ratio)
            x = crop_resize(image, box, self.image_size, kernel)
            return jnp.where(draw["flip"], x[:, ::-1], x)

        if "size" not in batch:  # cropped on the host
            return self.normalize(batch["image"])
        return self.normalize(jax.vmap(one)(keys, batch["image"], batch["size"]))

    def evaluation(self, batch):
        """Short side to `eval_resize`, centre crop of `eval_size`, normalise: float32 [B, *eval_size, C].

        The resize may read the whole image, so it equals resizing first and cropping afterwards.
        """
        kernel = KERNELS[self.interpolation]

        def one(image, size):
            # torchvision: the long side is int(resize * long / short); centre crop offsets round half to even.
            resized = self.eval_resize * size // jnp.min(size)
            first = jnp.round((resized - jnp.asarray(self.eval_size)) / 2).astype(jnp.int32)
            grids = [(0, first[axis], size[axis], resized[axis]) for axis in (0, 1)]
            return resample(image, grids, (0, 0, size[0], size[1]), self.eval_size, kernel)

        return self.normalize(jax.vmap(one)(batch["image"], batch["size"]))


@dataclasses.dataclass(frozen=True)
class Squash(Augment):
    """At evaluation the whole image, whatever its aspect, as where objects at the border count, too."""

    def evaluation(self, batch):
        """Resized to `eval_size` and normalised: float32 [B, *eval_size, C]."""
        kernel = KERNELS[self.interpolation]

        def one(image, size):
            grids = [(0, 0, size[axis], self.eval_size[axis]) for axis in (0, 1)]
            return resample(image, grids, (0, 0, size[0], size[1]), self.eval_size, kernel)

        return self.normalize(jax.vmap(one)(batch["image"], batch["size"]))


def from_config(config, *, image_size, eval_size):
    """Build the augmentation from `config.augment`; sizes come from the method."""
    return Augment(**config, image_size=tuple(image_size), eval_size=tuple(eval_size))
