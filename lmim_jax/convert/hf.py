"""Folders that `transformers.AutoModel.from_pretrained(FOLDER)` opens, with version 4 or 5.

Tensors have the names of version 4.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lmim_jax.convert.torch_encoder import TorchEncoder
from lmim_jax.utils.errors import UserError

# timm's names of modules within a block -> those of transformers
BLOCK_NAMES = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
# The same of modules and tensors outside blocks
OUTER_NAMES = {
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "norm": "layernorm",
}
PILLOW_FILTERS = {"bilinear": 2, "bicubic": 3}


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
      UserError: transformers cannot hold this encoder.
    """
    encoder.require_equal_norms("transformers")
    if encoder.image_size[0] != encoder.image_size[1]:
        raise UserError(
            f"config.method.grid is not square ({encoder.image_size} pixels), as transformers needs"
        )
    tensors: dict[str, np.ndarray] = {}
    for name, array in encoder.tensors.items():
        tensors.update(_rename(name, array))
    return tensors, {
        "config.json": _model_config(encoder),
        "preprocessor_config.json": _preprocessor_config(encoder, images),
    }


def _rename(name: str, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the (name, array) pairs of transformers for one of timm's tensors."""
    if name in OUTER_NAMES:
        yield OUTER_NAMES[name], array
        return
    module, _, leaf = name.rpartition(".")
    if module in OUTER_NAMES:
        yield f"{OUTER_NAMES[module]}.{leaf}", array
        return
    _, block, inner = module.split(".", 2)
    prefix = f"encoder.layer.{block}"
    if inner == "attn.qkv":
        query, key, value = np.split(array, 3)
        yield f"{prefix}.attention.attention.query.{leaf}", query
        yield f"{prefix}.attention.attention.key.{leaf}", key
        yield f"{prefix}.attention.attention.value.{leaf}", value
        return
    yield f"{prefix}.{BLOCK_NAMES[inner]}.{leaf}", array


def _model_config(encoder: TorchEncoder) -> dict[str, Any]:
    """Compute config.json."""
    architecture = "ViTModel"
    model_type = "vit"
    if not encoder.cls:  # the same network without CLS
        architecture = "IJepaModel"
        model_type = "ijepa"
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "image_size": encoder.image_size[0],
        "patch_size": encoder.patch_size,
        "num_channels": encoder.channels,
        "hidden_size": encoder.width,
        "num_hidden_layers": encoder.depth,
        "num_attention_heads": encoder.heads,
        "intermediate_size": encoder.hidden,
        "hidden_act": "gelu",
        "layer_norm_eps": encoder.norm_eps,
        "qkv_bias": encoder.qkv_bias,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "torch_dtype": "float32",
    }


def _preprocessor_config(encoder: TorchEncoder, images: Mapping[str, Any]) -> dict[str, Any]:
    """Compute preprocessor_config.json."""
    height, width = encoder.image_size
    return {
        "image_processor_type": "BitImageProcessor",  # short side, center crop, normalize
        "do_convert_rgb": encoder.channels == 3,
        "do_resize": True,
        "size": {"shortest_edge": images["resize"]},
        "resample": PILLOW_FILTERS[images["interpolation"]],
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(images["mean"]),
        "image_std": list(images["std"]),
    }
