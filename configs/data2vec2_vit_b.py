"""data2vec 2.0, ViT-B/16, ImageNet-1k, 75 epochs: predict the mean of latents of several blocks.

    lmim train --config=data2vec2_vit_b --config.data.path=IMAGENET --workdir=RUN

Global batch 256 with 16 masks per image, 375,300 steps: the published recipe. Sources: the paper
(arXiv 2212.07525) and `base_images_only_task.yaml` of the released code (fairseq).
"""

from ml_collections import ConfigDict, FieldReference

from lmim_jax.configs import vit_b

# At the size of configs/small.py: four blocks, and runs of 500 steps
SMALL = {"prenet_depth": 1, "target_start": 1, "masks_per_image": 4}
SMALL |= {"momentum_start": 0.99, "momentum_end": 0.998}


def get_config() -> ConfigDict:
    """vit_b and its differences."""
    config = vit_b.get_config()
    config.batch_size = 256  # images; each has 16 masks
    config.epochs = 75
    config.method = data2vec2(config.data.get_ref("channels"))
    optimizer = config.optimizer
    optimizer.name = "adamw_fairseq"
    optimizer.base_lr = 1e-3  # the peak at this batch size
    # 50,040 of 375,300 steps
    optimizer.warmup_epochs = FieldReference(10.0) * config.get_ref("epochs") / 75
    optimizer.update(warmup_start=0.0, floor=0.0)
    # As released: parameters of one dimension are not decayed; CLS is
    optimizer.decay_rules = ((".*(bias|norm).*", False), (".*", True))
    optimizer.clip_norm = 4.0
    return config


def data2vec2(channels: FieldReference) -> ConfigDict:
    """Options of the method.

    Args:
      channels: of images, `data.channels`.
    """
    method = ConfigDict()
    method.name = "data2vec2"  # a file in lmim_jax/methods/
    method.grid = (14, 14)  # rows, columns of patches
    method.patch_size = 16
    method.channels = FieldReference(channels)  # of images: data.channels
    # encoder of post-norm blocks; S, L: configs/data2vec2_vit_s.py, data2vec2_vit_l.py
    method.width = 768
    method.depth = 12
    method.heads = 12
    method.mlp_ratio = 4.0
    method.norm_eps = 1e-6  # of LayerNorms
    method.registers = 0  # tokens of the encoder that stand for nothing
    # How many of the blocks belong to the modality in the released code: for its names alone
    method.prenet_depth = 2
    # targets
    # ema | joint | stop_gradient | random | random_projection | frozen:RUN, see vit_b
    method.target = "ema"
    # (): the MLP outputs of the blocks from target_start on, each standardized over the patches of
    # an image, averaged. Or tokens after these blocks, joined by the next two options, see vit_b
    method.target_layers = ()
    method.target_combine = "mean"  # mean | concat: of target_layers
    method.target_norm = "instance"  # instance | layer | none: of target_layers
    method.target_start = 2  # the last 10 of 12 blocks; counted from 0
    # teacher
    method.momentum_start = 0.9998  # EMA momentum rises on a line
    method.momentum_end = 0.99999  # and stays there
    method.momentum_ramp = 100_000 / 375_300  # share of the run in which it rises
    # masks: squares are visible, then patches at random are added or removed
    method.mask_ratio = 0.8  # share of the patches: 39 of 196 are visible
    method.mask_adjust = 0.07  # squares are drawn for this much more than the visible share
    method.mask_block = 3  # side of a square in patches
    method.masks_per_image = 16  # in each step; the teacher sees the image once
    # decoder: convolutions over the grid
    method.noise = 0.01  # standard deviation of what fills the holes
    method.decoder_width = 768
    method.decoder_depth = 6
    method.decoder_kernel = 3  # side of a convolution's kernel in patches
    method.decoder_groups = 16  # of channels
    # loss: its weight of CLS; the released code has 0.01 x images of a GPU x masks_per_image
    method.cls_weight = 2.56
    method.dtype = "bfloat16"  # of activations; parameters, norms, softmax, losses, EMA are float32
    method.attention = "auto"  # auto | xla (anywhere) | cudnn (fused, NVIDIA GPUs, bfloat16)
    return method
