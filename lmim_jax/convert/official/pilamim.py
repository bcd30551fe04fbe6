"""Names of joonmy/PiLaMIM: positions are learned, and the pixel head's outputs are ordered (channel, row, column)."""

import numpy as np

from lmim_jax.convert.official.base import Layout, Official, convolution

RENAMED = (
    (r"^target\.encoder\.", "target_encoder."),
    (r"^pixel_decoder\.embed\.", "decoder_embed."),
    (r"^pixel_decoder\.", "decoder."),
    (r"^latent_decoder\.embed\.", "decoder_latent_embed."),
    (r"^latent_decoder\.head\.", "target_decoder.head_latent."),
    (r"^latent_decoder\.", "target_decoder."),
    (r"\.patch_embed\.", ".patchify."),
    (r"\.blocks\.", ".transformer."),
    (r"\.norm\.", ".layer_norm."),
    (r"\.positions$", ".pos_embedding"),
)


def describe(method):
    """The Official of a `methods.pilamim.Method`."""
    p, channels = method.patch_size, method.channels
    swap = lambda x: x.swapaxes(0, 1)  # [1, N, D] <-> [N, 1, D]
    columns = Layout(  # kernel [d, P]
        lambda x: np.moveaxis(x.reshape(-1, p, p, channels), 3, 1).reshape(x.shape).T,
        lambda x: np.moveaxis(x.T.reshape(-1, channels, p, p), 1, 3).reshape(x.T.shape),
    )
    bias = Layout(lambda x: columns.theirs(x[None])[:, 0], lambda x: columns.ours(x[:, None])[0])
    layouts = (
        (r".*/patch_embed/kernel", convolution(p)),
        (r".*/positions", Layout(swap, swap)),
        (r"params/pixel_decoder/head/kernel", columns),
        (r"params/pixel_decoder/head/bias", bias),
    )
    return Official(RENAMED, layouts, {})
