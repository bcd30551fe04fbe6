"""RandAugment on the device: timm's `rand-m9-mstd0.5-inc1`, in pure JAX on levels 0 .. 255.

Fifteen operations, each with Pillow's arithmetic, within one level. Under `vmap` a choice between them computes them
all, so they are put together from three families, each of which costs the same for any of its members:

  a table of 256 levels per channel     AutoContrast Equalize Invert Posterize Solarize SolarizeAdd
  a blend with a duller image           Color Contrast Brightness Sharpness
  an affine map of the plane            Rotate ShearX ShearY TranslateX TranslateY

Letters: H W height and width, C channels (1 or 3). Sources: Cubuk et al. (2020); timm `auto_augment.py`; Pillow
`ImageOps`, `ImageEnhance`, `Geometry.c`.
"""

import math

import jax
import jax.numpy as jnp

TABLES = ("AutoContrast", "Equalize", "Invert", "Posterize", "Solarize", "SolarizeAdd")
BLENDS = ("Color", "Contrast", "Brightness", "Sharpness")
MAPS = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
OPERATIONS = TABLES + BLENDS + MAPS
PROBABILITY = 0.5  # with which a drawn operation is done


def tables(x, magnitude):
    """The TABLES of an image [H, W, C] of whole levels, float32: [6, 256, C]."""
    channels, levels = x.shape[-1], jnp.arange(256)
    flat = x.reshape(-1, channels).astype(jnp.int32)
    count = jax.vmap(lambda column: jnp.bincount(column, length=256), 1, 1)(flat)  # [256, C]
    grid = jnp.broadcast_to(levels[:, None], count.shape)

    low, high = flat.min(axis=0)[None], flat.max(axis=0)[None]
    stretched = jnp.clip((grid - low) * 255 // jnp.maximum(high - low, 1), 0, 255)
    autocontrast = jnp.where(high > low, stretched, grid)

    last = jnp.take_along_axis(count, high, axis=0)
    step = (len(flat) - last) // 255
    before = jnp.cumsum(count, axis=0) - count
    equal = jnp.minimum((step // 2 + before) // jnp.maximum(step, 1), 255)
    equalize = jnp.where(step > 0, equal, grid)

    bits = 4 - jnp.floor(magnitude * 0.4).astype(jnp.int32)
    threshold = 256 - jnp.floor(magnitude * 25.6).astype(jnp.int32)
    added = jnp.floor(magnitude * 11).astype(jnp.int32)
    posterize = grid >> (8 - bits) << (8 - bits)
    solarize = jnp.where(grid < threshold, grid, 255 - grid)
    brighter = jnp.where(grid < 128, jnp.minimum(grid + added, 255), grid)
    return jnp.stack([autocontrast, equalize, 255 - grid, posterize, solarize, brighter]).astype(
        jnp.float32
    )


def luminance(x):
    """[H, W, C] -> whole levels [H, W], as Pillow converts to grey."""
    if x.shape[-1] == 1:
        return x[..., 0]
    red, green, blue = jnp.moveaxis(x.astype(jnp.int32), -1, 0)
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).astype(jnp.float32)


def dull(x):
    """What the BLENDS mix an image [H, W, C] with: [4, H, W, C]: grey, mean grey, black, smooth."""
    grey = luminance(x)
    mean = jnp.floor(grey.mean() + 0.5)
    inner = 5 * x[1:-1, 1:-1] + sum(
        x[i : x.shape[0] - 2 + i, j : x.shape[1] - 2 + j]
        for i in range(3)
        for j in range(3)
        if (i, j) != (1, 1)
    )
    smooth = x.at[1:-1, 1:-1].set(
        jnp.clip(jnp.floor(inner / 13 + 0.5), 0, 255)
    )  # Pillow leaves the border
    same = lambda value: jnp.broadcast_to(value, x.shape)
    return jnp.stack([same(grey[..., None]), jnp.full(x.shape, mean), jnp.zeros(x.shape), smooth])


def blend(dulled, x, factor):
    """dulled + factor (x - dulled), cut to 0 .. 255 and down to whole levels."""
    return jnp.floor(jnp.clip(dulled + factor * (x - dulled), 0, 255))


def matrices(size, magnitude, sign):
    """The MAPS as 2 x 3 matrices from places (column, row) in the result to those in the image: [5, 2, 3]."""
    height, width = size
    angle = -math.pi / 180 * 3 * magnitude * sign  # up to 30 degrees
    shear, shift = 0.03 * magnitude * sign, 0.045 * magnitude * sign
    cos, sin, one, zero = jnp.cos(angle), jnp.sin(angle), jnp.float32(1), jnp.float32(0)
    x, y = width / 2, height / 2
    rows = [
        [cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y],
        [one, shear, zero, zero, one, zero],
        [one, zero, zero, shear, one, zero],
        [one, zero, shift * width, zero, one, zero],
        [one, zero, zero, zero, one, shift * height],
    ]
    return jnp.array(rows).reshape(-1, 2, 3)


def affine(x, matrix, fill):
    """Resample an image [H, W, C] by an affine map with Pillow's bicubic (a = -1); fill [C] where it has no pixel."""
    height, width, _ = x.shape
    columns, rows = jnp.meshgrid(jnp.arange(width) + 0.5, jnp.arange(height) + 0.5)
    at_x, at_y = (row[0] * columns + row[1] * rows + row[2] for row in matrix)
    inside = (at_x >= 0) & (at_x < width) & (at_y >= 0) & (at_y < height)
    first_x, first_y = (jnp.floor(at - 0.5) for at in (at_x, at_y))
    taps_x, taps_y = _cubic(at_x - 0.5 - first_x), _cubic(at_y - 0.5 - first_y)
    clipped = lambda first, i, size: jnp.clip(first.astype(jnp.int32) + i - 1, 0, size - 1)
    total = 0
    for j in range(4):
        row = clipped(first_y, j, height)
        line = sum(taps_x[i][..., None] * x[row, clipped(first_x, i, width)] for i in range(4))
        total += taps_y[j][..., None] * line
    # Whole levels downwards; what is whole but for float32's rounding stays so.
    result = jnp.floor(jnp.clip(total + 1e-3, 0, 255))
    return jnp.where(inside[..., None], result, fill[None, None])


def _cubic(d):
    """Weights of the four neighbours at -1, 0, 1, 2 for a place 0 <= d < 1 behind the second."""
    return [
        ((2 - d) * d - 1) * d,
        (d - 2) * d * d + 1,
        ((1 - d) * d + 1) * d,
        (d - 1) * d * d,
    ]


def apply(operation, x, magnitude, sign, fill):
    """One operation.

    Args:
      operation: number in OPERATIONS. x: float32 [H, W, C], whole levels. magnitude: 0 .. 10, never decreasing the
        effect. sign: 1 or -1, its direction where there are two. fill: [C], the colour outside of the image.
    """
    family = jnp.where(
        operation < len(TABLES), 0, jnp.where(operation < len(TABLES) + len(BLENDS), 1, 2)
    )
    member = lambda start, count: jnp.clip(operation - start, 0, count - 1)
    table = tables(x, magnitude)[member(0, len(TABLES))]
    looked_up = jnp.take_along_axis(
        table, x.reshape(-1, x.shape[-1]).astype(jnp.int32), axis=0
    ).reshape(x.shape)
    factor = jnp.maximum(0.1, 1 + 0.09 * magnitude * sign)
    blended = blend(dull(x)[member(len(TABLES), len(BLENDS))], x, factor)
    matrix = matrices(x.shape[:2], magnitude, sign)[member(len(TABLES) + len(BLENDS), len(MAPS))]
    return jnp.where(
        family == 0, looked_up, jnp.where(family == 1, blended, affine(x, matrix, fill))
    )


def randaugment(key, x, fill, layers, magnitude, deviation):
    """`layers` operations drawn with replacement, each done with probability one half.

    Args:
      x: float32 [H, W, C], whole levels. fill: [C]. magnitude: 0 .. 10, mean of the strength. deviation: of it, normal.
    """
    for layer_key in jax.random.split(key, layers):
        which, whether, strength, direction = jax.random.split(layer_key, 4)
        operation = jax.random.randint(which, (), 0, len(OPERATIONS))
        level = jnp.clip(magnitude + deviation * jax.random.normal(strength), 0, 10)
        sign = jnp.where(jax.random.bernoulli(direction), 1.0, -1.0)
        done = apply(operation, x, level, sign, fill)
        x = jnp.where(jax.random.bernoulli(whether, PROBABILITY), done, x)
    return x
