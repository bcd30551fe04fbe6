"""Decoders: from visible tokens to a prediction for every masked patch.

Letters: B batch, V visible, M masked, D encoder width, d decoder width, P = p p C pixels of a patch.
"""

import functools

import flax.linen as nn
import jax.numpy as jnp

from lmim_jax.models.blocks import Block, CrossBlock
from lmim_jax.models.layer_stack import run_blocks
from lmim_jax.models.layers import Dense, Dtype, layer_norm, matmul


def visual_cues(visible, visible_positions, masked_positions):
    """A soft guess for every masked patch: visible tokens averaged by closeness of position, [B, M, d].

    sum_j softmax_j(pe_i . pe_j / sqrt(d)) h_j over the visible patches j (CLS left out).

    Args:
      visible: [B, V, d] embedded visible tokens; visible_positions: [B, V, d]; masked_positions: [B, M, d].

    Source: Latent MIM section 3.4; official `avg_vis_mask_token`.
    """
    # Scores in float32: they come from constants, and decide the weights of all that follows.
    scores = (
        jnp.einsum("bmd,bvd->bmv", masked_positions, visible_positions) * visible.shape[-1] ** -0.5
    )
    return nn.softmax(scores).astype(visible.dtype) @ visible


class LatentDecoder(nn.Module):
    """Predicts the latent of every masked patch from the visible tokens.

    One token per masked patch: mask token + visual cue + position.
    kind "cross": [a CLS of its own, masked] through blocks of self-attention, cross-attention to the encoder's
    CLS and visible tokens, MLP (the paper's decoder).
    kind "self": [encoder's CLS, visible, masked] through plain blocks of the same depth and width.
    """

    kind: str
    width: int
    depth: int
    heads: int
    out_width: int
    visual_cues: bool
    mlp_ratio: float
    norm_eps: float
    dtype: Dtype
    attention: str

    @nn.compact
    def __call__(self, tokens, visible_positions, masked_positions):
        """Projected tokens [B, 1 + V, D], positions [B, V, d] and [B, M, d] -> CLS and predictions [B, 1 + M, D]."""
        masked = masked_positions.shape[1]
        mask = self.param("mask_token", nn.initializers.zeros, (1, 1, self.width)).astype(
            self.dtype
        )
        h = Dense(self.width, self.dtype, name="embed")(tokens)
        context = h + jnp.pad(visible_positions, ((0, 0), (1, 0), (0, 0))).astype(
            self.dtype
        )  # CLS: position zero
        queries = mask + masked_positions.astype(self.dtype)
        if self.visual_cues:
            queries = queries + visual_cues(h[:, 1:], visible_positions, masked_positions)
        block = (self.heads, self.mlp_ratio, self.norm_eps, self.dtype, self.attention)
        if self.kind == "cross":
            cls = self.param("cls_token", nn.initializers.normal(0.02), (1, 1, self.width)).astype(
                self.dtype
            )
            x = jnp.concatenate(
                [jnp.broadcast_to(cls, (len(queries), 1, self.width)), queries], axis=1
            )
            x = run_blocks(self, functools.partial(CrossBlock, *block), self.depth, x, context)
        elif self.kind == "self":
            x = jnp.concatenate([context, queries], axis=1)
            x = run_blocks(self, functools.partial(Block, *block), self.depth, x)
            x = jnp.concatenate([x[:, :1], x[:, -masked:]], axis=1)
        else:
            raise ValueError(f"unknown decoder {self.kind!r}: cross | self")
        return Dense(self.out_width, self.dtype, name="head")(
            layer_norm(self.norm_eps, self.dtype, "norm")(x)
        )


class TokenDecoder(nn.Module):
    """Plain blocks over the encoder's tokens and one mask token per patch to be predicted.

    MAE's decoder, both of PiLaMIM's, and I-JEPA's predictor.
    """

    width: int
    depth: int
    heads: int
    out_width: int
    mlp_ratio: float
    norm_eps: float
    dtype: Dtype
    attention: str
    qkv_bias: bool = True
    final_norm: bool = True

    @nn.compact
    def __call__(self, tokens, positions, masked_positions, mask=None):
        """Encoder tokens to predictions of all of them and of the masked patches, the latter last: [B, T + M, out].

        Args:
          tokens: [B, T, D]. positions: [B or 1, T, d], of CLS too where there is one. masked_positions: [B, M, d].
          mask: bool [B, T + M], True = this token may be looked at; None: all.
        """
        token = self.param("mask_token", nn.initializers.normal(0.02), (1, 1, self.width)).astype(
            self.dtype
        )
        known = Dense(self.width, self.dtype, name="embed")(tokens) + positions.astype(self.dtype)
        x = jnp.concatenate([known, token + masked_positions.astype(self.dtype)], axis=1)
        block = (
            self.heads,
            self.mlp_ratio,
            self.norm_eps,
            self.dtype,
            self.attention,
            self.qkv_bias,
        )
        x = run_blocks(self, functools.partial(Block, *block), self.depth, x, mask)
        x = layer_norm(self.norm_eps, self.dtype, "norm")(x) if self.final_norm else x
        return Dense(self.out_width, self.dtype, name="head")(x)


class TargetAwareDecoder(nn.Module):
    """Predicts something of every masked patch from the encoder's last tokens and the features of one of its layers.

    [CLS, visible, mask token + position] through blocks of self-attention, cross-attention to those features, MLP.
    So what a target needs of the visible patches (such as their pixels) can bypass the encoder's last layers.
    Only masked patches have a position here. head: the module behind the final norm.
    Source: BootMAE, section 3.
    """

    width: int
    depth: int
    heads: int
    head: nn.Module
    mlp_ratio: float
    norm_eps: float
    dtype: Dtype
    attention: str
    qkv_bias: bool | tuple[bool, bool, bool]

    @nn.compact
    def __call__(self, tokens, context, positions):
        """Tokens [B, 1 + V, D], context [B, 1 + V, D], positions [B, M, d] of the masked -> [B, M, out]."""
        init = nn.initializers.truncated_normal(0.02, lower=-1.0, upper=1.0)
        mask = self.param("mask_token", init, (1, 1, self.width)).astype(self.dtype)
        x = Dense(self.width, self.dtype, name="embed")(tokens)
        x = jnp.concatenate([x, mask + positions.astype(self.dtype)], axis=1)
        block = self.heads, self.mlp_ratio, self.norm_eps, self.dtype, self.attention, self.qkv_bias
        x = run_blocks(self, functools.partial(CrossBlock, *block), self.depth, x, context)
        return self.head(layer_norm(self.norm_eps, self.dtype, "norm")(x[:, -positions.shape[1] :]))


class PixelHead(nn.Module):
    """A transposed convolution as wide as its stride: a linear layer to the pixels of a patch, one bias per channel."""

    patch_size: int
    channels: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x):
        """[B, M, d] -> [B, M, P], ordered (row, column, channel)."""
        pixels = self.patch_size**2
        init = nn.initializers.variance_scaling(
            1 / 3, "fan_out", "uniform"
        )  # torch's: within 1 / sqrt(P)
        kernel = self.param("kernel", init, (x.shape[-1], pixels * self.channels)).astype(
            self.dtype
        )
        bias = self.param("bias", nn.initializers.zeros, (self.channels,)).astype(self.dtype)
        y = (
            matmul(x.reshape(-1, x.shape[-1]).astype(self.dtype), kernel)
            + jnp.tile(bias, pixels)[None]
        )
        return y.reshape(*x.shape[:-1], -1)
