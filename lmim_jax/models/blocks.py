"""Transformer blocks: attention, cross-attention, MLP.

Letters: B batch, T S tokens, D width, E width of the context, A attention heads.
"""

from typing import Any

import flax.linen as nn
import numpy as np
from jaxtyping import Array, Bool, Float

from lmim_jax.models import tpu_attention
from lmim_jax.models.attention import attend, attention_weights, uses_tpu_kernel
from lmim_jax.models.layers import Dense, Dtype, gelu, layer_norm

QkvBias = bool | tuple[bool, bool, bool]  # of queries, keys and values alike, or of each


class Attention(nn.Module, kw_only=True):
    """Multi-head self-attention with one fused projection, ordered (q, k, v) on the output axis.

    Heads are floor(D / A) wide, also where A does not divide D.

    Attributes:
      heads: A.
      dtype: of the computation.
      implementation: see `attention.attend`.
      qkv_bias: whether queries, keys and values have a bias.
    """

    heads: int
    dtype: Dtype
    implementation: str
    qkv_bias: QkvBias = True

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], mask: Bool[Array, "B T"] | None = None
    ) -> Float[Array, "B T D"]:
        """Attend from every token to the tokens where `mask` is True."""
        batch, tokens, width = x.shape
        head_width = width // self.heads
        project = Dense(3 * self.heads * head_width, self.dtype, self.qkv_bias, name="qkv")
        maps_requested = self.is_mutable_collection("intermediates")
        sizes = (tokens, tokens, self.heads * head_width)
        if not maps_requested and uses_tpu_kernel(self.implementation, self.dtype, *sizes, mask):
            x = tpu_attention.attend_self(project(x), self.heads)
            return Dense(width, self.dtype, name="proj")(x)
        query, key, value = project.by_head(x, 3, self.heads)
        if maps_requested:
            self.sow("intermediates", "attention", attention_weights(query, key))
        x = attend(query, key, value, self.implementation, mask)
        x = x.reshape(batch, tokens, -1)
        return Dense(width, self.dtype, name="proj")(x)


class CrossAttention(nn.Module, kw_only=True):
    """Multi-head attention to a context of any width, whose fused projection is ordered (k, v).

    Attributes:
      heads: A.
      dtype: of the computation.
      implementation: see `attention.attend`.
      qkv_bias: whether queries, keys and values have a bias.
    """

    heads: int
    dtype: Dtype
    implementation: str
    qkv_bias: QkvBias = True

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], context: Float[Array, "B S E"]
    ) -> Float[Array, "B T D"]:
        """Attend from every token to all of the context."""
        batch, tokens, width = x.shape
        head_width = width // self.heads
        query_bias, key_bias, value_bias = np.broadcast_to(self.qkv_bias, 3).tolist()
        query = Dense(self.heads * head_width, self.dtype, query_bias, name="q")(x)
        kv_bias = (key_bias, value_bias)
        project = Dense(2 * self.heads * head_width, self.dtype, kv_bias, name="kv")
        sizes = (tokens, context.shape[1], self.heads * head_width)
        if uses_tpu_kernel(self.implementation, self.dtype, *sizes):
            x = tpu_attention.attend_cross(query, project(context), self.heads)
            return Dense(width, self.dtype, name="proj")(x)
        query = query.reshape(batch, tokens, -1, head_width)
        key, value = project.by_head(context, 2, self.heads)
        x = attend(query, key, value, self.implementation)
        x = x.reshape(batch, tokens, -1)
        return Dense(width, self.dtype, name="proj")(x)


class Mlp(nn.Module):
    """Linear layer, exact GELU, linear layer.

    Attributes:
      hidden: width between the two layers.
      dtype: of the computation.
    """

    hidden: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Apply the layers to every token."""
        width = x.shape[-1]
        x = Dense(self.hidden, self.dtype, name="fc1")(x)
        return Dense(width, self.dtype, name="fc2")(gelu(x))


class Block(nn.Module, kw_only=True):
    """Pre-norm Transformer block: x += SelfAttention(LN x); x += MLP(LN x).

    Attributes:
      heads: A.
      mlp_ratio: hidden width of the MLP, in widths of the block.
      norm_eps: epsilon of the LayerNorms.
      dtype: of the computation.
      attention: implementation of attention, see `attention.attend`.
      qkv_bias: whether queries, keys and values have a bias.
    """

    heads: int
    mlp_ratio: float
    norm_eps: float
    dtype: Dtype
    attention: str
    qkv_bias: QkvBias = True

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        mask: Bool[Array, "B T"] | None = None,
        branch_scales: Float[Array, "B 2"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Apply the block.

        Args:
          x: tokens.
          mask: True where a token may be attended to; None: every token may.
          branch_scales: factors of the attention and the MLP of every image; None: 1.
        """
        attention = Attention(
            heads=self.heads,
            dtype=self.dtype,
            implementation=self.attention,
            qkv_bias=self.qkv_bias,
            name="attn",
        )
        y = layer_norm(self.norm_eps, self.dtype, "norm1")(x)
        x = x + _scale_branch(attention(y, mask), branch_scales, 0)
        mlp = Mlp(int(x.shape[-1] * self.mlp_ratio), self.dtype, name="mlp")
        y = layer_norm(self.norm_eps, self.dtype, "norm2")(x)
        x = x + _scale_branch(mlp(y), branch_scales, 1)
        self.sow("intermediates", "tokens", x)
        return x


def _scale_branch(y: Array, branch_scales: Array | None, index: int) -> Array:
    """Multiply a branch's output [B, T, D] by each image's factor for it."""
    if branch_scales is None:
        return y
    return y * branch_scales[:, index, None, None].astype(y.dtype)


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
