"""Fused attention on TPUs for the short sequences of Vision Transformers.

One program of the kernel has whole images in the memory of the chip, head after head, so that no
scores reach the device's memory. Arrays stay as the projections write them, with all heads of a
token side by side: heads of their own axis, 64 or 32 wide, would be padded to 128, and would have
to be copied.

Letters: B batch, T query tokens, S key tokens, A attention heads, K width of a head, D = A K.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from lmim_jax.models.packed_arrays import Places, costs, width_of

ROWS = 256  # tokens of one program, if one image has fewer
# Of 16 MiB that a kernel may use of the memory on the chip, what is reckoned with
MEMORY = 15e6  # bytes
SCORES = 9  # float32 arrays of a head's scores that are there at once, at most (seen in programs)


def fits(tokens: int, context: int, width: int) -> bool:
    """Whether whole images of T = `tokens`, S = `context`, D = `width` fit on the chip.

    The backward pass has most: queries, keys, values, output, and the gradients of all four, twice,
    as the next images are fetched meanwhile.
    """
    longest = max(tokens, context)
    blocks = 2 * 8 * 2 * max(_round_up(longest, 16), ROWS) * width
    scores = SCORES * 4 * _round_up(tokens, 8) * _round_up(context, 128)
    return blocks + scores <= MEMORY


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def forward(arrays: Sequence[Array], places: Places, heads: int) -> Float[Array, "B T D"]:
    """The output; see `packed_attention.attend`."""
    width = width_of(arrays, places)
    output = jax.ShapeDtypeStruct((*arrays[0].shape[:2], width), arrays[0].dtype)
    kernel = functools.partial(_forward_kernel, places, heads, width // heads)
    cost = costs(arrays, width, heads, products=2)
    return _call(kernel, arrays, (output,), cost, name="attention_forward")[0]


def forward_with_residuals(
    arrays: Sequence[Array], places: Places, heads: int
) -> tuple[Array, Array]:
    """The output, and what `backward` needs: the same."""
    y = forward(arrays, places, heads)
    return y, y


def backward(
    arrays: Sequence[Array], y: Array, dy: Array, places: Places, heads: int
) -> tuple[Array, ...]:
    """The gradients of the arrays."""
    gradients = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays)
    kernel = functools.partial(_backward_kernel, places, heads, y.shape[-1] // heads)
    cost = costs(arrays, y.shape[-1], heads, products=5)
    return _call(kernel, (*arrays, y, dy), gradients, cost, name="attention_backward")


def _call(
    kernel: Any,
    inputs: Sequence[Array],
    outputs: Sequence[Any],
    cost: tuple[int, int],
    name: str,
) -> Any:
    """Run a kernel with some whole images in every program.

    Args:
      kernel: function of references to blocks of inputs and outputs.
      inputs: arrays of all images.
      outputs: their shapes and dtypes.
      cost: see `packed_arrays.costs`.
      name: of the kernel in programs and profiles.
    """
    batch = len(inputs[0])
    images = _images_of_a_program(batch, max(x.shape[1] for x in inputs))
    size = sum(x.size * x.dtype.itemsize for x in (*inputs, *outputs))
    flops, exponentials = cost

    def block(x: Any) -> pl.BlockSpec:
        return pl.BlockSpec((images, *x.shape[1:]), lambda i: (i, 0, 0))

    return pl.pallas_call(
        kernel,
        grid=(batch // images,),
        in_specs=[block(x) for x in inputs],
        out_specs=[block(x) for x in outputs],
        out_shape=outputs,
        cost_estimate=pl.CostEstimate(
            flops=flops, transcendentals=exponentials, bytes_accessed=size
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        name=name,
    )(*inputs)


def _images_of_a_program(batch: int, tokens: int) -> int:
    images = max(ROWS // _round_up(tokens, 16), 1)
    while batch % images:
        images -= 1
    return images


def _forward_kernel(places: Places, heads: int, head_width: int, *refs: Any) -> None:
    *inputs, output = refs

    def one_image(image: Any, _: None) -> None:
        for head in range(heads):
            columns = pl.ds(head * head_width, head_width)
            query, key, value = _head(inputs, places, image, head, head_width)
            exponentials, total = _exponentials(query, key)
            y = _dot(exponentials.astype(value.dtype), value) / total
            output[image, :, columns] = y.astype(output.dtype)

    jax.lax.fori_loop(0, output.shape[0], one_image, None)


def _backward_kernel(places: Places, heads: int, head_width: int, *refs: Any) -> None:
    """As `attention._backward`, with the softmax computed again."""
    count = (len(refs) - 2) // 2
    inputs = refs[:count]
    output, output_gradient = refs[count : count + 2]
    gradients = refs[count + 2 :]

    def one_image(image: Any, _: None) -> None:
        for head in range(heads):
            columns = pl.ds(head * head_width, head_width)
            query, key, value = _head(inputs, places, image, head, head_width)
            exponentials, total = _exponentials(query, key)
            dy = output_gradient[image, :, columns].astype(jnp.float32) / total
            y = output[image, :, columns].astype(jnp.float32)
            common = (dy * y).sum(axis=-1, keepdims=True)
            dy = dy.astype(value.dtype)
            exponentials = exponentials.astype(value.dtype)
            score_gradient = _dot_transposed(dy, value) - common
            score_gradient = exponentials * score_gradient * head_width**-0.5
            score_gradient = score_gradient.astype(query.dtype)
            results = (
                _dot(score_gradient, key),
                _dot(score_gradient.T, query),
                _dot(exponentials.T, dy),
            )
            for (index, start), result in zip(places, results, strict=True):
                columns_of_part = pl.ds(start + head * head_width, head_width)
                gradients[index][image, :, columns_of_part] = result.astype(query.dtype)

    jax.lax.fori_loop(0, output.shape[0], one_image, None)


def _head(
    refs: Sequence[Any], places: Places, image: Any, head: int, head_width: int
) -> list[Array]:
    """Query, key and value of a head."""
    parts = []
    for index, start in places:
        parts.append(refs[index][image, :, pl.ds(start + head * head_width, head_width)])
    return parts


def _exponentials(query: Array, key: Array) -> tuple[Array, Array]:
    """Exponentials of the scores, and their sums, float32."""
    scores = _dot_transposed(query, key) * query.shape[-1] ** -0.5
    exponentials = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    return exponentials, exponentials.sum(axis=-1, keepdims=True)


def _dot(x: Array, y: Array) -> Array:
    return jnp.dot(x, y, preferred_element_type=jnp.float32)


def _dot_transposed(x: Array, y: Array) -> Array:
    """x y^T."""
    return jax.lax.dot_general(x, y, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
