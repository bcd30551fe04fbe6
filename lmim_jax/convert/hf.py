"""The folder that `transformers.AutoModel.from_pretrained(FOLDER)` opens, of version 4 or 5: v4 names of tensors."""

import re

from lmim_jax.utils.errors import UserError

BLOCK = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
OUTSIDE = {
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "norm": "layernorm",
}
RESAMPLE = {"bilinear": 2, "bicubic": 3}  # Pillow's numbers


def contents(encoder, images):
    """(tensors, {file name: JSON}) of the folder; arguments as in export/timm.py.

    Raises:
      UserError: transformers cannot hold it.
    """
    if encoder.image_size[0] != encoder.image_size[1]:
        raise UserError(
            f"config.method.grid is not square ({encoder.image_size} pixels), as transformers needs"
        )
    tensors = {}
    for name, value in encoder.tensors.items():
        if matched := re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(\w+)", name):
            prefix = f"encoder.layer.{matched[1]}.attention.attention"
            for part, piece in zip(
                ("query", "key", "value"), value.reshape(3, -1, *value.shape[1:]), strict=True
            ):
                tensors[f"{prefix}.{part}.{matched[2]}"] = piece
        elif matched := re.fullmatch(r"blocks\.(\d+)\.(.+)\.(\w+)", name):
            tensors[f"encoder.layer.{matched[1]}.{BLOCK[matched[2]]}.{matched[3]}"] = value
        elif name in OUTSIDE:
            tensors[OUTSIDE[name]] = value
        else:
            stem, _, leaf = name.rpartition(".")
            tensors[f"{OUTSIDE[stem]}.{leaf}"] = value
    kind = "ViT" if encoder.cls else "IJepa"  # the same, without CLS
    config = {
        "architectures": [f"{kind}Model"],
        "model_type": kind.lower(),
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
    height, width = encoder.image_size
    preparation = {
        "image_processor_type": "BitImageProcessor",  # short side, centre crop, normalise
        "do_convert_rgb": encoder.channels == 3,
        "do_resize": True,
        "size": {"shortest_edge": images["resize"]},
        "resample": RESAMPLE[images["interpolation"]],
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(images["mean"]),
        "image_std": list(images["std"]),
    }
    return tensors, {"config.json": config, "preprocessor_config.json": preparation}
