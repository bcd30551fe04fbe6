"""Transformer blocks: attention, cross-attention, MLP.

Letters: B batch, T S tokens, D width, A attention heads.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lmim_jax.models.layers import Dense, Dtype, gelu, layer_norm


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


class Attention(nn.Module):
    """Multi-head self-attention with one fused qkv projection, ordered (q, k, v) on the output axis.

    qkv_bias: a tuple says which of q, k, v have a bias. Heads are floor(D / A) wide, also where A does not divide D.
    """

    heads: int
    dtype: Dtype
    implementation: str
    qkv_bias: bool | tuple[bool, bool, bool] = True

    @nn.compact
    def __call__(self, x, mask=None):
        """[B, T, D] -> [B, T, D]; mask: see `attend`."""
        batch, tokens, width = x.shape
        of_head = width // self.heads
        qkv = Dense(3 * self.heads * of_head, self.dtype, self.qkv_bias, name="qkv")(x)
        query, key, value = jnp.split(qkv.reshape(batch, tokens, -1, of_head), 3, axis=2)
        if self.is_mutable_collection("intermediates"):  # attention maps, only where somebody asks for them
            self.sow("intermediates", "attention", nn.softmax(scores(query, key) * of_head**-0.5))
        x = attend(query, key, value, self.implementation, mask).reshape(batch, tokens, -1)
        return Dense(width, self.dtype, name="proj")(x)


class CrossAttention(nn.Module):
    """Multi-head attention from queries to a context of any width, with one fused key-value projection: (k, v)."""

    heads: int
    dtype: Dtype
    implementation: str
    qkv_bias: bool | tuple[bool, bool, bool] = True

    @nn.compact
    def __call__(self, x, context):
        """[B, T, D], [B, S, any] -> [B, T, D]."""
        batch, tokens, width = x.shape
        of_head = width // self.heads
        of_q, *of_kv = (bool(on) for on in np.broadcast_to(self.qkv_bias, 3))
        query = Dense(self.heads * of_head, self.dtype, of_q, name="q")(x).reshape(batch, tokens, -1, of_head)
        kv = Dense(2 * self.heads * of_head, self.dtype, tuple(of_kv), name="kv")(context)
        key, value = jnp.split(kv.reshape(batch, -1, 2 * self.heads, of_head), 2, axis=2)
        x = attend(query, key, value, self.implementation).reshape(batch, tokens, -1)
        return Dense(width, self.dtype, name="proj")(x)


class Mlp(nn.Module):
    """Linear, exact GELU, Linear."""

    hidden: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x):
        """[B, T, D] -> [B, T, D]."""
        width = x.shape[-1]
        return Dense(width, self.dtype, name="fc2")(gelu(Dense(self.hidden, self.dtype, name="fc1")(x)))


class Block(nn.Module):
    """Pre-LN Transformer block: x += SelfAttention(LN x); x += MLP(LN x)."""

    heads: int
    mlp_ratio: float
    norm_eps: float
    dtype: Dtype
    attention: str
    qkv_bias: bool | tuple[bool, bool, bool] = True

    @nn.compact
    def __call__(self, x, mask=None):
        """[B, T, D] -> [B, T, D]; mask: see `attend`."""
        norm = lambda name: layer_norm(self.norm_eps, self.dtype, name)
        x = x + Attention(self.heads, self.dtype, self.attention, self.qkv_bias, name="attn")(norm("norm1")(x), mask)
        x = x + Mlp(int(x.shape[-1] * self.mlp_ratio), self.dtype, name="mlp")(norm("norm2")(x))
        self.sow("intermediates", "tokens", x)
        return x


class CrossBlock(nn.Module):
    """Pre-LN decoder block: x += SelfAttention(LN x); x += CrossAttention(LN x, LN context); x += MLP(LN x)."""

    heads: int
    mlp_ratio: float
    norm_eps: float
    dtype: Dtype
    attention: str
    qkv_bias: bool | tuple[bool, bool, bool] = True

    @nn.compact
    def __call__(self, x, context):
        """[B, T, D], [B, S, D] -> [B, T, D]."""
        norm = lambda name: layer_norm(self.norm_eps, self.dtype, name)
        attend = self.heads, self.dtype, self.attention, self.qkv_bias
        x = x + Attention(*attend, name="self_attn")(norm("norm1")(x))
        x = x + CrossAttention(*attend, name="cross_attn")(norm("norm2q")(x), norm("norm2kv")(context))
        return x + Mlp(int(x.shape[-1] * self.mlp_ratio), self.dtype, name="mlp")(norm("norm3")(x))
