"""Attention itself.

Letters: B batch, T S tokens, A attention heads, D width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp


def attend(query, key, value, implementation, mask=None):
    """softmax(q k^T / sqrt(D/A)) v with a float32 softmax: [B, T, A, D/A], [B, S, A, D/A] x 2 -> [B, T, A, D/A].

    Args:
      implementation: "xla" anywhere, "cudnn" (fused; bfloat16 on an NVIDIA GPU only; an error elsewhere).
      mask: bool [B, S], True = this key counts; None: all do.
    """
    mask = None if mask is None else mask[:, None, None, :]
    if implementation != "xla":
        return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation=implementation)
    logits = scores(query, key) * query.shape[-1] ** -0.5
    weights = nn.softmax(logits if mask is None else jnp.where(mask, logits, -1e30))
    return jnp.einsum("bats,bsad->btad", weights.astype(value.dtype), value)


@jax.custom_vjp
def scores(query, key):
    """q k^T of every head, [B, T, A, D/A] and [B, S, A, D/A] -> float32 [B, A, T, S].

    The gradient is rounded to the operands' dtype before it is multiplied: autodiff would multiply it in float32.
    """
    return jnp.einsum("btad,bsad->bats", query, key, preferred_element_type=jnp.float32)


def _scores_forward(query, key):
    return scores(query, key), (query, key)


def _scores_backward(operands, gradient):
    query, key = operands
    gradient = gradient.astype(query.dtype)
    return jnp.einsum("bats,bsad->btad", gradient, key), jnp.einsum("bats,btad->bsad", gradient, query)


scores.defvjp(_scores_forward, _scores_backward)
