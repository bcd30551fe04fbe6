"""Fused attention on NVIDIA GPUs for the short sequences of Vision Transformers.

One program of the kernel has all keys of a head of an image on the chip: the softmax is made at
once, and the backward pass reads and writes every array once. Arrays stay as the projections write
them, so that queries, keys and values are one product. No sum depends on timing.

Letters: B batch, T query tokens, S key tokens, A attention heads, K width of a head, D = A K.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from lmim_jax.models.packed_arrays import Places, costs, width_of

HEAD_WIDTHS = (16, 32, 64, 128)
MOST_KEYS = 256  # S: the scores of a program are in registers
SIZE_OF_KEYS = 256 * 64  # S K at most: their gradients are sums in registers
FEWEST_ROWS = 16  # of the matrix units
# Compute capabilities
FIRST_WITH_BFLOAT16 = (8, 0)
# 160 kB and more for a program; others have 99 kB. Backward, 197 keys of 64 take 135 kB
MUCH_SHARED_MEMORY = ((8, 0), (8, 7), (9, 0), (10, 0), (10, 3))


class Tiles(NamedTuple):
    """How much a program does at a time.

    Attributes:
      queries: in one matrix product, at most.
      keys: likewise.
      warps: of a program.
    """

    queries: int
    keys: int
    warps: int


# Measured on an H200: see docs/results/gpu.md
FORWARD = Tiles(queries=64, keys=128, warps=4)
BACKWARD = Tiles(queries=64, keys=64, warps=4)
BACKWARD_OF_LARGE = Tiles(queries=128, keys=64, warps=8)  # S K from this on:
LARGE = 128 * 64

Residuals = tuple[Array, Array]  # output, and logarithms to base 2 of the sums [B, T, A]


def fits(context: int, head_width: int) -> bool:
    """Whether these GPUs can attend to S = `context` tokens of K = `head_width` by the kernels."""
    capability = _compute_capability()
    most = SIZE_OF_KEYS if capability in MUCH_SHARED_MEMORY else LARGE - 1
    fit = context <= MOST_KEYS and context * head_width <= most
    return fit and head_width in HEAD_WIDTHS and capability >= FIRST_WITH_BFLOAT16


@functools.cache
def _compute_capability() -> tuple[int, int]:
    """That of the GPUs; (0, 0) if they are not NVIDIA's."""
    device = jax.devices()[0]
    if device.platform != "gpu":  # compiled ahead of time, for GPUs of data centers
        return MUCH_SHARED_MEMORY[0]
    major, _, minor = device.compute_capability.partition(".")
    if not (major.isdecimal() and minor.isdecimal()):
        return (0, 0)
    return (int(major), int(minor))


def forward(arrays: Sequence[Array], places: Places, heads: int) -> Float[Array, "B T D"]:
    """The output; see `packed_attention.attend`."""
    return _call_forward(arrays, places, heads, keep=False)[0]


def forward_with_residuals(
    arrays: Sequence[Array], places: Places, heads: int
) -> tuple[Array, Residuals]:
    """The output, and what `backward` needs."""
    y, sums = _call_forward(arrays, places, heads, keep=True)
    return y, (y, sums)


def backward(
    arrays: Sequence[Array], residuals: Residuals, dy: Array, places: Places, heads: int
) -> tuple[Array, ...]:
    """The gradients of the arrays.

    Source: FlashAttention (Dao et al. 2022), appendix B.
    """
    y, sums = residuals
    batch, tokens, width = y.shape
    head_width = width // heads
    context = arrays[-1].shape[1]
    tiles = BACKWARD_OF_LARGE if context * head_width >= LARGE else BACKWARD
    kernel = functools.partial(
        _backward_kernel,
        places=places,
        head_width=head_width,
        rows=_size(tokens, tiles.queries),
        blocks=_blocks(context, tiles.keys),
    )
    gradients = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays)
    return _call(
        kernel,
        (*arrays, y, sums, dy),
        gradients,
        grid=(heads, batch),
        warps=tiles.warps,
        cost=costs(arrays, width, heads, products=5),
        name="attention_backward",
    )


def _call_forward(arrays: Sequence[Array], places: Places, heads: int, keep: bool) -> Any:
    """The output, and with `keep` the logarithms of the sums."""
    batch, tokens = arrays[0].shape[:2]
    width = width_of(arrays, places)
    rows = _size(tokens, FORWARD.queries)
    kernel = functools.partial(
        _forward_kernel,
        places=places,
        head_width=width // heads,
        rows=rows,
        blocks=_blocks(arrays[-1].shape[1], FORWARD.keys),
        keep=keep,
    )
    outputs = [jax.ShapeDtypeStruct((batch, tokens, width), arrays[0].dtype)]
    if keep:
        outputs.append(jax.ShapeDtypeStruct((batch, tokens, heads), jnp.float32))
    return _call(
        kernel,
        arrays,
        outputs,
        grid=(-(-tokens // rows), heads, batch),
        warps=FORWARD.warps,
        cost=costs(arrays, width, heads, products=2),
        name="attention_forward",
    )


def _call(
    kernel: Any,
    inputs: Sequence[Array],
    outputs: Sequence[Any],
    grid: tuple[int, ...],
    warps: int,
    cost: tuple[int, int],
    name: str,
) -> Any:
    """Run a kernel on whole arrays.

    Args:
      kernel: function of references to inputs and outputs.
      inputs: its arrays.
      outputs: shapes and dtypes of its results.
      grid: number of programs along each axis, of which the first varies fastest.
      warps: of a program.
      cost: see `packed_arrays.costs`.
      name: of the kernel in programs and profiles.
    """
    size = sum(x.size * x.dtype.itemsize for x in (*inputs, *outputs))
    flops, exponentials = cost
    return pl.pallas_call(
        kernel,
        grid=grid,
        out_shape=tuple(outputs),
        cost_estimate=pl.CostEstimate(
            flops=flops, transcendentals=exponentials, bytes_accessed=size
        ),
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=1),
        name=name,
    )(*inputs)


def _size(count: int, most: int) -> int:
    """Size of a matrix product for so many tokens: a power of 2."""
    return min(max(FEWEST_ROWS, 1 << (count - 1).bit_length()), most)


def _blocks(context: int, most: int) -> tuple[tuple[int, int], ...]:
    """(first key, number of keys) of matrix products, of `most` keys each or fewer."""
    blocks = []
    first = 0
    while first < context:
        size = _size(context - first, most)
        # 69 keys are 64 and 5 (of 16), not 128: two smaller ones waste less
        if size > 64 and context - first <= size * 3 // 4:
            size //= 2
        blocks.append((first, size))
        first += size
    return tuple(blocks)


def _forward_kernel(
    *refs: Any,
    places: Places,
    head_width: int,
    rows: int,
    blocks: tuple[tuple[int, int], ...],
    keep: bool,
) -> None:
    inputs = refs[: -2 if keep else -1]
    head = pl.program_id(1)
    image = pl.program_id(2)
    queries, keys, values = _heads(inputs, places, image, head, head_width)
    first = pl.program_id(0) * rows
    query = queries.read(first, rows)
    scores = []
    for start, size in blocks:
        scores.append(_scores(query, keys.read(start, size), keys.tokens - start))
    peak = functools.reduce(jnp.maximum, [block.max(axis=1) for block in scores])
    total = jnp.zeros(rows, jnp.float32)
    y = jnp.zeros((rows, head_width), jnp.float32)
    for (start, size), block in zip(blocks, scores, strict=True):
        exponentials = jnp.exp2(block - peak[:, None])
        total += exponentials.sum(axis=1)
        value = values.read(start, size)
        y += _dot(exponentials.astype(value.dtype), value)
    output = Head(refs[len(inputs)], image, head * head_width, head_width)
    output.write(first, y / total[:, None])
    if keep:
        sums = Head(refs[-1], image, head, 1)
        sums.write(first, (peak + jnp.log2(total))[:, None])


def _backward_kernel(
    *refs: Any,
    places: Places,
    head_width: int,
    rows: int,
    blocks: tuple[tuple[int, int], ...],
) -> None:
    count = (len(refs) - 3) // 2
    head = pl.program_id(0)
    image = pl.program_id(1)
    queries, keys, values = _heads(refs[:count], places, image, head, head_width)
    gradients = _heads(refs[count + 3 :], places, image, head, head_width)
    output = Head(refs[count], image, head * head_width, head_width)
    sums = Head(refs[count + 1], image, head, 1)
    output_gradient = Head(refs[count + 2], image, head * head_width, head_width)
    key_blocks = [keys.read(start, size) for start, size in blocks]
    value_blocks = [values.read(start, size) for start, size in blocks]

    def some_queries(i: Any, sums_of_gradients: Any) -> Any:
        first = i * rows
        query = queries.read(first, rows)
        dy = output_gradient.read(first, rows)
        common = (dy.astype(jnp.float32) * output.read(first, rows)).sum(axis=1, keepdims=True)
        logarithms = sums.read(first, rows)
        query_gradient = jnp.zeros((rows, head_width), jnp.float32)
        added = []
        for (start, _), key, value, (key_gradient, value_gradient) in zip(
            blocks, key_blocks, value_blocks, sums_of_gradients, strict=True
        ):
            weights = jnp.exp2(_scores(query, key, keys.tokens - start) - logarithms)
            score_gradient = weights * (_dot_transposed(dy, value) - common)
            score_gradient = (score_gradient * head_width**-0.5).astype(key.dtype)
            query_gradient += _dot(score_gradient, key)
            key_gradient += _dot(score_gradient.T, query)
            value_gradient += _dot(weights.astype(dy.dtype).T, dy)
            added.append((key_gradient, value_gradient))
        gradients[0].write(first, query_gradient)
        return tuple(added)

    zeros = [jnp.zeros((size, head_width), jnp.float32) for _, size in blocks]
    steps = -(-queries.tokens // rows)
    found = jax.lax.fori_loop(0, steps, some_queries, tuple((zero, zero) for zero in zeros))
    for (start, _), (key_gradient, value_gradient) in zip(blocks, found, strict=True):
        gradients[1].write(start, key_gradient)
        gradients[2].write(start, value_gradient)


class Head(NamedTuple):
    """The part of an array that belongs to a head of an image: rows of tokens.

    Attributes:
      ref: to the whole array.
      image: index of the image.
      column: the first one.
      width: number of columns.
    """

    ref: Any
    image: Any
    column: Any
    width: int

    @property
    def tokens(self) -> int:
        """Number of rows."""
        return self.ref.shape[1]

    def read(self, first: Any, rows: int) -> Array:
        """Some rows; 0 beyond the last."""
        part, exists = self._part(first, rows)
        return plgpu.load(part, mask=exists, other=0.0)

    def write(self, first: Any, values: Array) -> None:
        """Write rows, as far as there are some."""
        part, exists = self._part(first, len(values))
        plgpu.store(part, values.astype(self.ref.dtype), mask=exists)

    def _part(self, first: Any, rows: int) -> tuple[Any, Array]:
        """A reference to rows, and which of these there are [rows, 1]."""
        first = jax.lax.convert_element_type(first, jnp.int32)  # numbers may not exceed the array
        columns = pl.ds(self.column, self.width)
        exists = first + jnp.arange(rows) < self.tokens
        return self.ref.at[self.image, pl.ds(first, rows), columns], exists[:, None]


def _heads(
    refs: Sequence[Any], places: Places, image: Any, head: Any, head_width: int
) -> list[Head]:
    """Query, key and value of a head of an image."""
    parts = []
    for index, start in places:
        parts.append(Head(refs[index], image, start + head * head_width, head_width))
    return parts


def _scores(query: Array, key: Array, count: int) -> Array:
    """Scores with the first `count` keys as exponents of 2, float32; -inf for keys beyond these."""
    scores = _dot_transposed(query, key) * (query.shape[-1] ** -0.5 * math.log2(math.e))
    if count >= len(key):
        return scores
    return jnp.where(jnp.arange(len(key))[None] < count, scores, -jnp.inf)


def _dot(x: Array, y: Array) -> Array:
    return jnp.dot(x, y, preferred_element_type=jnp.float32)


def _dot_transposed(x: Array, y: Array) -> Array:
    """x y^T."""
    return jax.lax.dot_general(x, y, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
