"""Patch masking: samplers of visible and masked patches, and gathering of patches by index.

Letters: B batch, N patches, V visible, M masked, D width, h w grid rows and columns,
K context patches (padded), T target patches of a block (padded).
Index arrays have static lengths, so that every program is compiled once.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

Split = tuple[Int[Array, " V"], Int[Array, " M"]]


def random_split(key: Key[Array, ""], num_patches: int, num_visible: int) -> Split:
    """Split the patches of one image at random.

    Args:
      key: random key of the image.
      num_patches: N.
      num_visible: V.

    Returns:
      (visible, masked), int32, each in random order; together a permutation of range(N).
    """
    order = jax.random.permutation(key, num_patches).astype(jnp.int32)
    return order[:num_visible], order[num_visible:]


def _ratio_split(key: Key[Array, ""], grid: tuple[int, int], mask_ratio: float) -> Split:
    """`random_split` with floor(N (1 - mask_ratio)) visible patches, as in MAE and PiLaMIM."""
    num_patches = math.prod(grid)
    return random_split(key, num_patches, max(int(num_patches * (1 - mask_ratio)), 1))


def checkerboard(grid: tuple[int, int], cell: int) -> Bool[np.ndarray, " N"]:
    """Mark every second cell of cell x cell patches, like the black squares of a chessboard.

    The first cell is not marked.

    Args:
      grid: (h, w).
      cell: side of a cell in patches.
    """
    rows = np.arange(grid[0]) // cell
    columns = np.arange(grid[1]) // cell
    return ((rows[:, None] + columns[None]) % 2 == 1).ravel()


def checkerboard_split(
    key: Key[Array, ""], grid: tuple[int, int], mask_ratio: float, cell: int = 1
) -> Split:
    """Split the patches of one image like the squares of a chessboard; its colors swap at random.

    Args:
      key: random key of the image.
      grid: (h, w).
      mask_ratio: must be 0.5.
      cell: side of a square in patches.

    Returns:
      (visible, masked), int32, each in raster order.

    Raises:
      ValueError: mask_ratio is not 0.5, or the two colors do not cover equally many patches.

    Source: SymMIM (Nguyen and Park, ICPR 2024): (floor(i / cell) + floor(j / cell)) mod 2, cell 1
    for the online encoder and a larger cell for its momentum encoder. The random swap is an
    addition: without it, some patches would be visible in every step and others never.
    """
    black = checkerboard(grid, cell)
    if mask_ratio != 0.5 or 2 * black.sum() != black.size:
        raise ValueError(
            f"a checkerboard of {cell} x {cell} patches needs mask_ratio 0.5 and a grid that it "
            f"halves, not {grid}"
        )
    halves = jnp.asarray(np.stack([np.flatnonzero(~black), np.flatnonzero(black)]), jnp.int32)
    swapped = jax.random.bernoulli(key).astype(jnp.int32)
    return halves[swapped], halves[1 - swapped]


# Samplers by their names in configs: (key, grid, mask_ratio) -> (visible [V], masked [M])
SAMPLERS: dict[str, Callable[..., Split]] = {
    "random": _ratio_split,
    "checkerboard": checkerboard_split,
    "checkerboard2": functools.partial(checkerboard_split, cell=2),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Multiblock:
    """I-JEPA's masks: a few target blocks, and one context block without the targets' patches.

    Attributes:
      grid: (h, w).
      blocks: target blocks per image.
      scale: range of a target's area as a share of N.
      aspect: range of a target's height / width.
      context_scale: range of the context block's area as a share of N; the block is square.
      capacity: K, length of the context array; longer contexts are truncated.
      min_context: a context of at most this many patches is drawn again, up to 20 times, then with
        one target ignored, then two, ...
      group: images in a group, see `biased`. Only the image itself belongs to the batch; the other
        members are drawn for this purpose. So the masks of an image are the same on any number of
        devices, and have the distribution of the official groups.
      biased: reproduces the released sampler. One draw u sets both scale and aspect, and block
        sizes are shared by the batch; the last row and column are never drawn; contexts are
        truncated, in raster order, to the shortest one in a group of `group` images. If false,
        sizes are drawn per image, scale and aspect independently; blocks can lie anywhere; contexts
        longer than the capacity are truncated at random.

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

    def __call__(self, rng: Key[Array, ""], keys: Key[Array, " B"]) -> dict[str, Array]:
        """Draw the masks of a batch.

        Args:
          rng: random key of the batch.
          keys: one random key per image.

        Returns:
          visible [B, K] and targets [B, blocks, T], int32 patch ids; visible_mask [B, K] and
          target_mask [B, blocks, T], bool, false where the ids are padding.
        """
        size_key, group_key = jax.random.split(rng)
        limit = self.capacity
        if self.biased:
            size_keys = jnp.broadcast_to(size_key, keys.shape)
            limit = self._shortest_of_group(size_key, group_key)
        else:
            size_keys = jax.vmap(lambda key: jax.random.fold_in(key, 0))(keys)
        targets, context = jax.vmap(self._draw)(size_keys, keys)
        priority = jnp.zeros(context.shape)
        if not self.biased:
            priority = jax.vmap(self._random_priority)(keys)
        visible, visible_mask = self._pad_context(context, priority, limit)
        index, target_mask = self._pad_targets(targets)
        return {
            "visible": visible,
            "visible_mask": visible_mask,
            "targets": index,
            "target_mask": target_mask,
        }

    def _shortest_of_group(self, size_key: Key[Array, ""], group_key: Key[Array, ""]) -> Array:
        """Draw the other images of a group: length of their shortest context, or the capacity."""
        keys = jax.random.split(group_key, self.group - 1)
        _, contexts = jax.vmap(self._draw, (None, 0))(size_key, keys)
        return contexts.sum(axis=1).min(initial=self.capacity)

    def _random_priority(self, key: Key[Array, ""]) -> Float[Array, " N"]:
        return jax.random.uniform(jax.random.fold_in(key, 1), (math.prod(self.grid),))

    def _pad_context(
        self, context: Bool[Array, "B N"], priority: Float[Array, "B N"], limit: int | Array
    ) -> tuple[Int[Array, "B K"], Bool[Array, "B K"]]:
        """Turn context masks into padded index arrays, in the order of priorities within [0, 1]."""
        order = jnp.argsort(jnp.where(context, priority, 2), axis=1, stable=True)
        order = order[:, : self.capacity].astype(jnp.int32)
        places = jnp.arange(order.shape[1])[None]
        return order, places < jnp.minimum(limit, context.sum(axis=1))[:, None]

    def _pad_targets(
        self, targets: Bool[Array, "B blocks N"]
    ) -> tuple[Int[Array, "B blocks T"], Bool[Array, "B blocks T"]]:
        """Turn target masks into padded index arrays, in raster order."""
        longest = int(self._size_table(self.scale, self.aspect).prod(axis=1).max())
        order = jnp.argsort(~targets, axis=2, stable=True)[:, :, :longest].astype(jnp.int32)
        places = jnp.arange(longest)[None, None]
        return order, places < targets.sum(axis=2)[:, :, None]

    def _size_table(
        self, scale: tuple[float, float], aspect: tuple[float, float]
    ) -> Int[np.ndarray, "4096 2"]:
        """Tabulate equally likely block sizes (height, width)."""
        if self.biased:
            u = _midpoints(4096)
            v = u
        else:
            u = np.repeat(_midpoints(64), 64)
            v = np.tile(_midpoints(64), 64)
        area = np.floor(math.prod(self.grid) * (scale[0] + u * (scale[1] - scale[0])))
        ratio = aspect[0] + v * (aspect[1] - aspect[0])
        sizes = np.round(np.sqrt(np.stack([area * ratio, area / ratio], axis=1)))
        return np.clip(sizes, 1, np.array(self.grid) - int(self.biased)).astype(np.int32)

    def _draw_size(
        self, key: Key[Array, ""], scale: tuple[float, float], aspect: tuple[float, float]
    ) -> Int[Array, " 2"]:
        """Draw the (height, width) of a block."""
        table = self._size_table(scale, aspect)
        index = jax.random.randint(key, (), 0, len(table))
        return jnp.asarray(table)[index]

    def _draw_block(self, key: Key[Array, ""], size: Int[Array, " 2"]) -> Bool[Array, " N"]:
        """Draw a block of the given (height, width) at a random place."""
        row_key, column_key = jax.random.split(key)
        rows = self._draw_interval(row_key, size[0], self.grid[0])
        columns = self._draw_interval(column_key, size[1], self.grid[1])
        return (rows[:, None] & columns[None]).ravel()

    def _draw_interval(
        self, key: Key[Array, ""], length: Int[Array, ""], cells: int
    ) -> Bool[Array, " cells"]:
        """Draw an interval of `length` cells among `cells`, as a mask."""
        start = jax.random.randint(key, (), 0, cells - length + int(not self.biased))
        places = jnp.arange(cells)
        return (places >= start) & (places < start + length)

    def _draw(
        self, size_key: Key[Array, ""], key: Key[Array, ""]
    ) -> tuple[Bool[Array, "blocks N"], Bool[Array, " N"]]:
        """Draw the (targets, context) of one image; its block sizes depend on `size_key` alone."""
        target_size_key, context_size_key = jax.random.split(size_key)
        target_size = self._draw_size(target_size_key, self.scale, self.aspect)
        context_size = self._draw_size(context_size_key, self.context_scale, (1.0, 1.0))
        target_key, context_key = jax.random.split(key)
        draw_blocks = jax.vmap(self._draw_block, (0, None))
        targets = draw_blocks(jax.random.split(target_key, self.blocks), target_size)
        tries = draw_blocks(jax.random.split(context_key, 20), context_size)
        return targets, self._choose_context(targets, tries)

    def _choose_context(
        self, targets: Bool[Array, "blocks N"], tries: Bool[Array, "20 N"]
    ) -> Bool[Array, " N"]:
        """Choose the first context that is long enough; if there is none, the longest one.

        Candidates are all tries without the patches of all targets; then all tries without those of
        all targets but the last one; then without those of all but the last two; ...
        """
        covered = jnp.cumsum(targets, axis=0) > 0
        covered = jnp.concatenate([covered[::-1], jnp.zeros_like(covered[:1])])  # [blocks + 1, N]
        contexts = (tries[None] & ~covered[:, None]).reshape(-1, tries.shape[-1])
        lengths = contexts.sum(axis=1)
        enough = lengths > self.min_context
        return contexts[jnp.where(enough.any(), enough.argmax(), lengths.argmax())]


def _midpoints(count: int) -> Float[np.ndarray, " count"]:
    """Midpoints of `count` equal parts of [0, 1]."""
    return (np.arange(count) + 0.5) / count


PROPOSALS = 16  # blocks that are tried at a time
ROUNDS = 1000  # at most; 120 of 196 patches take about 10 rounds


def block_of(
    key: Key[Array, ""],
    grid: tuple[int, int],
    count: int,
    *,
    aspect: float,
    roll: bool,
) -> Bool[Array, "h w"]:
    """Draw one rectangular block of exactly `count` patches of an image.

    Its height / width is log-uniform on [aspect, 1 / aspect], as far as such a rectangle fits the
    grid; both are rounded up, its place is uniform, and of more than `count` patches the first ones
    in raster order count.

    Args:
      key: random key of the image.
      grid: (h, w).
      count: patches of the block.
      aspect: smallest height / width, in (0, 1].
      roll: whether the block is shifted by any number of rows and columns, so that it can leave the
        grid on one side and enter it on the other.

    Returns:
      The mask, True in the block.

    Source: CAPI's released `BlockMasking`.
    """
    h, w = grid
    keys = jax.random.split(key, 5)
    high = min(math.log(1 / aspect), math.log(h * h / count))
    low = min(max(math.log(aspect), math.log(count / (w * w))), high)
    ratio = jnp.exp(jax.random.uniform(keys[0], minval=low, maxval=high))
    height = jnp.clip(jnp.ceil(jnp.sqrt(count * ratio)).astype(jnp.int32), -(-count // w), h)
    width = jnp.ceil(jnp.sqrt(count / ratio)).astype(jnp.int32)
    width = jnp.clip(width, -(-count // height), w)
    top = jax.random.randint(keys[1], (), 0, h - height + 1)
    left = jax.random.randint(keys[2], (), 0, w - width + 1)
    rows = jnp.arange(h)[:, None]
    columns = jnp.arange(w)[None]
    block = (rows >= top) & (rows < top + height) & (columns >= left) & (columns < left + width)
    block = block & (jnp.cumsum(block).reshape(grid) <= count)
    if roll:
        shift = jax.random.randint(keys[3], (), 0, h), jax.random.randint(keys[4], (), 0, w)
        block = jnp.roll(block, shift, (0, 1))
    return block


def split_by_block(
    key: Key[Array, ""], grid: tuple[int, int], num_masked: int, kind: str, roll: bool
) -> Split:
    """Split the patches of one image by a block, or at random.

    Args:
      key: random key of the image.
      grid: (h, w).
      num_masked: M.
      kind: "inverse_block": the block is visible; "block": it is masked; "random": there is none.
      roll: see `block_of`.

    Returns:
      (visible, masked), int32, visible in raster order, masked in random order.
    """
    draw_key, order_key = jax.random.split(key)
    num_patches = math.prod(grid)
    if kind == "random":
        masked = jax.random.permutation(draw_key, num_patches) < num_masked
    elif kind == "block":
        masked = block_of(draw_key, grid, num_masked, aspect=0.5, roll=roll).ravel()
    else:
        num_visible = num_patches - num_masked
        masked = ~block_of(draw_key, grid, num_visible, aspect=0.5, roll=roll).ravel()
    order = jnp.argsort(masked, stable=True).astype(jnp.int32)
    visible = order[: num_patches - num_masked]
    return visible, jax.random.permutation(order_key, order[num_patches - num_masked :])


def block_mask(
    key: Key[Array, ""],
    grid: tuple[int, int],
    *,
    total: int,
    smallest: float,
    largest: float,
    aspect: float,
) -> Bool[Array, "h w"]:
    """Mask exactly `total` patches of one image with rectangular blocks.

    Blocks are proposed until `total` patches are masked. Their area is uniform on
    [smallest, min(largest, patches still missing)], their height / width is log-uniform on
    [aspect, 1 / aspect], their place is uniform. A block is accepted if it is lower and narrower
    than the grid, and masks at least one patch that is not masked yet, but not more than are still
    missing, nor more than `largest`. If the sizes allow no such block, fewer patches are masked
    after ROUNDS rounds.

    Args:
      key: random key of the image.
      grid: (h, w).
      total: patches to mask.
      smallest: smallest area of a block in patches.
      largest: largest area of a block in patches.
      aspect: smallest height / width, in (0, 1].

    Returns:
      The mask, True = masked.

    Source: BEiT (arXiv 2106.08254), algorithm 1; BootMAE's `masking_generator.py`.
    """

    def is_unfinished(state):
        turn, mask = state
        return (turn < ROUNDS) & (mask.sum() < total)

    def add_block(state):
        turn, mask = state
        limit = jnp.minimum(total - mask.sum(), largest)
        rows, columns, fits = _propose_blocks(
            jax.random.fold_in(key, turn), grid, smallest, limit, aspect
        )
        new = jnp.sum(rows[:, :, None] & columns[:, None] & ~mask[None], axis=(1, 2))
        accepted = fits & (new > 0) & (new <= limit)
        first = jnp.argmax(accepted)
        block = rows[first][:, None] & columns[first][None] & accepted[first]
        return turn + 1, mask | block

    _, mask = jax.lax.while_loop(is_unfinished, add_block, (0, jnp.zeros(grid, bool)))
    return mask


def _propose_blocks(
    key: Key[Array, ""],
    grid: tuple[int, int],
    smallest: float,
    limit: Float[Array, ""],
    aspect: float,
) -> tuple[Bool[Array, "K h"], Bool[Array, "K w"], Bool[Array, " K"]]:
    """Draw K = PROPOSALS blocks.

    Returns:
      (rows, columns, fits): masks of the rows and of the columns of each block, and whether it is
      lower and narrower than the grid.
    """
    h, w = grid
    keys = jax.random.split(key, 4)
    # The limit is below `smallest` when fewer patches are missing.
    low = jnp.minimum(smallest, limit)
    high = jnp.maximum(smallest, limit)
    area = jax.random.uniform(keys[0], (PROPOSALS,), minval=low, maxval=high)
    ratio = aspect ** jax.random.uniform(keys[1], (PROPOSALS,), minval=-1.0, maxval=1.0)
    height = jnp.round(jnp.sqrt(area * ratio)).astype(jnp.int32)
    width = jnp.round(jnp.sqrt(area / ratio)).astype(jnp.int32)
    rows = _random_intervals(keys[2], height, h)
    columns = _random_intervals(keys[3], width, w)
    return rows, columns, (height < h) & (width < w)


def _random_intervals(
    key: Key[Array, ""], lengths: Int[Array, " K"], cells: int
) -> Bool[Array, "K cells"]:
    """Draw an interval of each of the lengths among `cells` cells, as masks."""
    start = jax.random.randint(key, lengths.shape, 0, jnp.maximum(cells - lengths + 1, 1))[:, None]
    places = jnp.arange(cells)[None]
    return (places >= start) & (places < start + lengths[:, None])


def block_split(
    key: Key[Array, ""],
    mask: Bool[Array, "h w"],
    num_visible: int,
    exposed: int | Int[Array, ""],
) -> Split:
    """Split the patches of one image by a mask of blocks, and fill up at random.

    Masked are the patches under the mask except `exposed` of them, and random other patches.

    Args:
      key: random key of the image.
      mask: as returned by `block_mask`, with at most M = h w - num_visible masked patches.
      num_visible: V.
      exposed: number of patches under the mask that are visible nevertheless.

    Returns:
      (visible, masked), int32, each in random order; together a permutation of range(h w).

    Source: BootMAE's `mask_to_index`, where `exposed` is a roll of the order of patches by 0 .. 3,
    one draw for the whole batch.
    """
    order = jnp.argsort(mask.ravel() + jax.random.uniform(key, (mask.size,))).astype(jnp.int32)
    order = jnp.roll(order, exposed)
    return order[:num_visible], order[num_visible:]


def window_offsets(key: Key[Array, ""], grid: tuple[int, int], gap: int) -> Int[Array, "h w 2"]:
    """Draw the (row, column) offset of the window in each cell of one image.

    Offsets are int32, uniform on {0 .. gap - 1} per axis. The bound is exclusive, as in the
    official code: an offset of `gap` never occurs.

    Args:
      key: random key of the image.
      grid: (h, w).
      gap: pixels by which a cell is wider than its window.
    """
    return jax.random.randint(key, (*grid, 2), 0, max(gap, 1), jnp.int32)


def take(x: Float[Array, "B N D"], index: Int[Array, "R M"]) -> Float[Array, "R M D"]:
    """Gather rows of each image by index.

    Args:
      x: one table per image, or [1, N, D], one table for the whole batch.
      index: rows to gather, R = B, or a multiple of it: several sets of rows of each image, which
        follow each other.
    """
    if len(x) == 1:
        return jnp.take(x[0], index, axis=0)
    if len(index) != len(x):
        gathered = jnp.take_along_axis(x, index.reshape(len(x), -1, 1), axis=1)
        return gathered.reshape(*index.shape, x.shape[-1])
    return jnp.take_along_axis(x, index[..., None], axis=1)
