"""The state dict of joonmy/PiLaMIM.

Positions are learned, and the outputs of the pixel head are ordered (channel, row, column).
"""

import numpy as np
from jaxtyping import Float

from lmim_jax.convert.official.base import Layout, StateDictSpec, convolution
from lmim_jax.methods.pilamim import Method

RENAMES = (
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


def describe(method: Method) -> StateDictSpec:
    """Describe the state dict of PiLaMIM."""
    return StateDictSpec(
        renames=RENAMES,
        layouts=(
            (r".*/patch_embed/kernel", convolution(method.patch_size)),
            (r".*/positions", Layout(_swap_batch_axis, _swap_batch_axis)),
            (r"params/pixel_decoder/head/kernel", _pixel_kernel(method.patch_size)),
            (r"params/pixel_decoder/head/bias", _pixel_bias(method.patch_size)),
        ),
        constants={},
    )


def _swap_batch_axis(positions: Float[np.ndarray, "A B D"]) -> Float[np.ndarray, "B A D"]:
    """Convert [1, N, D] <-> [N, 1, D]."""
    return positions.swapaxes(0, 1)


def _pixel_kernel(patch_size: int) -> Layout:
    """Layout of the pixel head: kernel [d, p p C] <-> weight [C p p, d]."""

    def to_official(kernel: np.ndarray) -> np.ndarray:
        pixels = kernel.reshape(len(kernel), patch_size, patch_size, -1)
        return pixels.transpose(0, 3, 1, 2).reshape(kernel.shape).T

    def to_ours(weight: np.ndarray) -> np.ndarray:
        kernel = weight.T
        pixels = kernel.reshape(len(kernel), -1, patch_size, patch_size)
        return pixels.transpose(0, 2, 3, 1).reshape(kernel.shape)

    return Layout(to_official, to_ours)


def _pixel_bias(patch_size: int) -> Layout:
    """Layout of the bias of the pixel head: [p p C] <-> [C p p]."""
    kernel = _pixel_kernel(patch_size)

    def to_official(bias: np.ndarray) -> np.ndarray:
        return kernel.to_official(bias[None])[:, 0]

    def to_ours(bias: np.ndarray) -> np.ndarray:
        return kernel.to_ours(bias[:, None])[0]

    return Layout(to_official, to_ours)
