"""Which patches are seen: index samplers, one per-image key each, and gathering by index.

Letters: B batch, N patches, V visible, M masked, D width.
Index arrays have static lengths, so that every program compiles once.
"""

import jax
import jax.numpy as jnp


def random_split(key, num_patches, num_visible):
    """Split the patches of one image at random: (visible [V], masked [M]) int32, each in random order.

    Together they are a permutation of range(num_patches).
    """
    order = jax.random.permutation(key, num_patches).astype(jnp.int32)
    return order[:num_visible], order[num_visible:]


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
