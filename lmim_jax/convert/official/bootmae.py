"""The state dict of LightDXY/BootMAE; its position tables are constants.

The teacher is a model of its own there, whose names begin with `ema.` here; in checkpoints it is
`model_ema`, beside `model`, with decoders that it does not use.
"""

import numpy as np
from jaxtyping import Float

from lmim_jax.convert.official.base import Layout, StateDictSpec, convolution, with_cls
from lmim_jax.methods.bootmae import Method
from lmim_jax.models.layers import sincos_positions

RENAMES = (
    (r"^target\.encoder\.", "ema."),
    (r"^encoder\.", ""),
    (r"(^|\.)patch_embed\.", r"\1patch_embed.proj."),
    # The feature decoder has the names of the pixel decoder and "_1"
    (r"^regressor\.embed\.", "down."),
    (r"^regressor\.head\.", "lm_head.proj."),
    (r"^regressor\.mask_token$", "mask_token"),
    (r"^regressor\.(blocks|norm)\.", r"decode_\1."),
    (r"^predictor\.embed\.", "down_1."),
    (r"^predictor\.head\.", "lm_head_1."),
    (r"^predictor\.mask_token$", "mask_token_1"),
    (r"^predictor\.(blocks|norm)\.", r"decode_\1_1."),
    # Their blocks number the norms by when they were added: attention, MLP, cross-attention
    (r"^(decode_blocks\w*\.\d+)\.norm3\.", r"\1.norm2."),
    (r"\.norm2q\.", ".norm3."),
    (r"\.norm2kv\.", ".norm4."),
    (r"\.self_attn\.", ".attn."),
    (r"\.cross_attn\.", ".c_attn."),
    (r"\.c_attn\.q\.bias$", ".c_attn.q_bias"),
    (r"\.c_attn\.kv\.bias$", ".c_attn.v_bias"),
)


def describe(method: Method) -> StateDictSpec:
    """Describe the state dict of BootMAE."""
    encoder_positions = _positions(method, method.width)
    return StateDictSpec(
        renames=RENAMES,
        layouts=(
            (r".*/patch_embed/kernel", convolution(method.patch_size)),
            (r"params/regressor/head/kernel", _transposed_convolution(method.patch_size)),
        ),
        constants={
            "pos_embed": encoder_positions,
            "de_pos_embed": _positions(method, method.decoder_width),
            "ema.pos_embed": encoder_positions,
        },
        splits=((r"\.qkv\.bias$", (".q_bias", ".v_bias")),),
        beside=(("model_ema", "ema"),),
        unused=(r"ema\.(de_pos_embed|decode_|down|lm_head|mask_token).*",),
    )


def _positions(method: Method, width: int) -> Float[np.ndarray, "1 1+N width"]:
    return with_cls(sincos_positions(method.grid, width, integer=True, row_first=True))[None]


def _transposed_convolution(patch_size: int) -> Layout:
    """Layout of the pixel head: kernel [d, p p C] <-> weight [d, C, p, p]."""

    def to_official(kernel: np.ndarray) -> np.ndarray:
        pixels = kernel.reshape(len(kernel), patch_size, patch_size, -1)
        return pixels.transpose(0, 3, 1, 2)

    def to_ours(weight: np.ndarray) -> np.ndarray:
        return weight.transpose(0, 2, 3, 1).reshape(len(weight), -1)

    return Layout(to_official, to_ours)
