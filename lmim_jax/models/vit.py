"""The Vision Transformer encoder and the projector behind it.

Letters: B batch, T tokens, N patches, P pixel values of a patch, D width.
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lmim_jax.models.blocks import Block, QkvBias
from lmim_jax.models.layer_stack import run_blocks
from lmim_jax.models.layers import Dense, Dtype, gelu, layer_norm

# Sizes by their usual names ("An Image is Worth 16x16 Words", table 1; DeiT for Ti and S).
VARIANTS = {
    "Ti/16": dict(width=192, depth=12, heads=3, patch_size=16),
    "S/16": dict(width=384, depth=12, heads=6, patch_size=16),
    "B/16": dict(width=768, depth=12, heads=12, patch_size=16),
    "L/16": dict(width=1024, depth=24, heads=16, patch_size=16),
    "H/14": dict(width=1280, depth=32, heads=16, patch_size=14),
}


class ViT(nn.Module, kw_only=True):
    """Vision Transformer: patch embedding + positions, CLS token, pre-norm blocks, final LayerNorm.

    It sees only the patches that it is given: masking means leaving patches out. The CLS token has
    no position. Parameters: patch_embed, cls_token [1, 1, D], block00 .. , norm.

    Attributes:
      width: D.
      depth: number of blocks.
      heads: attention heads of a block.
      mlp_ratio: hidden width of an MLP / D.
      norm_eps: epsilon of the LayerNorms of the blocks.
      dtype: of the computation; parameters are float32.
      attention: implementation of attention, see `attention.attend`.
      qkv_bias: whether queries, keys and values have a bias.
      cls: whether there is a CLS token, in front of the patches.
      final_norm_eps: epsilon of the last LayerNorm; None: norm_eps.
    """

    width: int
    depth: int
    heads: int
    mlp_ratio: float
    norm_eps: float
    dtype: Dtype
    attention: str
    qkv_bias: QkvBias = True
    cls: bool = True
    final_norm_eps: float | None = None

    @nn.compact
    def __call__(
        self,
        patches: Float[Array, "B N P"],
        positions: Float[Array, "#B N D"],
        mask: Bool[Array, "B N"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
        """Encode patches.

        Args:
          patches: pixel values of the visible patches.
          positions: their position embeddings, for every image or for all alike.
          mask: True where a patch may be attended to; None: all may.

        Returns:
          Tokens after and before the final norm, T = 1 + N with CLS in row 0, or T = N without one.
        """
        embedded = Dense(self.width, self.dtype, name="patch_embed")(patches)
        x = embedded + positions.astype(self.dtype)
        if self.cls:
            cls = self.param("cls_token", nn.initializers.normal(0.02), (1, 1, self.width))
            cls = cls.astype(self.dtype)
            cls = jnp.broadcast_to(cls, (len(x), 1, self.width))
            x = jnp.concatenate([cls, x], axis=1)
            if mask is not None:
                mask = jnp.pad(mask, [(0, 0), (1, 0)], constant_values=True)
        make_block = functools.partial(
            Block,
            heads=self.heads,
            mlp_ratio=self.mlp_ratio,
            norm_eps=self.norm_eps,
            dtype=self.dtype,
            attention=self.attention,
            qkv_bias=self.qkv_bias,
        )
        x = run_blocks(self, make_block, self.depth, x, mask=mask)
        final_norm = layer_norm(self.final_norm_eps or self.norm_eps, self.dtype, "norm")
        return final_norm(x), x


def features(
    encoder: ViT,
    params: dict[str, Any],
    patches: Float[Array, "B N P"],
    positions: Float[Array, "#B N D"],
    mask: Bool[Array, "B N"] | None = None,
) -> dict[str, Array]:
    """Compute the features of full images by name. Under `jit`, unused ones are not computed.

    Args:
      encoder: the network.
      params: its parameters.
      patches: all patches of the images.
      positions: their position embeddings.
      mask: False for patches that only pad the images of a batch to equal length; None: there are
        none. The features of such patches, and attention, mean nothing.

    Returns:
      cls [B, D] and patches [B, N, D] after the final norm; cls_prenorm and patches_prenorm before
      it; block00/tokens [B, 1 + N, D] and block00/attention [B, A, 1 + N, 1 + N] (A heads) of every
      block. An encoder without CLS token gives no cls, and one row less.
    """
    (tokens, prenorm), state = encoder.apply(
        {"params": params}, patches, positions, mask, mutable=["intermediates"]
    )
    first_patch = int(encoder.cls)
    named = {"patches": tokens[:, first_patch:], "patches_prenorm": prenorm[:, first_patch:]}
    if encoder.cls:
        named["cls"] = tokens[:, 0]
        named["cls_prenorm"] = prenorm[:, 0]
    for name, block in state["intermediates"].items():
        named[f"{name}/tokens"] = block["tokens"][0]
        named[f"{name}/attention"] = block["attn"]["attention"][0]
    return named


class Projector(nn.Module, kw_only=True):
    """Bias-free linear layers with LayerNorm after each and GELU between: D -> hidden -> ... -> D.

    The norms' epsilon is 1e-5, as in the official `encoder.head` (the blocks use 1e-6).

    Attributes:
      depth: number of linear layers; 0 is the identity.
      hidden: width between them.
      dtype: of the computation.
    """

    depth: int
    hidden: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Project every token."""
        width = x.shape[-1]
        last = self.depth - 1
        for i in range(self.depth):
            features = width if i == last else self.hidden
            x = Dense(features, self.dtype, name=f"linear{i}", use_bias=False)(x)
            x = layer_norm(1e-5, self.dtype, f"norm{i}")(x)
            if i != last:
                x = gelu(x)
        return x
