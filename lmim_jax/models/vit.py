"""The Vision Transformer encoder and the projector behind it.

Letters: B batch, T tokens, P pixels of a patch, D width.
"""

import functools

import flax.linen as nn
import jax.numpy as jnp

from lmim_jax.models.blocks import Block
from lmim_jax.models.layer_stack import run_blocks
from lmim_jax.models.layers import Dense, Dtype, gelu, layer_norm

# Sizes by their usual names (An Image is Worth 16x16 Words, table 1; DeiT for Ti and S).
VARIANTS = {
    "Ti/16": dict(width=192, depth=12, heads=3, patch_size=16),
    "S/16": dict(width=384, depth=12, heads=6, patch_size=16),
    "B/16": dict(width=768, depth=12, heads=12, patch_size=16),
    "L/16": dict(width=1024, depth=24, heads=16, patch_size=16),
    "H/14": dict(width=1280, depth=32, heads=16, patch_size=14),
}


class ViT(nn.Module):
    """Linear patch embedding + positions, CLS in front (without position), pre-LN blocks, final LayerNorm.

    It sees just the patches it is given: masking is leaving patches out.
    Parameters: patch_embed, cls_token [1, 1, D], block00 .. , norm.
    """

    width: int
    depth: int
    heads: int
    mlp_ratio: float
    norm_eps: float
    dtype: Dtype
    attention: str
    qkv_bias: bool | tuple[bool, bool, bool] = True
    cls: bool = True
    final_norm_eps: float | None = None  # None: norm_eps

    @nn.compact
    def __call__(self, patches, positions, mask=None):
        """Patches [B, T, P], positions [B or 1, T, D] -> tokens after and before the final norm, [B, 1 + T, D] each.

        Row 0 is CLS; without one, [B, T, D]. mask: bool [B, T], True = this token may be looked at (only without CLS).
        """
        x = Dense(self.width, self.dtype, name="patch_embed")(patches) + positions.astype(
            self.dtype
        )
        if self.cls:
            cls = self.param("cls_token", nn.initializers.normal(0.02), (1, 1, self.width)).astype(
                self.dtype
            )
            x = jnp.concatenate([jnp.broadcast_to(cls, (len(x), 1, self.width)), x], axis=1)
        block = (
            self.heads,
            self.mlp_ratio,
            self.norm_eps,
            self.dtype,
            self.attention,
            self.qkv_bias,
        )
        x = run_blocks(self, functools.partial(Block, *block), self.depth, x, mask)
        return layer_norm(self.final_norm_eps or self.norm_eps, self.dtype, "norm")(x), x


def features(encoder, params, patches, positions):
    """All that a frozen encoder knows of full images, by name.

    Args:
      encoder: a ViT. params: its parameters. patches: [B, N, P]. positions: [B or 1, N, D].

    Returns:
      cls [B, D], patches [B, N, D] after the final norm; cls_prenorm and patches_prenorm before it;
      block00/tokens [B, 1 + N, D] and block00/attention [B, A, 1 + N, 1 + N] (A heads) of every block.
      An encoder without CLS has no cls, and one row less. Under `jit`, what is not used is not computed.
    """
    (tokens, prenorm), state = encoder.apply(
        {"params": params}, patches, positions, mutable=["intermediates"]
    )
    first = int(encoder.cls)
    out = {"patches": tokens[:, first:], "patches_prenorm": prenorm[:, first:]}
    out |= {"cls": tokens[:, 0], "cls_prenorm": prenorm[:, 0]} if encoder.cls else {}
    for name, block in state["intermediates"].items():
        out[f"{name}/tokens"], out[f"{name}/attention"] = (
            block["tokens"][0],
            block["attn"]["attention"][0],
        )
    return out


class Projector(nn.Module):
    """`depth` bias-free linear layers with LayerNorm after each and GELU between: D -> hidden -> ... -> D.

    Norm eps is 1e-5 as in the official `encoder.head` (the blocks use 1e-6). Depth 0 is the identity.
    """

    depth: int
    hidden: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x):
        """[B, T, D] -> [B, T, D]."""
        width = x.shape[-1]
        for i in range(self.depth):
            last = i == self.depth - 1
            x = Dense(
                width if last else self.hidden, self.dtype, name=f"linear{i}", use_bias=False
            )(x)
            x = layer_norm(1e-5, self.dtype, f"norm{i}")(x)
            x = x if last else gelu(x)
        return x
