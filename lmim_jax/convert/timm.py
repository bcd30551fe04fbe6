"""The folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` opens."""

import math

from lmim_jax.models.vit import VARIANTS
from lmim_jax.utils.errors import UserError

# timm's names of sizes that we name too; all other sizes are arguments to the first of them.
ARCHITECTURES = {
    "Ti/16": "vit_tiny_patch16_224",
    "S/16": "vit_small_patch16_224",
    "B/16": "vit_base_patch16_224",
    "L/16": "vit_large_patch16_224",
    "H/14": "vit_huge_patch14_224",
}
EPS = {
    1e-6: {},
    1e-5: {"pre_norm": False},
}  # of norms -> arguments; timm has 1e-5 in CLIP's towers alone
CLIP = "vit_base_patch16_clip_224"


def contents(encoder, images):
    """(tensors, {file name: JSON}) of the folder.

    Args:
      encoder: an `encoder.Encoder`. images: {"mean", "std", "interpolation", "resize" (short side before the crop)}.

    Raises:
      UserError: timm cannot hold it.
    """
    if encoder.norm_eps not in EPS:
        raise UserError(
            f"config.method.norm_eps={encoder.norm_eps}: timm's Vision Transformers have 1e-6 or 1e-5"
        )
    size = dict(
        width=encoder.width, depth=encoder.depth, heads=encoder.heads, patch_size=encoder.patch_size
    )
    known = next((name for name, variant in VARIANTS.items() if variant == size), None)
    architecture = CLIP if encoder.norm_eps == 1e-5 else ARCHITECTURES[known or "Ti/16"]
    pooled = {"global_pool": "avg", "fc_norm": False}  # mean of patches, after the norm
    arguments = {
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
    usual = (
        encoder.image_size == (224, 224)
        and encoder.hidden == 4 * encoder.width
        and encoder.channels == 3
    )
    if known and architecture != CLIP and usual and encoder.cls and encoder.qkv_bias:
        arguments = {}
    config = {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": encoder.width,
        "model_args": {**arguments, **EPS[encoder.norm_eps], **pooled},
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


def crop_share(size, resize):
    """The crop_pct by which timm resizes to `resize` pixels: it takes floor(size / crop_pct)."""
    share = size / resize
    return share if math.floor(size / share) == resize else math.nextafter(share, 0)
