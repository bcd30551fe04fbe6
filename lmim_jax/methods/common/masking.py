"""Which patches are seen: index samplers, one per-image key each, and gathering by index.

Letters: B batch, N patches, V visible, M masked, D width, h w grid rows and columns.
Index arrays have static lengths, so that every program compiles once.
"""

import dataclasses
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
        raise ValueError(
            f"a checkerboard of {cell} x {cell} patches needs mask_ratio 0.5 and a grid it halves: {grid}"
        )
    halves = jnp.asarray(np.stack([np.flatnonzero(black == 0), np.flatnonzero(black)]), jnp.int32)
    swapped = jax.random.bernoulli(key).astype(jnp.int32)
    return halves[swapped], halves[1 - swapped]


SPLITS = {  # (key, grid, mask_ratio) -> (visible [V], masked [M])
    "random": _by_ratio,
    "checkerboard": checkerboard_split,
    "checkerboard2": functools.partial(checkerboard_split, cell=2),
}


@dataclasses.dataclass(frozen=True)
class Multiblock:
    """I-JEPA's masks: a few target blocks, and one context block without what the targets cover.

    Index arrays are padded to static lengths, with a mask each.

    Args:
      grid: (h, w). blocks: targets per image. scale, aspect: ranges of a target's area (share of N) and height / width.
      context_scale: range of the context block's area; it is square.
      capacity: K, length of the context array; what a context has beyond it is cut.
      min_context: a context of no more patches than this is drawn again, 20 times, then with one target ignored, ...
      biased: as the released sampler: one draw u sets both scale and aspect, and block sizes are shared by the batch;
        the last row and column are never drawn; contexts are cut, in raster order, to the shortest in a group of
        `group` images. Else sizes are drawn per image, scale and aspect apart; blocks lie anywhere; contexts beyond the
        capacity are cut at random.
      group: images in such a group. The others are drawn for the purpose, instead of being those of the batch: so the
        masks of an image are the same on any number of devices, and as likely as in the official groups.

    Source: I-JEPA (Assran et al., CVPR 2023), section 3; official `src/masks/multiblock.py`.
    """

    grid: tuple[int, int]
    blocks: int
    scale: tuple[float, float]
    aspect: tuple[float, float]
    context_scale: tuple[float, float]
    capacity: int
    min_context: int
    group: int
    biased: bool

    def __call__(self, rng, keys):
        """Masks of a batch: visible [B, K] (the context) and targets [B, blocks, T] int32, with a mask of each."""
        size_key, group_key = jax.random.split(rng)
        keep = self.capacity
        if self.biased:
            size_keys = jnp.broadcast_to(size_key, keys.shape)
            _, others = jax.vmap(self._draw, (None, 0))(
                size_key, jax.random.split(group_key, self.group - 1)
            )
            keep = others.sum(axis=1).min(initial=keep)
        else:
            size_keys = jax.vmap(lambda key: jax.random.fold_in(key, 0))(keys)
        targets, context = jax.vmap(self._draw)(size_keys, keys)
        order = jnp.zeros(context.shape)
        if not self.biased:
            order = jax.vmap(
                lambda key: jax.random.uniform(jax.random.fold_in(key, 1), context.shape[1:])
            )(keys)
        order = jnp.argsort(jnp.where(context, order, 2), axis=1, stable=True)[
            :, : self.capacity
        ].astype(jnp.int32)
        context_mask = (
            jnp.arange(order.shape[1])[None] < jnp.minimum(keep, context.sum(axis=1))[:, None]
        )
        longest = int(self._sizes(self.scale, self.aspect).prod(axis=1).max())
        index = jnp.argsort(~targets, axis=2, stable=True)[:, :, :longest].astype(jnp.int32)
        target_mask = jnp.arange(longest)[None, None] < targets.sum(axis=2)[:, :, None]
        return {
            "visible": order,
            "visible_mask": context_mask,
            "targets": index,
            "target_mask": target_mask,
        }

    def _sizes(self, scale, aspect):
        """Table [4096, 2] of equally likely (height, width)."""
        n = 4096 if self.biased else 64
        u = (np.arange(n) + 0.5) / n
        u, v = (u, u) if self.biased else (np.repeat(u, n), np.tile(u, n))
        area = np.floor(math.prod(self.grid) * (scale[0] + u * (scale[1] - scale[0])))
        ratio = aspect[0] + v * (aspect[1] - aspect[0])
        sizes = np.round(np.sqrt(np.stack([area * ratio, area / ratio], axis=1)))
        return np.clip(sizes, 1, np.array(self.grid) - self.biased).astype(np.int32)

    def _block(self, key, size):
        """Bool [N]: a block of that size somewhere."""
        inside = []
        for key_of_axis, length, cells in zip(jax.random.split(key), size, self.grid, strict=True):
            start = jax.random.randint(key_of_axis, (), 0, cells - length + (not self.biased))
            places = jnp.arange(cells)
            inside.append((places >= start) & (places < start + length))
        return (inside[0][:, None] & inside[1][None]).ravel()

    def _draw(self, size_key, key):
        """Bool targets [blocks, N] and context [N] of one image; its sizes are drawn from `size_key`."""
        tables = self._sizes(self.scale, self.aspect), self._sizes(self.context_scale, (1.0, 1.0))
        draws = [
            jax.random.randint(k, (), 0, len(t))
            for k, t in zip(jax.random.split(size_key), tables, strict=True)
        ]
        of_target, of_context = (
            jnp.asarray(table)[draw] for table, draw in zip(tables, draws, strict=True)
        )
        target_key, context_key = jax.random.split(key)
        targets = jax.vmap(self._block, (0, None))(
            jax.random.split(target_key, self.blocks), of_target
        )
        tries = jax.vmap(self._block, (0, None))(jax.random.split(context_key, 20), of_context)
        # Free of all targets; if that is too little in all tries, of all but the last, of all but the last two, ...
        covered = jnp.cumsum(targets, axis=0) > 0
        covered = jnp.concatenate([covered[::-1], jnp.zeros_like(covered[:1])])  # [blocks + 1, N]
        contexts = (tries[None] & ~covered[:, None]).reshape(-1, tries.shape[-1])
        enough = contexts.sum(axis=1) > self.min_context
        return targets, contexts[
            jnp.where(enough.any(), enough.argmax(), contexts.sum(axis=1).argmax())
        ]


PROPOSALS, ROUNDS = (
    16,
    1000,
)  # blocks tried at a time, and rounds at most; 120 of 196 patches take about 10 rounds


def block_mask(key, grid, total, smallest, largest, aspect):
    """Mask exactly `total` patches of one image with blocks: bool [h, w], True = masked.

    Until they are masked: a block of an area uniform on [smallest, min(largest, patches missing)] and a height / width
    log-uniform on [aspect, 1 / aspect], at a uniform place, is taken if it is lower and narrower than the grid and
    masks a patch or more that is not masked yet, but no more than are missing, nor more than `largest`. Sizes of which
    no block can be taken end it after ROUNDS rounds, with fewer masked.

    Args:
      grid: (h, w). total: patches to mask. smallest, largest: areas in patches, floats or ints. aspect: in (0, 1].

    Source: BEiT (arXiv 2106.08254), algorithm 1; BootMAE's `masking_generator.py`.
    """
    h, w = grid

    def propose(key, limit):
        """Rows [K, h] and columns [K, w] of K blocks, True inside, and whether they are small enough, [K]."""
        keys = jax.random.split(key, 4)
        low, high = (
            jnp.minimum(smallest, limit),
            jnp.maximum(smallest, limit),
        )  # where less than `smallest` is missing
        area = jax.random.uniform(keys[0], (PROPOSALS,), minval=low, maxval=high)
        stretch = aspect ** jax.random.uniform(keys[1], (PROPOSALS,), minval=-1.0, maxval=1.0)
        height, width = (
            jnp.round(jnp.sqrt(x)).astype(jnp.int32) for x in (area * stretch, area / stretch)
        )

        def inside(key, size, cells):
            start = jax.random.randint(key, (PROPOSALS,), 0, jnp.maximum(cells - size + 1, 1))[
                :, None
            ]
            at = jnp.arange(cells)[None]
            return (at >= start) & (at < start + size[:, None])

        return inside(keys[2], height, h), inside(keys[3], width, w), (height < h) & (width < w)

    def add(state):
        turn, mask = state
        limit = jnp.minimum(total - mask.sum(), largest)
        rows, columns, fits = propose(jax.random.fold_in(key, turn), limit)
        new = jnp.sum(rows[:, :, None] & columns[:, None] & ~mask[None], axis=(1, 2))
        taken = fits & (new > 0) & (new <= limit)
        first = jnp.argmax(taken)
        return turn + 1, mask | (rows[first][:, None] & columns[first][None] & taken[first])

    missing = lambda state: (state[0] < ROUNDS) & (state[1].sum() < total)
    return jax.lax.while_loop(missing, add, (0, jnp.zeros(grid, bool)))[1]


def block_split(key, mask, num_visible, exposed):
    """Split the patches of one image: what a mask covers is masked, but for `exposed` patches, and others at random.

    Args:
      mask: bool [h, w], as from `block_mask`, with at most M = h w - num_visible masked.
      exposed: scalar int, so many patches of the blocks are visible all the same.

    Returns:
      (visible [V], masked [M]) int32, each in random order; together a permutation of range(h w).

    Source: BootMAE's `mask_to_index`, where `exposed` is a roll of the order of patches by 0 .. 3, one for the batch.
    """
    order = jnp.argsort(mask.ravel() + jax.random.uniform(key, (mask.size,))).astype(jnp.int32)
    order = jnp.roll(order, exposed)
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
