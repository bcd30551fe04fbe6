"""Decoders: from visible tokens to a prediction for every masked patch.

Letters: B batch, V visible patches, M masked patches, T encoder tokens, D encoder width, d decoder
width, P = p p C pixel values of a patch, O width of the prediction.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lmim_jax.models.blocks import Block, CrossBlock, QkvBias, QueryBlock
from lmim_jax.models.layer_stack import run_blocks
from lmim_jax.models.layers import Dense, Dtype, layer_norm, matmul, norm
from lmim_jax.models.modalities import predict_patches
from lmim_jax.models.rope import make_rope


def visual_cues(
    visible: Float[Array, "B V d"],
    visible_positions: Float[Array, "B V d"],
    masked_positions: Float[Array, "B M d"],
) -> Float[Array, "B M d"]:
    """Average visible tokens by closeness of position: a soft guess for every masked patch.

    sum_j softmax_j(pe_i . pe_j / sqrt(d)) h_j over the visible patches j, without CLS.

    Args:
      visible: embedded visible tokens h.
      visible_positions: position embeddings of the visible patches.
      masked_positions: position embeddings of the masked patches.

    Source: Latent MIM section 3.4; official `avg_vis_mask_token`.
    """
    # Scores in float32: they depend on constants only, and are the weights of all that follows.
    scores = jnp.einsum("bmd,bvd->bmv", masked_positions, visible_positions, precision="highest")
    scores = scores * visible.shape[-1] ** -0.5
    return nn.softmax(scores).astype(visible.dtype) @ visible


class LatentDecoder(nn.Module, kw_only=True):
    """Predicts the latent of every masked patch from the visible tokens.

    There is one token per masked patch: mask token + visual cue + position.

    Attributes:
      kind: "cross" (the paper's decoder) runs [own CLS, masked] through blocks of self-attention,
        cross-attention to the encoder's CLS and visible tokens, and MLP; "self" runs [encoder's
        CLS, visible, masked] through plain blocks of the same depth and width.
      width: d.
      depth: number of blocks.
      heads: attention heads of a block.
      out_width: O.
      visual_cues: whether mask tokens include the visual cue.
      predict_visible: whether visible patches are predicted too; then "cross" has their tokens
        among its own.
      mlp_ratio: hidden width of an MLP / d.
      norm_eps: epsilon of the LayerNorms.
      dtype: of the computation.
      attention: implementation of attention, see `attention.attend`.
    """

    kind: str
    width: int
    depth: int
    heads: int
    out_width: int
    visual_cues: bool
    predict_visible: bool
    mlp_ratio: float
    norm_eps: float
    dtype: Dtype
    attention: str

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "B T D"],
        visible_positions: Float[Array, "B V d"],
        masked_positions: Float[Array, "B M d"],
        noise: Float[Array, "B M D"] | None = None,
    ) -> Float[Array, "B _ O"]:
        """Predict the latents of CLS, of visible patches if they are predicted, and of masked ones.

        Args:
          tokens: projected tokens of CLS and the visible patches, T = 1 + V.
          visible_positions: position embeddings of the visible patches.
          masked_positions: position embeddings of the masked patches.
          noise: what mask tokens are made of, instead of the learned one; None: that.

        Raises:
          ValueError: unknown `kind`.
        """
        mask_token = self.param("mask_token", nn.initializers.zeros, (1, 1, self.width))
        mask_token = mask_token.astype(self.dtype)
        embed = Dense(self.width, self.dtype, name="embed")
        h = embed(tokens)
        positions = jnp.pad(visible_positions, ((0, 0), (1, 0), (0, 0)))  # CLS: position zero
        context = h + positions.astype(self.dtype)
        if noise is not None:
            mask_token = embed(noise)
        queries = mask_token + masked_positions.astype(self.dtype)
        if self.visual_cues:
            queries = queries + visual_cues(h[:, 1:], visible_positions, masked_positions)

        if self.kind == "cross":
            cls = self.param("cls_token", nn.initializers.normal(0.02), (1, 1, self.width))
            cls = cls.astype(self.dtype)
            cls = jnp.broadcast_to(cls, (len(queries), 1, self.width))
            if self.predict_visible:
                queries = jnp.concatenate([context[:, 1:], queries], axis=1)
            x = jnp.concatenate([cls, queries], axis=1)
            x = run_blocks(self, self._make(CrossBlock), self.depth, x, context=context)
        elif self.kind == "self":
            x = jnp.concatenate([context, queries], axis=1)
            x = run_blocks(self, self._make(Block), self.depth, x)
            if not self.predict_visible:
                cls = x[:, :1]
                masked = x[:, -masked_positions.shape[1] :]
                x = jnp.concatenate([cls, masked], axis=1)
        else:
            raise ValueError(f"decoder {self.kind!r} must be one of: cross, self")
        x = layer_norm(self.norm_eps, self.dtype, "norm")(x)
        return Dense(self.out_width, self.dtype, name="head")(x)

    def _make(self, block: type[nn.Module]) -> Callable[..., nn.Module]:
        return functools.partial(
            block,
            heads=self.heads,
            mlp_ratio=self.mlp_ratio,
            norm_eps=self.norm_eps,
            dtype=self.dtype,
            attention=self.attention,
        )


class TokenDecoder(nn.Module, kw_only=True):
    """Plain blocks over the encoder's tokens and one mask token per patch to predict.

    MAE's decoder, both decoders of PiLaMIM, and I-JEPA's predictor.

    Attributes:
      width: d.
      depth: number of blocks.
      heads: attention heads of a block.
      out_width: O.
      mlp_ratio: hidden width of an MLP / d.
      norm_eps: epsilon of the LayerNorms.
      dtype: of the computation.
      attention: implementation of attention, see `attention.attend`.
      qkv_bias: whether queries, keys and values have a bias.
      final_norm: whether a LayerNorm precedes the last linear layer.
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
    def __call__(
        self,
        tokens: Float[Array, "B T D"],
        positions: Float[Array, "#B T d"],
        masked_positions: Float[Array, "B M d"],
        mask: Bool[Array, "B T+M"] | None = None,
        noise: Float[Array, "B M D"] | None = None,
    ) -> Float[Array, "B T+M O"]:
        """Predict something of every token and every masked patch, the latter last.

        Args:
          tokens: the encoder's tokens.
          positions: their position embeddings, that of CLS included where there is one.
          masked_positions: position embeddings of the patches to predict.
          mask: True where a token may be attended to; None: all may.
          noise: what mask tokens are made of, instead of the learned one; None: that.
        """
        mask_token = self.param("mask_token", nn.initializers.normal(0.02), (1, 1, self.width))
        mask_token = mask_token.astype(self.dtype)
        embed = Dense(self.width, self.dtype, name="embed")
        embedded = embed(tokens)
        embedded = embedded + positions.astype(self.dtype)
        if noise is not None:
            mask_token = embed(noise)
        queries = mask_token + masked_positions.astype(self.dtype)
        x = jnp.concatenate([embedded, queries], axis=1)
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
        if self.final_norm:
            x = layer_norm(self.norm_eps, self.dtype, "norm")(x)
        return Dense(self.out_width, self.dtype, name="head")(x)


class QueryDecoder(nn.Module, kw_only=True):
    """Predicts every masked patch from the encoder's tokens alone, not from other masked ones.

    Mask token + position of each masked patch pass through blocks of cross-attention to the
    embedded tokens, and MLP.

    Attributes:
      width: d.
      depth: number of blocks.
      heads: attention heads of a block.
      out_width: O.
      mlp_ratio: hidden width of an MLP / d.
      norm_eps: epsilon of the LayerNorms.
      dtype: of the computation.
      attention: implementation of attention, see `attention.attend`.
      modalities: (name, values to predict) of each, with a last layer of its own; (): one layer.

    Source: Interactive MIM (arXiv 2409.08885): masked tokens are queries, the unmasked tokens of
    all modalities keys and values.
    """

    width: int
    depth: int
    heads: int
    out_width: int
    mlp_ratio: float
    norm_eps: float
    dtype: Dtype
    attention: str
    modalities: tuple[tuple[str, int], ...] = ()

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "B T D"],
        positions: Float[Array, "#B T d"],
        masked_positions: Float[Array, "B M d"],
    ) -> Float[Array, "B M O"]:
        """Predict the masked patches; arguments as in `TokenDecoder`."""
        mask_token = self.param("mask_token", nn.initializers.normal(0.02), (1, 1, self.width))
        context = Dense(self.width, self.dtype, name="embed")(tokens)
        context = context + positions.astype(self.dtype)
        context = layer_norm(self.norm_eps, self.dtype, "context_norm")(context)
        x = mask_token.astype(self.dtype) + masked_positions.astype(self.dtype)
        make_block = functools.partial(
            QueryBlock,
            heads=self.heads,
            mlp_ratio=self.mlp_ratio,
            norm_eps=self.norm_eps,
            dtype=self.dtype,
            attention=self.attention,
        )
        x = run_blocks(self, make_block, self.depth, x, context=context)
        x = layer_norm(self.norm_eps, self.dtype, "norm")(x)
        return predict_patches(x, self.modalities, self.out_width, self.dtype)


class TargetAwareDecoder(nn.Module, kw_only=True):
    """Predicts every masked patch from the encoder's last tokens and the features of one layer.

    [CLS, visible, mask token + position] pass through blocks of self-attention, cross-attention to
    those features, and MLP. So what a target needs of the visible patches (such as their pixels)
    can bypass the encoder's last layers. Only masked patches have a position here.

    Attributes:
      width: d.
      depth: number of blocks.
      heads: attention heads of a block.
      head: the module after the final norm, d -> O.
      mlp_ratio: hidden width of an MLP / d.
      norm_eps: epsilon of the LayerNorms.
      dtype: of the computation.
      attention: implementation of attention, see `attention.attend`.
      qkv_bias: whether queries, keys and values have a bias.

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
    qkv_bias: QkvBias

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "B T D"],
        context: Float[Array, "B T D"],
        positions: Float[Array, "B M d"],
    ) -> Float[Array, "B M O"]:
        """Predict the masked patches.

        Args:
          tokens: the encoder's tokens of CLS and the visible patches, T = 1 + V.
          context: features of the same tokens at another layer.
          positions: position embeddings of the masked patches.
        """
        init = nn.initializers.truncated_normal(0.02, lower=-1.0, upper=1.0)
        mask_token = self.param("mask_token", init, (1, 1, self.width)).astype(self.dtype)
        embedded = Dense(self.width, self.dtype, name="embed")(tokens)
        queries = mask_token + positions.astype(self.dtype)
        x = jnp.concatenate([embedded, queries], axis=1)
        make_block = functools.partial(
            CrossBlock,
            heads=self.heads,
            mlp_ratio=self.mlp_ratio,
            norm_eps=self.norm_eps,
            dtype=self.dtype,
            attention=self.attention,
            qkv_bias=self.qkv_bias,
        )
        x = run_blocks(self, make_block, self.depth, x, context=context)
        masked = x[:, -positions.shape[1] :]
        return self.head(layer_norm(self.norm_eps, self.dtype, "norm")(masked))


class CrossPredictor(nn.Module, kw_only=True):
    """Predicts something at any coordinates from the encoder's tokens, each without the others.

    Copies of one mask token pass through blocks of cross-attention to the tokens and MLP. Where
    they are is told by rotary embeddings alone. All norms are RMSNorms; the last one has no scale.
    No linear layer has a bias.

    Attributes:
      width: d.
      depth: number of blocks.
      heads: attention heads of a block.
      mlp_ratio: hidden width of an MLP / d.
      norm_eps: epsilon of the norms.
      dtype: of the computation.
      attention: implementation of attention, see `attention.attend`.
      rope: see `rope.PARTS`.
      rope_frequencies: see `rope.make_rope`.

    Source: CAPI (Darcet et al. 2025), section 3.
    """

    width: int
    depth: int
    heads: int
    mlp_ratio: float
    norm_eps: float
    dtype: Dtype
    attention: str
    rope: str
    rope_frequencies: tuple[float, float]

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "B T D"],
        token_coordinates: Float[Array, "#B T 2"],
        coordinates: Float[Array, "#B M 2"],
        branch_scales: Float[Array, "B depth 2"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
    ) -> Float[Array, "B M d"]:
        """Predict.

        Args:
          tokens: the encoder's tokens after its final norm.
          token_coordinates: where they are, (row, column) in 0 .. 1.
          coordinates: where to predict.
          branch_scales: see `run_blocks`.
          mask: True for tokens that may be attended to; None: all may.
        """
        mask_token = self.param("mask_token", nn.initializers.normal(0.02), (1, 1, self.width))
        queries = (len(tokens), coordinates.shape[1], self.width)
        x = jnp.broadcast_to(mask_token.astype(self.dtype), queries)
        head_width = self.width // self.heads
        make_block = functools.partial(
            QueryBlock,
            heads=self.heads,
            mlp_ratio=self.mlp_ratio,
            norm_eps=self.norm_eps,
            dtype=self.dtype,
            attention=self.attention,
            qkv_bias=False,
            bias=False,
            norm="rms",
        )
        x = run_blocks(
            self,
            make_block,
            self.depth,
            x,
            branch_scales,
            context=tokens,
            mask=mask,
            rope=make_rope(coordinates, head_width, self.rope, self.rope_frequencies),
            context_rope=make_rope(token_coordinates, head_width, self.rope, self.rope_frequencies),
        )
        return norm("rms", self.norm_eps, self.dtype, "norm", scaled=False)(x)


class PixelHead(nn.Module, kw_only=True):
    """Linear layer to the pixels of a patch, with one bias per channel.

    This is a transposed convolution as wide as its stride.

    Attributes:
      patch_size: p.
      channels: C.
      dtype: of the computation.
    """

    patch_size: int
    channels: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "B M d"]) -> Float[Array, "B M P"]:
        """Predict the pixels of every patch, ordered (row, column, channel)."""
        pixels = self.patch_size**2
        # Torch's initializer of transposed convolutions: uniform within 1 / sqrt(P)
        init = nn.initializers.variance_scaling(1 / 3, "fan_out", "uniform")
        kernel = self.param("kernel", init, (x.shape[-1], pixels * self.channels))
        kernel = kernel.astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.channels,)).astype(self.dtype)
        y = matmul(x.reshape(-1, x.shape[-1]).astype(self.dtype), kernel)
        y = y + jnp.tile(bias, pixels)[None]
        return y.reshape(x.shape[:-1] + (-1,))
