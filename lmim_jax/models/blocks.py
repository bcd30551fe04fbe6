"""Transformer blocks: attention, cross-attention, MLP.

Letters: B batch, T S tokens, D width, E width of the context, A attention heads.
"""

from typing import Any

import flax.linen as nn
import numpy as np
from jaxtyping import Array, Bool, Float

from lmim_jax.models import packed_attention
from lmim_jax.models.attention import attend, attention_weights
from lmim_jax.models.layers import Dense, Dtype, gelu, layer_norm, norm
from lmim_jax.models.rope import Rope

QkvBias = bool | tuple[bool, bool, bool]  # of queries, keys and values alike, or of each


class Attention(nn.Module, kw_only=True):
    """Multi-head self-attention with one fused projection, ordered (q, k, v) on the output axis.

    Heads are floor(D / A) wide, also where A does not divide D.

    Attributes:
      heads: A.
      dtype: of the computation.
      implementation: see `attention.attend`.
      qkv_bias: whether queries, keys and values have a bias.
      bias: whether the last linear layer has a bias.
    """

    heads: int
    dtype: Dtype
    implementation: str
    qkv_bias: QkvBias = True
    bias: bool = True

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        mask: Bool[Array, "B T"] | None = None,
        rope: Rope | None = None,
    ) -> Float[Array, "B T D"]:
        """Attend from every token to the tokens where `mask` is True.

        Args:
          x: tokens.
          mask: None: every token may be attended to.
          rope: turns queries and keys; None: they are taken as they are.
        """
        batch, tokens, width = x.shape
        head_width = width // self.heads
        project = Dense(3 * self.heads * head_width, self.dtype, self.qkv_bias, name="qkv")
        finish = Dense(width, self.dtype, self.bias, name="proj")
        plain = rope is None and not self.is_mutable_collection("intermediates")
        sizes = packed_attention.Sizes(tokens, tokens, self.heads, head_width)
        if plain and packed_attention.is_used(self.implementation, self.dtype, sizes, mask):
            return finish(packed_attention.attend_self(project(x), self.heads))
        query, key, value = project.by_head(x, 3, self.heads)
        if rope is not None:
            query = rope(query)
            key = rope(key)
        if self.is_mutable_collection("intermediates"):
            self.sow("intermediates", "attention", attention_weights(query, key))
        x = attend(query, key, value, self.implementation, mask)
        return finish(x.reshape(batch, tokens, -1))


class CrossAttention(nn.Module, kw_only=True):
    """Multi-head attention to a context of any width, whose fused projection is ordered (k, v).

    Attributes:
      heads: A.
      dtype: of the computation.
      implementation: see `attention.attend`.
      qkv_bias: whether queries, keys and values have a bias.
      bias: whether the last linear layer has a bias.
    """

    heads: int
    dtype: Dtype
    implementation: str
    qkv_bias: QkvBias = True
    bias: bool = True

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Float[Array, "B S E"],
        rope: Rope | None = None,
        context_rope: Rope | None = None,
        mask: Bool[Array, "B S"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Attend from every token to the context.

        Args:
          x: tokens.
          context: what they attend to.
          rope: turns queries; None: they are taken as they are.
          context_rope: turns keys.
          mask: True for what may be attended to; None: all of the context.
        """
        batch, tokens, width = x.shape
        head_width = width // self.heads
        finish = Dense(width, self.dtype, self.bias, name="proj")
        query_bias, key_bias, value_bias = np.broadcast_to(self.qkv_bias, 3).tolist()
        query = Dense(self.heads * head_width, self.dtype, query_bias, name="q")(x)
        kv_bias = (key_bias, value_bias)
        project = Dense(2 * self.heads * head_width, self.dtype, kv_bias, name="kv")
        plain = rope is None and context_rope is None
        sizes = packed_attention.Sizes(tokens, context.shape[1], self.heads, head_width)
        if plain and packed_attention.is_used(self.implementation, self.dtype, sizes, mask):
            return finish(packed_attention.attend_cross(query, project(context), self.heads))
        query = query.reshape(batch, tokens, -1, head_width)
        key, value = project.by_head(context, 2, self.heads)
        if rope is not None:
            query = rope(query)
        if context_rope is not None:
            key = context_rope(key)
        x = attend(query, key, value, self.implementation, mask)
        return finish(x.reshape(batch, tokens, -1))


class Mlp(nn.Module):
    """Linear layer, exact GELU, linear layer.

    Attributes:
      hidden: width between the two layers.
      dtype: of the computation.
      bias: whether both layers have a bias.
    """

    hidden: int
    dtype: Dtype
    bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Apply the layers to every token."""
        width = x.shape[-1]
        x = Dense(self.hidden, self.dtype, self.bias, name="fc1")(x)
        return Dense(width, self.dtype, self.bias, name="fc2")(gelu(x))


class Block(nn.Module, kw_only=True):
    """Pre-norm Transformer block: x += SelfAttention(norm x); x += MLP(norm x).

    Attributes:
      heads: A.
      mlp_ratio: hidden width of the MLP, in widths of the block.
      norm_eps: epsilon of the norms.
      dtype: of the computation.
      attention: implementation of attention, see `attention.attend`.
      qkv_bias: whether queries, keys and values have a bias.
      bias: whether all other linear layers have a bias.
      norm: see `layers.norm`.
    """

    heads: int
    mlp_ratio: float
    norm_eps: float
    dtype: Dtype
    attention: str
    qkv_bias: QkvBias = True
    bias: bool = True
    norm: str = "layer"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        mask: Bool[Array, "B T"] | None = None,
        branch_scales: Float[Array, "B 2"] | None = None,
        rope: Rope | None = None,
    ) -> Float[Array, "B T D"]:
        """Apply the block.

        Args:
          x: tokens.
          mask: True where a token may be attended to; None: every token may.
          branch_scales: factors of the attention and the MLP of every image; None: 1.
          rope: turns queries and keys; None: they are taken as they are.
        """
        attention = Attention(
            heads=self.heads,
            dtype=self.dtype,
            implementation=self.attention,
            qkv_bias=self.qkv_bias,
            bias=self.bias,
            name="attn",
        )
        y = norm(self.norm, self.norm_eps, self.dtype, "norm1")(x)
        x = x + _scale_branch(attention(y, mask, rope), branch_scales, 0)
        mlp = Mlp(int(x.shape[-1] * self.mlp_ratio), self.dtype, self.bias, name="mlp")
        y = norm(self.norm, self.norm_eps, self.dtype, "norm2")(x)
        x = x + _scale_branch(mlp(y), branch_scales, 1)
        self.sow("intermediates", "tokens", x)
        return x


class PostNormBlock(nn.Module, kw_only=True):
    """Post-norm Transformer block: y = norm(x + SelfAttention(x)); x = norm(y + MLP(y)).

    The attributes are those of `Block`.

    Source: data2vec 2.0's released `AltBlock`.
    """

    heads: int
    mlp_ratio: float
    norm_eps: float
    dtype: Dtype
    attention: str
    qkv_bias: QkvBias = True
    bias: bool = True
    norm: str = "layer"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        mask: Bool[Array, "B T"] | None = None,
        branch_scales: Float[Array, "B 2"] | None = None,
        rope: Rope | None = None,
    ) -> Float[Array, "B T D"]:
        """Apply the block; arguments as those of `Block`."""
        attention = Attention(
            heads=self.heads,
            dtype=self.dtype,
            implementation=self.attention,
            qkv_bias=self.qkv_bias,
            bias=self.bias,
            name="attn",
        )
        x = x + _scale_branch(attention(x, mask, rope), branch_scales, 0)
        x = norm(self.norm, self.norm_eps, self.dtype, "norm1")(x)
        mlp = Mlp(int(x.shape[-1] * self.mlp_ratio), self.dtype, self.bias, name="mlp")
        y = mlp(x)
        self.sow("intermediates", "mlp_output", y)
        x = x + _scale_branch(y, branch_scales, 1)
        x = norm(self.norm, self.norm_eps, self.dtype, "norm2")(x)
        self.sow("intermediates", "tokens", x)
        return x


def _scale_branch(y: Array, branch_scales: Array | None, index: int) -> Array:
    """Multiply a branch's output [B, T, D] by each image's factor for it."""
    if branch_scales is None:
        return y
    return y * branch_scales[:, index, None, None].astype(y.dtype)


class QueryBlock(nn.Module, kw_only=True):
    """Pre-norm block of tokens that do not see each other, only a context.

    x += CrossAttention(norm x, context); x += MLP(norm x). The attributes are those of `Block`.
    """

    heads: int
    mlp_ratio: float
    norm_eps: float
    dtype: Dtype
    attention: str
    qkv_bias: QkvBias = True
    bias: bool = True
    norm: str = "layer"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Float[Array, "B S E"],
        branch_scales: Float[Array, "B 2"] | None = None,
        rope: Rope | None = None,
        context_rope: Rope | None = None,
        mask: Bool[Array, "B S"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Apply the block to the tokens x; the context does not change, and has no norm.

        Args:
          x: tokens.
          context: what they attend to.
          branch_scales: factors of the attention and the MLP of every image; None: 1.
          rope: turns queries; None: they are taken as they are.
          context_rope: turns keys.
          mask: True for what may be attended to; None: all of the context.
        """
        attention = CrossAttention(
            heads=self.heads,
            dtype=self.dtype,
            implementation=self.attention,
            qkv_bias=self.qkv_bias,
            bias=self.bias,
            name="attn",
        )
        y = norm(self.norm, self.norm_eps, self.dtype, "norm1")(x)
        y = attention(y, context, rope, context_rope, mask)
        x = x + _scale_branch(y, branch_scales, 0)
        mlp = Mlp(int(x.shape[-1] * self.mlp_ratio), self.dtype, self.bias, name="mlp")
        y = norm(self.norm, self.norm_eps, self.dtype, "norm2")(x)
        return x + _scale_branch(mlp(y), branch_scales, 1)


class CrossBlock(nn.Module, kw_only=True):
    """Pre-norm decoder block: self-attention, cross-attention, MLP.

    x += SelfAttention(LN x); x += CrossAttention(LN x, LN context); x += MLP(LN x). The attributes
    are those of `Block`.
    """

    heads: int
    mlp_ratio: float
    norm_eps: float
    dtype: Dtype
    attention: str
    qkv_bias: QkvBias = True

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], context: Float[Array, "B S E"]
    ) -> Float[Array, "B T D"]:
        """Apply the block to the tokens x; the context does not change."""
        attention: dict[str, Any] = dict(
            heads=self.heads,
            dtype=self.dtype,
            implementation=self.attention,
            qkv_bias=self.qkv_bias,
        )
        y = layer_norm(self.norm_eps, self.dtype, "norm1")(x)
        x = x + Attention(**attention, name="self_attn")(y)
        y = layer_norm(self.norm_eps, self.dtype, "norm2q")(x)
        context = layer_norm(self.norm_eps, self.dtype, "norm2kv")(context)
        x = x + CrossAttention(**attention, name="cross_attn")(y, context)
        y = layer_norm(self.norm_eps, self.dtype, "norm3")(x)
        return x + Mlp(int(x.shape[-1] * self.mlp_ratio), self.dtype, name="mlp")(y)
