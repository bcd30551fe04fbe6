"""Transformer blocks: attention, cross-attention, MLP.

Letters: B batch, T S tokens, D width, A attention heads.
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from lmim_jax.models.attention import attend, weights
from lmim_jax.models.layers import Dense, Dtype, gelu, layer_norm


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
        if self.is_mutable_collection(
            "intermediates"
        ):  # attention maps, only where somebody asks for them
            self.sow("intermediates", "attention", weights(query, key))
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
        query = Dense(self.heads * of_head, self.dtype, of_q, name="q")(x).reshape(
            batch, tokens, -1, of_head
        )
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
        return Dense(width, self.dtype, name="fc2")(
            gelu(Dense(self.hidden, self.dtype, name="fc1")(x))
        )


class Block(nn.Module):
    """Pre-LN Transformer block: x += SelfAttention(LN x); x += MLP(LN x)."""

    heads: int
    mlp_ratio: float
    norm_eps: float
    dtype: Dtype
    attention: str
    qkv_bias: bool | tuple[bool, bool, bool] = True

    @nn.compact
    def __call__(self, x, mask=None, keep=None):
        """[B, T, D] -> [B, T, D].

        mask: see `attend`. keep: [B, 2], by what the attention and the MLP of an image are multiplied; None: by 1.
        """
        norm = lambda name: layer_norm(self.norm_eps, self.dtype, name)
        kept = lambda y, i: y if keep is None else y * keep[:, i, None, None].astype(y.dtype)
        attention = Attention(self.heads, self.dtype, self.attention, self.qkv_bias, name="attn")
        x = x + kept(attention(norm("norm1")(x), mask), 0)
        x = x + kept(
            Mlp(int(x.shape[-1] * self.mlp_ratio), self.dtype, name="mlp")(norm("norm2")(x)), 1
        )
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
        x = x + CrossAttention(*attend, name="cross_attn")(
            norm("norm2q")(x), norm("norm2kv")(context)
        )
        return x + Mlp(int(x.shape[-1] * self.mlp_ratio), self.dtype, name="mlp")(norm("norm3")(x))
