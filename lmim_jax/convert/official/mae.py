"""Names of facebookresearch/mae; its `pos_embed` and `decoder_pos_embed` are constants."""

from lmim_jax.convert.official.base import Official, convolution, with_cls
from lmim_jax.models.layers import sincos_positions

RENAMED = (
    (r"^encoder\.", ""),
    (r"^patch_embed\.", "patch_embed.proj."),
    (r"^decoder\.mask_token$", "mask_token"),
    (r"^decoder\.head\.", "decoder_pred."),
    (r"^decoder\.", "decoder_"),
)


def describe(method):
    """The Official of a `methods.mae.Method`."""
    table = lambda width: with_cls(sincos_positions(method.grid, width, integer=True))[None]
    fixed = {"pos_embed": table(method.width), "decoder_pos_embed": table(method.decoder_width)}
    return Official(RENAMED, ((r".*/patch_embed/kernel", convolution(method.patch_size)),), fixed)
