"""The state dict of yibingwei-1/LatentMIM.

Its projector is the head of the encoder, and patches are embedded by a linear layer.
"""

from lmim_jax.convert.official.base import StateDictSpec, check_supported, with_cls
from lmim_jax.methods.latent_mim import Method
from lmim_jax.models.layers import sincos_positions

RENAMES = (
    (r"^target\.projector\.", "target_encoder.head."),
    (r"^target\.encoder\.", "target_encoder."),
    (r"^projector\.", "encoder.head."),
    (r"\.patch_embed\.", ".embed.proj."),
    (r"\.(q|kv)\.", r".\1_proj."),
)


def describe(method: Method) -> StateDictSpec:
    """Describe the state dict of Latent MIM.

    Raises:
      UserError: the official code does not have this decoder or target.
    """
    check_supported("decoder", method.decoder, ("cross",))
    encoder_positions = with_cls(sincos_positions(method.grid, method.width))
    decoder_positions = with_cls(sincos_positions(method.grid, method.decoder_width))
    return StateDictSpec(
        renames=RENAMES,
        layouts=(),
        constants={
            "encoder.pos_embed.pos_embeds": encoder_positions,
            "target_encoder.pos_embed.pos_embeds": encoder_positions,
            "decoder.pos_embed.pos_embeds": decoder_positions,
        },
    )
