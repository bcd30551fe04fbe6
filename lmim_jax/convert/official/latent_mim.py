"""Names of yibingwei-1/LatentMIM: the projector is the encoder's head, patches are embedded by a linear layer."""

from lmim_jax.convert.official.base import Official, with_cls
from lmim_jax.models.layers import sincos_positions
from lmim_jax.utils.errors import UserError

RENAMED = (
    (r"^target\.projector\.", "target_encoder.head."),
    (r"^target\.encoder\.", "target_encoder."),
    (r"^projector\.", "encoder.head."),
    (r"\.patch_embed\.", ".embed.proj."),
    (r"\.(q|kv)\.", r".\1_proj."),
)


def describe(method):
    """The Official of a `methods.latent_mim.Method`.

    Raises:
      UserError: a decoder or target that the official code does not have.
    """
    for key, value, known in (
        ("decoder", method.decoder, ("cross",)),
        ("target", method.target, ("ema", "random")),
    ):
        if value not in known:
            raise UserError(
                f"config.method.{key}={value} is not in the official code ({' | '.join(known)})"
            )
    table = lambda width: with_cls(sincos_positions(method.grid, width))
    fixed = {
        f"{name}.pos_embed.pos_embeds": table(method.width)
        for name in ("encoder", "target_encoder")
    }
    fixed["decoder.pos_embed.pos_embeds"] = table(method.decoder_width)
    return Official(RENAMED, (), fixed)
