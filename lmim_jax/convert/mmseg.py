"""Folders for mmsegmentation 1.2: the encoder as its `VisionTransformer`, with a config of UPerNet.

The config takes its datasets and schedule from those that mmsegmentation installs.
"""

import string
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lmim_jax.convert.torch_encoder import TorchEncoder
from lmim_jax.utils.errors import UserError

FEATURE_MAPS = 4  # that UPerNet reads, from blocks at equal distances

# timm's names of modules within a block -> mmsegmentation's
BLOCK_NAMES = {
    "norm1": "ln1",
    "attn.proj": "attn.attn.out_proj",
    "norm2": "ln2",
    "mlp.fc1": "ffn.layers.0.0",
    "mlp.fc2": "ffn.layers.1",
}
# The same of modules and tensors outside blocks
OUTER_NAMES = {
    "patch_embed.proj.weight": "patch_embed.projection.weight",
    "patch_embed.proj.bias": "patch_embed.projection.bias",
    "cls_token": "cls_token",
    "pos_embed": "pos_embed",
    "norm.weight": "ln1.weight",
    "norm.bias": "ln1.bias",
}

CONFIG = string.Template('''\
"""UPerNet on an encoder that lmim_jax has pretrained, for mmsegmentation 1.2.

Data, schedule and learning rate are a start, not tuned for this encoder.
"""

_base_ = [
    "mmseg::_base_/datasets/ade20k.py",
    "mmseg::_base_/default_runtime.py",
    "mmseg::_base_/schedules/schedule_160k.py",
]

num_classes = 150  # of ADE20K
crop_size = (512, 512)
norm_cfg = dict(type="SyncBN", requires_grad=True)

model = dict(
    type="EncoderDecoder",
    data_preprocessor=dict(
        type="SegDataPreProcessor",
        mean=$mean,
        std=$std,
        bgr_to_rgb=$rgb,
        pad_val=0,
        seg_pad_val=255,
        size=crop_size,
    ),
    backbone=dict(
        type="VisionTransformer",
        init_cfg=dict(type="Pretrained", checkpoint="{{ fileDirname }}/backbone.pth"),
        img_size=$image_size,  # of pretraining: positions are resampled for other sizes
        patch_size=$patch_size,
        patch_bias=True,
        in_channels=$channels,
        embed_dims=$width,
        num_layers=$depth,
        num_heads=$heads,
        mlp_ratio=$mlp_ratio,
        out_indices=$out_indices,
        qkv_bias=True,
        drop_path_rate=0.1,
        with_cls_token=$cls,
        norm_cfg=dict(type="LN", eps=$norm_eps),
        final_norm=True,
        interpolate_mode="bicubic",
    ),
    neck=dict(type="Feature2Pyramid", embed_dim=$width, rescales=[4, 2, 1, 0.5]),
    decode_head=dict(
        type="UPerHead",
        in_channels=[$width] * 4,
        in_index=[0, 1, 2, 3],
        pool_scales=(1, 2, 3, 6),
        channels=512,
        dropout_ratio=0.1,
        num_classes=num_classes,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
    ),
    auxiliary_head=dict(
        type="FCNHead",
        in_channels=$width,
        in_index=2,
        channels=256,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.1,
        num_classes=num_classes,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=0.4),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode="slide", crop_size=crop_size, stride=(341, 341)),
)

optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        custom_keys=dict(pos_embed=dict(decay_mult=0.0), cls_token=dict(decay_mult=0.0)),
    ),
)
''')


def contents(
    encoder: TorchEncoder, images: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Compute the contents of the folder.

    Args:
      encoder: the encoder to export.
      images: how images are prepared: "mean" and "std" are used.

    Returns:
      (tensors of the backbone, {file name: text}).

    Raises:
      UserError: mmsegmentation cannot hold this encoder.
    """
    encoder.require_equal_norms("mmsegmentation's VisionTransformer")
    if encoder.hidden % encoder.width:
        ratio = encoder.hidden / encoder.width
        raise UserError(
            f"config.method.mlp_ratio={ratio:g} must be an integer for mmsegmentation's "
            "VisionTransformer"
        )
    if encoder.depth < FEATURE_MAPS:
        raise UserError(
            f"config.method.depth={encoder.depth}: UPerNet in mmsegmentation reads "
            f"{FEATURE_MAPS} different blocks"
        )
    tensors = dict(_renamed(encoder.tensors))
    for i in range(encoder.depth):  # its biases are all there or none is, that of the output too
        tensors.setdefault(
            f"layers.{i}.attn.attn.in_proj_bias", np.zeros(3 * encoder.width, np.float32)
        )
    if not encoder.cls:  # it has a token and a position all the same, and leaves them out
        tensors["cls_token"] = np.zeros((1, 1, encoder.width), np.float32)
        tensors["pos_embed"] = np.pad(tensors["pos_embed"], ((0, 0), (1, 0), (0, 0)))
    text = CONFIG.substitute(
        mean=[round(255 * value, 4) for value in images["mean"]],
        std=[round(255 * value, 4) for value in images["std"]],
        rgb=encoder.channels == 3,
        image_size=encoder.image_size,
        patch_size=encoder.patch_size,
        channels=encoder.channels,
        width=encoder.width,
        depth=encoder.depth,
        heads=encoder.heads,
        mlp_ratio=encoder.hidden // encoder.width,
        out_indices=out_indices(encoder.depth),
        cls=encoder.cls,
        norm_eps=encoder.norm_eps,
    )
    return tensors, {"config.py": text}


def out_indices(depth: int) -> tuple[int, ...]:
    """The blocks that UPerNet reads: (2, 5, 8, 11) of 12."""
    return tuple(depth * (i + 1) // FEATURE_MAPS - 1 for i in range(FEATURE_MAPS))


def _renamed(tensors: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the (name, array) pairs of mmsegmentation."""
    for name, array in tensors.items():
        if name in OUTER_NAMES:
            yield OUTER_NAMES[name], array
            continue
        _, block, inner = name.split(".", 2)
        module, _, leaf = inner.rpartition(".")
        if module == "attn.qkv":
            yield f"layers.{block}.attn.attn.in_proj_{leaf}", array
        else:
            yield f"layers.{block}.{BLOCK_NAMES[module]}.{leaf}", array
