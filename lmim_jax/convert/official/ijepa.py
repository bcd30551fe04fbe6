"""The state dicts of facebookresearch/ijepa: `encoder`, `predictor` and `target_encoder`."""

from lmim_jax.convert.official.base import StateDictSpec, convolution
from lmim_jax.methods.ijepa import Method
from lmim_jax.models.layers import sincos_positions

RENAMES = (
    (r"^target\.encoder\.", "target_encoder."),
    (r"\.patch_embed\.", ".patch_embed.proj."),
    (r"^predictor\.head\.", "predictor.predictor_proj."),
    (r"^predictor\.(embed|norm|blocks)\.", r"predictor.predictor_\1."),
)


def describe(method: Method) -> StateDictSpec:
    """Describe the state dicts of I-JEPA."""
    encoder_positions = sincos_positions(method.grid, method.width, integer=True)
    predictor_positions = sincos_positions(method.grid, method.decoder_width, integer=True)
    return StateDictSpec(
        renames=RENAMES,
        layouts=((r".*/patch_embed/kernel", convolution(method.patch_size)),),
        constants={
            "encoder.pos_embed": encoder_positions[None],
            "target_encoder.pos_embed": encoder_positions[None],
            "predictor.predictor_pos_embed": predictor_positions[None],
        },
    )
