"""Folders that `timm.create_model("local-dir:FOLDER", pretrained=True)` opens."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lmim_jax.convert.torch_encoder import TorchEncoder
from lmim_jax.models.vit import VARIANTS
from lmim_jax.utils.errors import UserError

# timm's names of the sizes in VARIANTS; other sizes are arguments to the first of them.
ARCHITECTURES = {
    "Ti/16": "vit_tiny_patch16_224",
    "S/16": "vit_small_patch16_224",
    "B/16": "vit_base_patch16_224",
    "L/16": "vit_large_patch16_224",
    "H/14": "vit_huge_patch14_224",
}
# Only timm's CLIP towers have norms with an epsilon of 1e-5 instead of 1e-6.
CLIP_ARCHITECTURE = "vit_base_patch16_clip_224"
CLIP_EPS = 1e-5
USUAL_EPS = 1e-6


def contents(
    encoder: TorchEncoder, images: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, Any]]]:
    """Compute the contents of the folder.

    Args:
      encoder: the encoder to export.
      images: how images are prepared: "mean", "std", "interpolation", "resize" (the short side in
        pixels before the center crop).

    Returns:
      (tensors, {file name: JSON}).

    Raises:
      UserError: timm cannot hold this encoder.
    """
    encoder.require_equal_norms("timm")
    architecture, arguments = _architecture(encoder)
    config = {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": encoder.width,
        # Pooling is the mean of patches after the norm.
        "model_args": {**arguments, "global_pool": "avg", "fc_norm": False},
        "pretrained_cfg": {
            "num_classes": 0,
            "input_size": [encoder.channels, *encoder.image_size],
            "fixed_input_size": True,
            "interpolation": images["interpolation"],
            "crop_pct": crop_share(min(encoder.image_size), images["resize"]),
            "crop_mode": "center",
            "mean": list(images["mean"]),
            "std": list(images["std"]),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    return encoder.tensors, {"config.json": config}


def _architecture(encoder: TorchEncoder) -> tuple[str, dict[str, Any]]:
    """Find timm's name of an architecture, and the arguments in which the encoder differs from it.

    Raises:
      UserError: timm has no such norms.
    """
    size_arguments = {
        "img_size": list(encoder.image_size),
        "patch_size": encoder.patch_size,
        "in_chans": encoder.channels,
        "embed_dim": encoder.width,
        "depth": encoder.depth,
        "num_heads": encoder.heads,
        "mlp_ratio": encoder.hidden / encoder.width,
        "qkv_bias": encoder.qkv_bias,
        "class_token": encoder.cls,
    }
    if encoder.norm_eps == CLIP_EPS:
        return CLIP_ARCHITECTURE, {**size_arguments, "pre_norm": False}
    if encoder.norm_eps != USUAL_EPS:
        raise UserError(
            f"config.method.norm_eps={encoder.norm_eps}: timm's Vision Transformers have "
            f"{USUAL_EPS} or {CLIP_EPS}"
        )
    variant = _variant(encoder)
    if variant is None:
        return ARCHITECTURES["Ti/16"], size_arguments
    if _is_standard(encoder):
        return ARCHITECTURES[variant], {}
    return ARCHITECTURES[variant], size_arguments


def _variant(encoder: TorchEncoder) -> str | None:
    """Find the name in VARIANTS of the encoder's sizes."""
    sizes = {
        "width": encoder.width,
        "depth": encoder.depth,
        "heads": encoder.heads,
        "patch_size": encoder.patch_size,
    }
    for name, variant in VARIANTS.items():
        if variant == sizes:
            return name
    return None


def _is_standard(encoder: TorchEncoder) -> bool:
    """Decide whether all options that VARIANTS do not contain have timm's default values."""
    return (
        encoder.image_size == (224, 224)
        and encoder.channels == 3
        and encoder.hidden == 4 * encoder.width
        and encoder.cls
        and encoder.qkv_bias
    )


def crop_share(size: int, resize: int) -> float:
    """Compute the `crop_pct` for which timm resizes images as this project's evaluation does.

    Args:
      size: side of the center crop in pixels.
      resize: short side in pixels before the crop; timm computes it as floor(size / crop_pct).
    """
    share = size / resize
    if math.floor(size / share) == resize:
        return share
    return math.nextafter(share, 0)
