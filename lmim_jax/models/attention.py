"""Dot-product attention.

Letters: B batch, T query tokens, S key tokens, A attention heads, K width of a head.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lmim_jax.models import cudnn_attention
from lmim_jax.utils import xla_flags
from lmim_jax.utils.errors import UserError
from lmim_jax.utils.platform import current_platform

# What the forward pass keeps for the backward pass, heads first: query, key, value,
# exponentials, their sums, output
Residuals = tuple[Array, Array, Array, Array, Array, Array]


IMPLEMENTATIONS = ("auto", "xla", "cudnn")
FUSED_TOKENS = (
    64  # from so many queries or keys on the fused kernel is faster (measured on an H100)
)
FUSED_DTYPES = (jnp.bfloat16, jnp.float16)
FUSED_HEAD_WIDTH = 128  # at most, and divisible by 8


def attend(
    query: Float[Array, "B T A K"],
    key: Float[Array, "B S A K"],
    value: Float[Array, "B S A K"],
    implementation: str,
    mask: Bool[Array, "B S"] | None = None,
) -> Float[Array, "B T A K"]:
    """Compute softmax(q k^T / sqrt(K)) v with a float32 softmax.

    Args:
      query: queries of every head.
      key: keys of every head.
      value: values of every head.
      implementation: "xla": plain matrix products, on any device; "cudnn": the fused kernel, which
        needs bfloat16 and an NVIDIA GPU; "auto": the fused kernel where it is possible and faster.
        In a train step on GPUs and TPUs, packed_attention.py comes before that.
      mask: True where a key may be attended to; None: every key may.
    """
    if implementation == "auto":
        implementation = "cudnn" if _fused_is_faster(query, key, mask) else "xla"
    if implementation == "cudnn":
        return cudnn_attention.attend(query, key, value, mask)
    if mask is not None:
        mask = mask[:, None, None, :]
    return _attend(query, key, value, mask)


def check_fused(method: Mapping[str, Any]) -> None:
    """Check that the fused kernel can be used, where a recipe asks for it.

    Args:
      method: `config.method`.

    Raises:
      UserError: `attention` is "cudnn", and device, flags, dtype or the width of a head forbid it.
    """
    if method["attention"] != "cudnn":
        return
    problem = ""
    if current_platform() != "gpu":
        problem = f"needs an NVIDIA GPU, and the devices here are {current_platform()}s"
    elif not cudnn_attention.available():
        problem = "needs cuDNN, which jax does not find: pip install 'jax[cuda13]'"
    elif xla_flags.is_deterministic():
        problem = (
            "needs config.deterministic=False: XLA fails to compile the fused kernel with "
            "deterministic kernels only"
        )
    elif method["dtype"] != "bfloat16":
        problem = f"needs config.method.dtype=bfloat16, not {method['dtype']}"
    else:
        for key in method:
            width = key.replace("heads", "width")
            if width != key and (method[width] // method[key]) % 8:
                problem = f"needs heads whose width is a multiple of 8: {width} / {key} is not"
    if problem:
        raise UserError(
            f"config.method.attention=cudnn {problem}; config.method.attention=auto uses the fused "
            "kernel wherever it can"
        )


def _fused_is_faster(query: Array, key: Array, mask: Array | None) -> bool:
    """Whether the fused kernel can be used, and is faster than plain products."""
    head_width = query.shape[-1]
    tokens = max(query.shape[1], key.shape[1])
    faster = (
        current_platform() == "gpu"
        and mask is None
        and query.dtype in FUSED_DTYPES
        and head_width % 8 == 0
        and head_width <= FUSED_HEAD_WIDTH
        and tokens >= FUSED_TOKENS
        and not xla_flags.is_deterministic()  # with it, XLA fails at the fused kernel
    )
    if faster and not cudnn_attention.available():
        cudnn_attention.warn_unavailable()
        return False
    return faster


def attention_weights(
    query: Float[Array, "B T A K"], key: Float[Array, "B S A K"]
) -> Float[Array, "B A T S"]:
    """Compute the weights, float32, with which `attend` averages the values."""
    return jax.nn.softmax(_scores(_swap_heads(query), _swap_heads(key)))


@jax.custom_vjp
def _attend(query: Array, key: Array, value: Array, mask: Array | None) -> Array:
    return _forward(query, key, value, mask)[0]


def _forward(query: Array, key: Array, value: Array, mask: Array | None) -> tuple[Array, Residuals]:
    """Compute the output of `_attend` and what `_backward` needs.

    The softmax divides last, [T, K] instead of [T, S] numbers of a head. Of these, only the
    exponentials are kept, in the operands' dtype. Heads come before tokens, which makes these plain
    matrix products: several times as fast on a CPU.
    """
    query = _swap_heads(query)
    key = _swap_heads(key)
    value = _swap_heads(value)
    scores = _scores(query, key)
    if mask is not None:
        scores = jnp.where(mask, scores, -1e30)
    exponentials = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    total = exponentials.sum(axis=-1, keepdims=True)
    exponentials = exponentials.astype(value.dtype)
    output = (_matmul_float32(exponentials, value) / total).astype(value.dtype)
    return _swap_heads(output), (query, key, value, exponentials, total, output)


def _backward(residuals: Residuals, gradient: Array) -> tuple[Array, Array, Array, None]:
    """Compute the gradients of query, key and value as in flash attention.

    Operands of products are rounded to the inputs' dtype first, where autodiff would keep float32.
    Source: FlashAttention (Dao et al. 2022), appendix B.
    """
    query, key, value, exponentials, total, output = residuals
    gradient = _swap_heads(gradient).astype(jnp.float32) / total
    common = (gradient * output).sum(axis=-1, keepdims=True)
    gradient = gradient.astype(value.dtype)
    value_gradient = jnp.matmul(exponentials.mT, gradient)
    score_gradient = _matmul_float32(gradient, value.mT) - common
    score_gradient = exponentials * score_gradient * query.shape[-1] ** -0.5
    score_gradient = score_gradient.astype(query.dtype)
    query_gradient = jnp.matmul(score_gradient, key)
    key_gradient = jnp.matmul(score_gradient.mT, query)
    return (
        _swap_heads(query_gradient),
        _swap_heads(key_gradient),
        _swap_heads(value_gradient),
        None,
    )


_attend.defvjp(_forward, _backward)


def _swap_heads(x: Array) -> Array:
    """Swap tokens and heads: [B, T, A, K] <-> [B, A, T, K]."""
    return x.swapaxes(1, 2)


def _matmul_float32(x: Array, y: Array) -> Array:
    """Multiply matrices, accumulating in float32."""
    return jnp.matmul(x, y, preferred_element_type=jnp.float32)


def _scores(query: Array, key: Array) -> Array:
    """Compute q k^T / sqrt(K), float32: [B, A, T, K], [B, A, S, K] -> [B, A, T, S]."""
    return _matmul_float32(query, key.mT) * query.shape[-1] ** -0.5
