"""Fused attention by this package's own kernels, on arrays as the projections write them.

Letters: B batch, T query tokens, S key tokens, A attention heads, K width of a head, D = A K.
"""

import functools
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lmim_jax.models import tpu_attention
from lmim_jax.models.packed_arrays import Places
from lmim_jax.utils.platform import current_platform


class Sizes(NamedTuple):
    """Sizes of an attention layer.

    Attributes:
      tokens: T.
      context: S.
      heads: A.
      head_width: K.
    """

    tokens: int
    context: int
    heads: int
    head_width: int


def is_used(implementation: str, dtype: Any, sizes: Sizes, mask: Array | None = None) -> bool:
    """Whether a layer calls `attend_self` or `attend_cross` in place of `attention.attend`.

    XLA cannot split these kernels over devices: they are used inside a `shard_map` only, as in the
    train step.

    Args:
      implementation: see `attention.attend`; "auto": the kernels where they are possible.
      dtype: of the computation.
      sizes: of the layer.
      mask: see `attention.attend`.
    """
    if implementation != "auto" or mask is not None or dtype != jnp.bfloat16:
        return False
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return False
    width = sizes.heads * sizes.head_width
    platform = current_platform()
    if platform == "tpu":
        return tpu_attention.fits(sizes.tokens, sizes.context, width)
    if platform == "gpu":
        return _kernels().fits(sizes.context, sizes.head_width)
    return False


def _kernels() -> types.ModuleType:
    """The module with the kernels for the current platform."""
    if current_platform() == "gpu":
        # Not at the top: where there are no GPUs, jax may lack what it needs
        from lmim_jax.models import gpu_attention

        return gpu_attention
    return tpu_attention


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def attend(
    arrays: tuple[Float[Array, "B T C"], ...], places: Places, heads: int
) -> Float[Array, "B T D"]:
    """Compute softmax(q k^T / sqrt(K)) v with a float32 softmax.

    Args:
      arrays: that contain queries, keys and values, each D columns of all heads.
      places: where; the queries are in the first array.
      heads: A.
    """
    return _kernels().forward(arrays, places, heads)


def _forward(arrays: tuple[Array, ...], places: Places, heads: int) -> Any:
    y, residuals = _kernels().forward_with_residuals(arrays, places, heads)
    return y, (arrays, residuals)


def _backward(places: Places, heads: int, residuals: Any, dy: Array) -> tuple[tuple[Array, ...]]:
    return (_kernels().backward(*residuals, dy, places, heads),)


attend.defvjp(_forward, _backward)


def attend_self(qkv: Float[Array, "B T 3*D"], heads: int) -> Float[Array, "B T D"]:
    """Attend inside a sequence; columns are those of queries, keys, values."""
    width = qkv.shape[-1] // 3
    return attend((qkv,), ((0, 0), (0, width), (0, 2 * width)), heads)


def attend_cross(
    query: Float[Array, "B T D"], key_value: Float[Array, "B S 2*D"], heads: int
) -> Float[Array, "B T D"]:
    """Attend from a sequence to another; columns of the latter are those of keys, values."""
    return attend((query, key_value), ((0, 0), (1, 0), (1, query.shape[-1])), heads)
