"""RandAugment on the device: timm's `rand-m9-mstd0.5-inc1`, in pure JAX on levels 0 .. 255.

Fifteen operations with Pillow's arithmetic, within one level. Under `vmap`, a choice between them
computes all of them, so they are put together from three families, each of which costs the same for
any of its members:

  a lookup table of 256 levels per channel   AutoContrast Equalize Invert Posterize Solarize
  SolarizeAdd a blend with a degraded image              Color Contrast Brightness Sharpness an
  affine map of the plane                 Rotate ShearX ShearY TranslateX TranslateY

Letters: H W height and width, C channels. Sources: Cubuk et al. (2020); timm
`auto_augment.py`; Pillow `ImageOps`, `ImageEnhance`, `Geometry.c`.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

TABLES = ("AutoContrast", "Equalize", "Invert", "Posterize", "Solarize", "SolarizeAdd")
BLENDS = ("Color", "Contrast", "Brightness", "Sharpness")
MAPS = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
OPERATIONS = TABLES + BLENDS + MAPS
FIRST_BLEND = len(TABLES)
FIRST_MAP = len(TABLES) + len(BLENDS)
PROBABILITY = 0.5  # that a drawn operation is applied

Scalar = Float[Array, ""] | float


def lookup_tables(x: Float[Array, "H W C"], magnitude: Scalar) -> Float[Array, "6 256 C"]:
    """The new levels of all TABLES for an image of whole levels."""
    pixels = x.reshape(-1, x.shape[-1]).astype(jnp.int32)
    counts = jax.vmap(_histogram, in_axes=1, out_axes=1)(pixels)
    levels = jnp.broadcast_to(jnp.arange(256)[:, None], counts.shape)
    low = pixels.min(axis=0)[None]
    high = pixels.max(axis=0)[None]

    stretched = jnp.clip((levels - low) * 255 // jnp.maximum(high - low, 1), 0, 255)
    autocontrast = jnp.where(high > low, stretched, levels)

    last = jnp.take_along_axis(counts, high, axis=0)
    step = (len(pixels) - last) // 255
    before = jnp.cumsum(counts, axis=0) - counts
    equal = jnp.minimum((step // 2 + before) // jnp.maximum(step, 1), 255)
    equalize = jnp.where(step > 0, equal, levels)

    bits = 4 - jnp.floor(magnitude * 0.4).astype(jnp.int32)
    posterize = levels >> (8 - bits) << (8 - bits)

    threshold = 256 - jnp.floor(magnitude * 25.6).astype(jnp.int32)
    solarize = jnp.where(levels < threshold, levels, 255 - levels)

    added = jnp.floor(magnitude * 11).astype(jnp.int32)
    solarize_add = jnp.where(levels < 128, jnp.minimum(levels + added, 255), levels)

    tables = jnp.stack([autocontrast, equalize, 255 - levels, posterize, solarize, solarize_add])
    return tables.astype(jnp.float32)


def _histogram(levels: Int[Array, " n"]) -> Int[Array, "256"]:
    """How often each level occurs."""
    return jnp.bincount(levels, length=256)


def luminance(x: Float[Array, "H W C"]) -> Float[Array, "H W"]:
    """The image in gray, in whole levels, as Pillow converts RGB; the mean of other bands."""
    if x.shape[-1] == 1:
        return x[..., 0]
    if x.shape[-1] != 3:
        return jnp.round(x.mean(axis=-1))
    red, green, blue = jnp.moveaxis(x.astype(jnp.int32), -1, 0)
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).astype(jnp.float32)


def degraded_images(x: Float[Array, "H W C"]) -> Float[Array, "4 H W C"]:
    """The images that the BLENDS mix an image with: gray, its mean gray, black, smoothed."""
    gray = luminance(x)
    mean = jnp.floor(gray.mean() + 0.5)
    return jnp.stack(
        [
            jnp.broadcast_to(gray[..., None], x.shape),
            jnp.full(x.shape, mean),
            jnp.zeros(x.shape),
            _smooth(x),
        ]
    )


def _smooth(x: Float[Array, "H W C"]) -> Float[Array, "H W C"]:
    """Pillow's filter SMOOTH: weights 5 in the center and 1 around it, over 13."""
    height, width, _ = x.shape
    neighbors = jnp.zeros((height - 2, width - 2, x.shape[-1]))
    for row in range(3):
        for column in range(3):
            if (row, column) != (1, 1):
                shifted = x[row : height - 2 + row, column : width - 2 + column]
                neighbors = neighbors + shifted
    total = 5 * x[1:-1, 1:-1] + neighbors
    inner = jnp.clip(jnp.floor(total / 13 + 0.5), 0, 255)
    return x.at[1:-1, 1:-1].set(inner)  # Pillow leaves the border as it is


def blend(
    degraded: Float[Array, "H W C"], x: Float[Array, "H W C"], factor: Scalar
) -> Float[Array, "H W C"]:
    """degraded + factor (x - degraded), clipped to 0 .. 255 and rounded down to whole levels."""
    return jnp.floor(jnp.clip(degraded + factor * (x - degraded), 0, 255))


def affine_matrices(
    size: tuple[int, int], magnitude: Scalar, sign: Scalar
) -> Float[Array, "5 2 3"]:
    """The MAPS as matrices from (column, row, 1) in the result to (column, row) in the image."""
    height, width = size
    angle = -math.pi / 180 * 3 * magnitude * sign  # up to 30 degrees
    shear = 0.03 * magnitude * sign
    shift = 0.045 * magnitude * sign
    cos = jnp.cos(angle)
    sin = jnp.sin(angle)
    one = jnp.float32(1)
    zero = jnp.float32(0)
    x = width / 2
    y = height / 2
    rows = [
        [cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y],
        [one, shear, zero, zero, one, zero],
        [one, zero, zero, shear, one, zero],
        [one, zero, shift * width, zero, one, zero],
        [one, zero, zero, zero, one, shift * height],
    ]
    return jnp.array(rows).reshape(-1, 2, 3)


def affine(
    x: Float[Array, "H W C"], matrix: Float[Array, "2 3"], fill: Float[Array, " C"]
) -> Float[Array, "H W C"]:
    """Resample an image by an affine map with Pillow's bicubic (a = -1); `fill` outside of it."""
    height, width, _ = x.shape
    columns, rows = jnp.meshgrid(jnp.arange(width) + 0.5, jnp.arange(height) + 0.5)
    at_x = matrix[0, 0] * columns + matrix[0, 1] * rows + matrix[0, 2]
    at_y = matrix[1, 0] * columns + matrix[1, 1] * rows + matrix[1, 2]
    inside = (at_x >= 0) & (at_x < width) & (at_y >= 0) & (at_y < height)
    first_x = jnp.floor(at_x - 0.5)
    first_y = jnp.floor(at_y - 0.5)
    weights_x = _cubic_weights(at_x - 0.5 - first_x)
    weights_y = _cubic_weights(at_y - 0.5 - first_y)
    total = jnp.zeros(x.shape)
    for j in range(4):
        row = _tap_index(first_y, j, height)
        line = jnp.zeros(x.shape)
        for i in range(4):
            column = _tap_index(first_x, i, width)
            line = line + weights_x[i][..., None] * x[row, column]
        total = total + weights_y[j][..., None] * line
    # Rounded down to whole levels, except for what is whole but for float32's rounding
    result = jnp.floor(jnp.clip(total + 1e-3, 0, 255))
    return jnp.where(inside[..., None], result, fill[None, None])


def _tap_index(first: Float[Array, "H W"], tap: int, size: int) -> Int[Array, "H W"]:
    """The index of neighbor `tap` of 4 along an axis, clipped at the border of the image."""
    return jnp.clip(first.astype(jnp.int32) + tap - 1, 0, size - 1)


def _cubic_weights(d: Float[Array, "H W"]) -> list[Float[Array, "H W"]]:
    """Weights of the neighbors at -1, 0, 1, 2 for a position 0 <= d < 1 after the second."""
    return [
        ((2 - d) * d - 1) * d,
        (d - 2) * d * d + 1,
        ((1 - d) * d + 1) * d,
        (d - 1) * d * d,
    ]


def apply_operation(
    operation: Int[Array, ""] | int,
    x: Float[Array, "H W C"],
    magnitude: Scalar,
    sign: Scalar,
    fill: Float[Array, " C"],
) -> Float[Array, "H W C"]:
    """Apply one operation.

    Args:
      operation: index into OPERATIONS.
      x: float32, whole levels.
      magnitude: 0 .. 10; the effect never decreases with it.
      sign: 1 or -1, the direction of operations that have two.
      fill: the color outside of the image.
    """
    table = lookup_tables(x, magnitude)[_member(operation, 0, len(TABLES))]
    pixels = x.reshape(-1, x.shape[-1]).astype(jnp.int32)
    looked_up = jnp.take_along_axis(table, pixels, axis=0).reshape(x.shape)

    factor = jnp.maximum(0.1, 1 + 0.09 * magnitude * sign)
    degraded = degraded_images(x)[_member(operation, FIRST_BLEND, len(BLENDS))]
    blended = blend(degraded, x, factor)

    matrices = affine_matrices(x.shape[:2], magnitude, sign)
    matrix = matrices[_member(operation, FIRST_MAP, len(MAPS))]
    mapped = affine(x, matrix, fill)

    blended_or_mapped = jnp.where(operation < FIRST_MAP, blended, mapped)
    return jnp.where(operation < FIRST_BLEND, looked_up, blended_or_mapped)


def _member(operation: Int[Array, ""] | int, first: int, count: int) -> Int[Array, ""]:
    """The index of an operation in a family of `count` that starts at `first`, or any other."""
    return jnp.clip(operation - first, 0, count - 1)


def randaugment(
    key: Array,
    x: Float[Array, "H W C"],
    fill: Float[Array, " C"],
    layers: int,
    magnitude: float,
    deviation: float,
) -> Float[Array, "H W C"]:
    """Apply `layers` operations, drawn with replacement, each with probability one half.

    Args:
      key: random key.
      x: float32, whole levels 0 .. 255.
      fill: the color outside of the image.
      layers: number of operations.
      magnitude: 0 .. 10, mean of the normally distributed strength.
      deviation: standard deviation of the strength.
    """
    for layer_key in jax.random.split(key, layers):
        operation_key, apply_key, strength_key, sign_key = jax.random.split(layer_key, 4)
        operation = jax.random.randint(operation_key, (), 0, len(OPERATIONS))
        strength = magnitude + deviation * jax.random.normal(strength_key)
        strength = jnp.clip(strength, 0, 10)
        sign = jnp.where(jax.random.bernoulli(sign_key), 1.0, -1.0)
        changed = apply_operation(operation, x, strength, sign, fill)
        x = jnp.where(jax.random.bernoulli(apply_key, PROBABILITY), changed, x)
    return x
