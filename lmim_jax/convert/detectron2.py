"""Folders for detectron2's ViTDet: weights under its names, with a config of Mask R-CNN.

ViTDet uses the blocks alone: it has no CLS token and no last norm, which are left out. Most of its
blocks attend within windows, and all have relative positions, which begin at zero.
"""

import math
import string
from collections.abc import Mapping
from typing import Any

import numpy as np

from lmim_jax.convert.torch_encoder import TorchEncoder
from lmim_jax.utils.errors import UserError

PREFIX = "backbone.net."
PATCH_SIZE = 16  # with which the four maps of the pyramid have strides of 4, 8, 16 and 32 pixels
GLOBAL_BLOCKS = 4  # attend to the whole image, at equal distances
CONFIG = string.Template('''\
"""Mask R-CNN on an encoder that lmim_jax has pretrained: detectron2's ViTDet, on COCO.

Data and schedule are those of detectron2's projects/ViTDet; they are a start, not tuned for this
encoder.
"""

import pathlib
from functools import partial

import detectron2.data.transforms as T
import torch.nn as nn
from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler

image_size = 1024

model = model_zoo.get_config("common/models/mask_rcnn_vitdet.py").model
model.pixel_mean = $mean
model.pixel_std = $std
model.input_format = "RGB"
net = model.backbone.net
net.img_size = model.backbone.square_pad = image_size
net.patch_size = $patch_size
net.embed_dim = $width
net.depth = $depth
net.num_heads = $heads
net.mlp_ratio = $mlp_ratio
net.qkv_bias = $qkv_bias
net.norm_layer = partial(nn.LayerNorm, eps=$norm_eps)
net.window_block_indexes = $window_blocks  # the others attend to the whole image
net.pretrain_img_size = $image_size  # positions are resampled from this size
net.pretrain_use_cls_token = $cls  # the first row of pos_embed is that of CLS

dataloader = model_zoo.get_config("common/data/coco.py").dataloader
dataloader.train.total_batch_size = 64
dataloader.train.mapper.image_format = "RGB"
dataloader.train.mapper.recompute_boxes = True  # images are cropped
dataloader.train.mapper.augmentations = [
    L(T.RandomFlip)(horizontal=True),
    L(T.ResizeScale)(
        min_scale=0.1, max_scale=2.0, target_height=image_size, target_width=image_size
    ),
    L(T.FixedSizeCrop)(crop_size=(image_size, image_size), pad=False),
]
dataloader.test.mapper.image_format = "RGB"
dataloader.test.mapper.augmentations = [
    L(T.ResizeShortestEdge)(short_edge_length=image_size, max_size=image_size),
]

train = model_zoo.get_config("common/train.py").train
train.amp.enabled = True
train.ddp.fp16_compression = True
train.init_checkpoint = str(pathlib.Path(__file__).resolve().with_name("backbone.pth"))
train.max_iter = 184375  # 100 epochs of COCO

lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(
        values=[1.0, 0.1, 0.01], milestones=[163889, 177546], num_updates=train.max_iter
    ),
    warmup_length=250 / train.max_iter,
    warmup_factor=0.001,
)
optimizer = model_zoo.get_config("common/optim.py").AdamW
optimizer.params.lr_factor_func = partial(
    get_vit_lr_decay_rate, num_layers=$depth, lr_decay_rate=0.7
)
optimizer.params.overrides = {"pos_embed": {"weight_decay": 0.0}}
''')


def contents(
    encoder: TorchEncoder, images: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Compute the contents of the folder.

    Args:
      encoder: the encoder to export.
      images: how images are prepared: "mean" and "std" are used.

    Returns:
      (tensors of the whole model that are known, {file name: text}).

    Raises:
      UserError: ViTDet cannot hold this encoder.
    """
    _check(encoder)
    tensors = {}
    for name, array in encoder.tensors.items():
        if name != "cls_token" and not name.startswith("norm."):
            tensors[PREFIX + name] = array
    text = CONFIG.substitute(
        mean=[round(255 * value, 4) for value in images["mean"]],
        std=[round(255 * value, 4) for value in images["std"]],
        patch_size=encoder.patch_size,
        width=encoder.width,
        depth=encoder.depth,
        heads=encoder.heads,
        mlp_ratio=encoder.hidden / encoder.width,
        qkv_bias=encoder.qkv_bias,
        norm_eps=encoder.norm_eps,
        window_blocks=window_blocks(encoder.depth),
        image_size=encoder.image_size[0],
        cls=encoder.cls,
    )
    return tensors, {"config.py": text}


def _check(encoder: TorchEncoder) -> None:
    """Raise a UserError for what ViTDet does not have."""
    height, width = encoder.image_size
    if height != width:
        raise UserError(
            f"config.method.grid is not square ({height} x {width} pixels), as detectron2 needs"
        )
    if encoder.channels != 3:
        raise UserError(f"data.channels={encoder.channels}: detectron2 reads RGB images")
    if encoder.patch_size != PATCH_SIZE:
        raise UserError(
            f"config.method.patch_size={encoder.patch_size}: the pyramid of detectron2's ViTDet "
            f"needs {PATCH_SIZE}"
        )


def window_blocks(depth: int) -> list[int]:
    """The blocks that attend within windows: all but 2, 5, 8, 11 of 12."""
    last = {math.ceil(depth * (i + 1) / GLOBAL_BLOCKS) - 1 for i in range(GLOBAL_BLOCKS)}
    return [block for block in range(depth) if block not in last]
