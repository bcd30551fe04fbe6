"""The state dict of facebookresearch/mae; its `pos_embed` and `decoder_pos_embed` are constants."""

from lmim_jax.convert.official.base import StateDictSpec, convolution, with_cls
from lmim_jax.methods.mae import Method
from lmim_jax.models.layers import sincos_positions

RENAMES = (
    (r"^encoder\.", ""),
    (r"^patch_embed\.", "patch_embed.proj."),
    (r"^decoder\.mask_token$", "mask_token"),
    (r"^decoder\.head\.", "decoder_pred."),
    (r"^decoder\.", "decoder_"),
)


def describe(method: Method) -> StateDictSpec:
    """Describe the state dict of MAE."""
    encoder_positions = sincos_positions(method.grid, method.width, integer=True)
    decoder_positions = sincos_positions(method.grid, method.decoder_width, integer=True)
    return StateDictSpec(
        renames=RENAMES,
        layouts=((r".*/patch_embed/kernel", convolution(method.patch_size)),),
        constants={
            "pos_embed": with_cls(encoder_positions)[None],
            "decoder_pos_embed": with_cls(decoder_positions)[None],
        },
    )
