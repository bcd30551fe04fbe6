"""I-JEPA, ViT-B/16, ImageNet-1k, 600 epochs: the released configurations at the paper's size B.

    lmim train --config=ijepa_vit_b --config.data.path=IMAGENET --workdir=RUN

Global batch 2048, 375,000 steps. The paper reports a linear probe of 72.9 % top-1 (mean of the
teacher's patches) for ViT-B/16 after 600 epochs (arXiv 2301.08243, table 1). The authors released
no configuration and no weights of this size: the depth of the predictor is the paper's, everything
else as in their ViT-H/14.
"""

from ml_collections import ConfigDict, FieldReference, config_dict

from lmim_jax.configs import vit_b

# At the size of configs/small.py, a context has 11 patches on average, at most 17 in 200 batches
SMALL = {"context_capacity": 20, "min_context": 3}


def get_config() -> ConfigDict:
    """vit_b, with I-JEPA's method, crops, schedules and weights to evaluate."""
    config = vit_b.get_config()
    config.batch_size = 2048
    config.epochs = 600
    config.optimizer.warmup_epochs = FieldReference(40.0) * config.get_ref("epochs") / 600
    config.method = ijepa(config.data.get_ref("channels"))
    config.augment.update(scale=(0.3, 1.0), flip=False, interpolation="bilinear")
    config.optimizer.base_lr = 1.25e-4  # peak 1e-3 at batch 2048
    config.optimizer.update(warmup_start=0.2, floor=1e-3, b2=0.999)
    config.optimizer.update(weight_decay=0.04, weight_decay_end=0.4)
    config.optimizer.steps_ahead = 1  # the released code counts up before it reads the schedules
    # All but one-dimensional parameters
    config.optimizer.decay_rules = ((".*/(bias|scale)", False), (".*", True))
    # As the authors evaluate: the target encoder, mean of the patches after the final norm
    config.representation.update(weights="target", image="patches", patches="patches")
    return config


def ijepa(channels: FieldReference) -> ConfigDict:
    """Options of the method.

    Args:
      channels: of images, `data.channels`.
    """
    method = ConfigDict()
    method.name = "ijepa"
    method.grid = (14, 14)  # rows, columns of patches
    method.patch_size = 16
    method.channels = FieldReference(channels)  # of images: data.channels
    method.width = 768
    method.depth = 12
    method.heads = 12
    method.mlp_ratio = 4.0
    method.norm_eps = 1e-6
    method.registers = 0  # tokens of the encoder that stand for nothing
    method.decoder_width = 384  # of the predictor
    method.decoder_depth = 6
    method.decoder_heads = 12
    # masks
    method.blocks = 4  # target blocks per image
    method.target_scale = (0.15, 0.2)  # their share of the area
    method.target_aspect = (0.75, 1.5)  # their aspect ratios
    method.context_scale = (0.85, 1.0)  # of the context block, before the targets are removed
    # The encoder's static length in patches. Unless set, it follows the grid: 72 of 196 (in 3,000
    # batches, contexts have at most 69)
    method.context_capacity = config_dict.placeholder(int)
    method.min_context = 10  # draw again until the context has more patches than this
    method.mask_batch = 128  # images whose contexts are cut to the shortest; as released, per GPU
    method.biased_masks = True  # as released, see masking.Multiblock; False: blocks anywhere
    method.loss = "smooth_l1"  # smooth_l1 (the code) | mse (the paper) | l1
    # The source and the layers of targets, as in vit_b
    method.target = "ema"
    method.target_layers = ()
    method.target_combine = "concat"
    method.target_norm = "layer"
    method.momentum_start = 0.996  # EMA momentum rises along a line
    method.momentum_end = 1.0
    # Switches, explained in vit_b
    method.masks_per_image = 1
    method.position_noise = 0.0  # 0: off
    method.context_weight = 0.0  # 0: off
    method.context_warmup = 0.15
    method.sigreg_weight = 0.0  # 0: off
    method.sigreg_directions = 512
    method.variance_weight = 0.0  # 0: off
    method.regularized = "images"
    method.dtype = "bfloat16"  # of activations; parameters, norms, softmax, losses, EMA are float32
    method.attention = "auto"  # auto | xla (anywhere) | cudnn (fused, NVIDIA GPUs, bfloat16)
    return method
