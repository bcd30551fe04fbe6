"""Names of facebookresearch/ijepa, whose files hold the state dicts `encoder`, `predictor` and `target_encoder`."""

from lmim_jax.convert.official.base import Official, convolution
from lmim_jax.models.layers import sincos_positions

RENAMED = (
    (r"^target\.encoder\.", "target_encoder."),
    (r"\.patch_embed\.", ".patch_embed.proj."),
    (r"^predictor\.head\.", "predictor.predictor_proj."),
    (r"^predictor\.(embed|norm|blocks)\.", r"predictor.predictor_\1."),
)


def describe(method):
    """The Official of a `methods.ijepa.Method`."""
    table = lambda width: sincos_positions(method.grid, width, integer=True)[None]
    fixed = {f"{name}.pos_embed": table(method.width) for name in ("encoder", "target_encoder")}
    fixed["predictor.predictor_pos_embed"] = table(method.decoder_width)
    return Official(RENAMED, ((r".*/patch_embed/kernel", convolution(method.patch_size)),), fixed)
