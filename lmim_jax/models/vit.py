"""The Vision Transformer encoder and the projector behind it.

Letters: B batch, T tokens, N patches, R registers, P pixel values of a patch, D width.
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lmim_jax.models.blocks import Block, PostNormBlock, QkvBias
from lmim_jax.models.layer_stack import run_blocks
from lmim_jax.models.layers import Dense, Dtype, gelu, layer_norm, norm
from lmim_jax.models.modalities import embed_patches, mean_over_modalities, merge_attention
from lmim_jax.models.rope import make_rope, register_coordinates

# Sizes by their usual names ("An Image is Worth 16x16 Words", table 1; DeiT for Ti and S).
VARIANTS = {
    "Ti/16": dict(width=192, depth=12, heads=3, patch_size=16),
    "S/16": dict(width=384, depth=12, heads=6, patch_size=16),
    "B/16": dict(width=768, depth=12, heads=12, patch_size=16),
    "L/16": dict(width=1024, depth=24, heads=16, patch_size=16),
    "H/14": dict(width=1280, depth=32, heads=16, patch_size=14),
}


class ViT(nn.Module, kw_only=True):
    """Vision Transformer: patch embedding + positions, CLS token, pre-norm blocks, final norm.

    It sees only the patches that it is given: masking means leaving patches out. The CLS token and
    registers have no position embedding. Parameters: patch_embed, cls_token [1, 1, D], registers
    [1, R, D], block00 .. , norm.

    Attributes:
      width: D.
      depth: number of blocks.
      heads: attention heads of a block.
      mlp_ratio: hidden width of an MLP / D.
      norm_eps: epsilon of the norms of the blocks.
      dtype: of the computation; parameters are float32.
      attention: implementation of attention, see `attention.attend`.
      qkv_bias: whether queries, keys and values have a bias.
      cls: whether there is a CLS token, in front of the patches.
      final_norm_eps: epsilon of the last norm; None: norm_eps.
      registers: R, tokens between CLS and the patches that take part in all blocks and stand for
        nothing ("Vision Transformers Need Registers", Darcet et al., ICLR 2024).
      bias: whether the linear layers of blocks have a bias, except those of `qkv_bias`.
      norm: see `layers.norm`.
      final_norm_scaled: "rms": whether the last norm has a scale.
      rope: "none", or how queries and keys are turned by coordinates, see `rope.PARTS`.
      rope_frequencies: see `rope.make_rope`.
      post_norm: blocks are `PostNormBlock`, and all tokens are normed in front of the first block
        (parameters: stem_norm) instead of after the last one (data2vec 2.0).
      modalities: (name, values of a patch) of each, see modalities.py; (): one, without a name.
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
    registers: int = 0
    bias: bool = True
    norm: str = "layer"
    final_norm_scaled: bool = True
    rope: str = "none"
    rope_frequencies: tuple[float, float] = (1.0, 1.0)
    post_norm: bool = False
    modalities: tuple[tuple[str, int], ...] = ()

    @nn.compact
    def __call__(
        self,
        patches: Float[Array, "B N P"],
        positions: Float[Array, "#B N _"],
        mask: Bool[Array, "B N"] | None = None,
        *,
        keep_registers: bool = False,
        branch_scales: Float[Array, "B depth 2"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
        """Encode patches.

        Args:
          patches: pixel values of the visible patches; of several modalities, as many of each.
          positions: their position embeddings [#B, N, D], for every image or for all alike; with
            rope, their coordinates [#B, N, 2].
          mask: True where a patch may be attended to; None: all may.
          keep_registers: whether registers are among the returned tokens.
          branch_scales: see `run_blocks`.

        Returns:
          Tokens after and before the final norm: CLS, if there is one, registers, if they are kept,
          and patches. With `post_norm`, both are the tokens after the last block.

        Raises:
          ValueError: rope and a CLS token, which has no coordinates.
        """
        inputs: dict[str, Any] = {}
        x = embed_patches(self, patches, self.modalities, self.width, self.dtype)
        if self.rope == "none":
            x = x + positions.astype(self.dtype)
        else:
            if self.cls:
                raise ValueError("a ViT with rope has no CLS token")
            coordinates = with_registers(positions, self.registers, mask)
            head_width = self.width // self.heads
            inputs["rope"] = make_rope(coordinates, head_width, self.rope, self.rope_frequencies)
        extra = []  # tokens in front of the patches
        if self.cls:
            extra.append(self.param("cls_token", nn.initializers.normal(0.02), (1, 1, self.width)))
        if self.registers:
            shape = (1, self.registers, self.width)
            extra.append(self.param("registers", nn.initializers.normal(0.02), shape))
        x = _in_front(extra, x)
        if extra and mask is not None:
            before = int(self.cls) + self.registers
            mask = jnp.pad(mask, [(0, 0), (before, 0)], constant_values=True)
        block: type[nn.Module] = Block
        if self.post_norm:
            block = PostNormBlock
            x = norm(self.norm, self.norm_eps, self.dtype, "stem_norm")(x)
        make_block = functools.partial(
            block,
            heads=self.heads,
            mlp_ratio=self.mlp_ratio,
            norm_eps=self.norm_eps,
            dtype=self.dtype,
            attention=self.attention,
            qkv_bias=self.qkv_bias,
            bias=self.bias,
            norm=self.norm,
        )
        x = run_blocks(self, make_block, self.depth, x, branch_scales, mask=mask, **inputs)
        normed = x
        if not self.post_norm:
            normed = _final_norm(self)(x)
        if keep_registers:
            return normed, x
        if self.registers:
            first = int(self.cls)
            self.sow("intermediates", "registers", normed[:, first : first + self.registers])
        return self.without_registers(normed), self.without_registers(x)

    def without_registers(self, x: Float[Array, "..."], axis: int = 1) -> Float[Array, "..."]:
        """Leave out the registers among the tokens along an axis."""
        if not self.registers:
            return x
        first = int(self.cls)
        before, _, after = jnp.split(x, [first, first + self.registers], axis)
        return jnp.concatenate([before, after], axis)


def _in_front(
    tokens: list[Float[Array, "1 _ D"]], x: Float[Array, "B N D"]
) -> Float[Array, "B T D"]:
    """Put tokens that are the same for all images in front of x."""
    if not tokens:
        return x
    parts = []
    for token in tokens:
        token = token.astype(x.dtype)
        parts.append(jnp.broadcast_to(token, (len(x), *token.shape[1:])))
    return jnp.concatenate([*parts, x], axis=1)


def _final_norm(encoder: ViT) -> nn.Module:
    """The norm behind the last block; there is none with `post_norm`."""
    eps = encoder.final_norm_eps or encoder.norm_eps
    return norm(encoder.norm, eps, encoder.dtype, "norm", encoder.final_norm_scaled)


def with_registers(
    coordinates: Float[Array, "#B N 2"], registers: int, mask: Bool[Array, "B N"] | None = None
) -> Float[Array, "#B R+N 2"]:
    """Put the coordinates of registers in front of those of patches, see rope.py."""
    if not registers:
        return coordinates
    border = register_coordinates(coordinates, registers, mask)
    return jnp.concatenate([border, coordinates], axis=1)


def features(
    encoder: ViT,
    params: dict[str, Any],
    patches: Float[Array, "B N P"],
    positions: Float[Array, "#B N _"],
    mask: Bool[Array, "B N"] | None = None,
) -> dict[str, Array]:
    """Compute the features of full images by name. Under `jit`, unused ones are not computed.

    Args:
      encoder: the network.
      params: its parameters.
      patches: all patches of the images.
      positions: see `ViT`.
      mask: False for patches that only pad the images of a batch to equal length; None: there are
        none. The features of such patches, and attention, mean nothing.

    Returns:
      cls [B, D] and patches [B, N, D] after the final norm; cls_prenorm and patches_prenorm before
      it; block00/tokens [B, 1 + N, D], block00/normed, which is the final norm of these, and
      block00/attention [B, A, 1 + N, 1 + N] (A heads) of every block; of post-norm blocks also
      block00/mlp [B, 1 + N, D], the output of their MLP. An encoder without CLS token gives no cls,
      and one row less. Registers are left out of all of these, so that rows of attention no longer
      sum to 1; they are registers [B, R, D], after the final norm. Of several modalities, patches
      and tokens are means over those of a position, and attention is that between positions.
    """
    (tokens, prenorm), state = encoder.apply(
        {"params": params}, patches, positions, mask, mutable=["intermediates"]
    )
    first_patch = int(encoder.cls)
    count = max(1, len(encoder.modalities))

    def merge(x: Array) -> Array:
        return mean_over_modalities(x, count, first_patch, axis=1)

    tokens = merge(tokens)
    prenorm = merge(prenorm)
    named = {"patches": tokens[:, first_patch:], "patches_prenorm": prenorm[:, first_patch:]}
    if encoder.cls:
        named["cls"] = tokens[:, 0]
        named["cls_prenorm"] = prenorm[:, 0]
    intermediates = dict(state["intermediates"])
    if encoder.registers:
        named["registers"] = intermediates.pop("registers")[0]
    final_norm = _final_norm(encoder)
    norm_params = {"params": params.get("norm", {})}
    for name, block in intermediates.items():
        block_tokens = encoder.without_registers(block["tokens"][0])
        named[f"{name}/tokens"] = merge(block_tokens)
        if encoder.post_norm:
            named[f"{name}/normed"] = merge(block_tokens)
            named[f"{name}/mlp"] = merge(encoder.without_registers(block["mlp_output"][0]))
        else:
            named[f"{name}/normed"] = merge(final_norm.apply(norm_params, block_tokens))
        rows = encoder.without_registers(block["attn"]["attention"][0], axis=2)
        weights = encoder.without_registers(rows, axis=3)
        named[f"{name}/attention"] = merge_attention(weights, count, first_patch)
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
