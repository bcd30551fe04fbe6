"""cuDNN's fused attention, for any number of tokens.

Letters: B batch, T query tokens, S key tokens, A attention heads, K width of a head.
"""

import functools
import inspect
import logging
from typing import Any

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo
from jaxtyping import Array, Bool, Float

log = logging.getLogger(__name__)


def attend(
    query: Float[Array, "B T A K"],
    key: Float[Array, "B S A K"],
    value: Float[Array, "B S A K"],
    mask: Bool[Array, "B S"] | None,
) -> Float[Array, "B T A K"]:
    """Compute softmax(q k^T / sqrt(K)) v by the fused kernel; see `attention.attend`."""
    if mask is None:
        _allow_odd_lengths()
        return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")
    # A mask becomes a bias of scores, for which the kernel wants even lengths
    tokens = query.shape[1]
    query = _pad_to_even(query)
    key = _pad_to_even(key)
    value = _pad_to_even(value)
    mask = _pad_to_even(mask)
    mask = jnp.broadcast_to(mask[:, None, None, :], (len(mask), 1, query.shape[1], key.shape[1]))
    output = jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="cudnn")
    return output[:, :tokens]


def _pad_to_even(x: Array) -> Array:
    """Append a token of zeros (False) to an odd number of tokens."""
    if x.shape[1] % 2 == 0:
        return x
    widths = [(0, 0)] * x.ndim
    widths[1] = (0, 1)
    return jnp.pad(x, widths)


def available() -> bool:
    """Whether jax finds a cuDNN that has the kernel."""
    try:
        fused_attention_stablehlo.check_cudnn_version()
    except RuntimeError:
        return False
    return True


@functools.cache
def warn_unavailable() -> None:
    """Log, once, that attention is slower than it could be."""
    log.warning(
        "jax finds no cuDNN on this GPU: attention is plain products, which are slower; "
        "pip install 'jax[cuda13]' (drivers older than 580: 'jax[cuda12]')"
    )


@functools.cache
def _allow_odd_lengths() -> None:
    """Let jax use the kernel for odd numbers of tokens where there is no bias.

    Its check refuses them when training because it takes an empty placeholder for a bias
    (jax 0.10 to 0.12). Without a bias, cuDNN computes them correctly: results and gradients were
    compared with plain products on an H100. Padding to even numbers would copy all arrays.
    """
    check = fused_attention_stablehlo.check_is_flash_attention
    parameters = inspect.signature(check).parameters

    @functools.wraps(check)
    def check_without_bias(*args: Any, **kwargs: Any) -> None:
        names = dict(zip(parameters, args, strict=False)) | kwargs
        names["has_bias"] = False
        check(**names)

    if "has_bias" in parameters:
        fused_attention_stablehlo.check_is_flash_attention = check_without_bias
