"""Which patches are seen: index samplers, one per-image key each, and gathering by index.

Letters: B batch, N patches, V visible, M masked, D width.
Index arrays have static lengths, so that every program compiles once.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np


def random_split(key, num_patches, num_visible):
    """Split the patches of one image at random: (visible [V], masked [M]) int32, each in random order.

    Together they are a permutation of range(num_patches).
    """
    order = jax.random.permutation(key, num_patches).astype(jnp.int32)
    return order[:num_visible], order[num_visible:]


def _by_ratio(key, grid, mask_ratio):
    """`random_split` with floor(N (1 - mask_ratio)) visible patches, as in MAE and PiLaMIM."""
    num_patches = math.prod(grid)
    return random_split(key, num_patches, int(num_patches * (1 - mask_ratio)))


def checkerboard_split(key, grid, mask_ratio, cell=1):
    """Visible and masked patches as the squares of a chess board, whose colours are swapped at random.

    Args:
      cell: side of a square in patches. mask_ratio: 0.5, the only one there is.

    Raises:
      ValueError: the squares of both colours do not hold as many patches, or mask_ratio is not 0.5.

    Source: SymMIM (Nguyen and Park, ICPR 2024): (floor(i / cell) + floor(j / cell)) mod 2, cell 1 for the online
    encoder and a larger one for its momentum encoder. The swap is ours: so no patch is visible in every step.
    """
    rows, columns = np.arange(grid[0]) // cell, np.arange(grid[1]) // cell
    black = ((rows[:, None] + columns[None]) % 2).ravel()
    if mask_ratio != 0.5 or 2 * black.sum() != black.size:
        raise ValueError(f"a checkerboard of {cell} x {cell} patches needs mask_ratio 0.5 and a grid it halves: {grid}")
    halves = jnp.asarray(np.stack([np.flatnonzero(black == 0), np.flatnonzero(black)]), jnp.int32)
    swapped = jax.random.bernoulli(key).astype(jnp.int32)
    return halves[swapped], halves[1 - swapped]


SPLITS = {  # (key, grid, mask_ratio) -> (visible [V], masked [M])
    "random": _by_ratio,
    "checkerboard": checkerboard_split,
    "checkerboard2": functools.partial(checkerboard_split, cell=2),
}


def window_offsets(key, grid, gap):
    """Offset of the window in each cell of one image, [h, w, 2] int32, uniform on {0 .. gap - 1} per axis.

    The bound is exclusive, as in the official code: an offset of `gap` never occurs.
    """
    return jax.random.randint(key, (*grid, 2), 0, max(gap, 1), jnp.int32)


def take(x, index):
    """Rows of each image by index: [B, N, D] (or [1, N, D], shared by the batch), [B, M] -> [B, M, D]."""
    if len(x) == 1:
        return jnp.take(x[0], index, axis=0)
    return jnp.take_along_axis(x, index[..., None], axis=1)
