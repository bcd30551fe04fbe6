"""MAE, ViT-B/16, ImageNet-1k, 800 epochs, normalized pixels: the published recipe.

    lmim train --config=mae_vit_b --config.data.path=IMAGENET --workdir=RUN

Global batch 4096, 249,600 steps. Published for ViT-B with normalized pixels: linear probe (CLS)
65.1 % after 800 epochs (mmpretrain) and 67.8 to 68.0 % after 1600 (the paper and its repository),
fine-tuning 83.3 and 83.6 %. Sources: the paper (arXiv 2111.06377), table 8; the released code. The
released 1600 epochs have the same warm-up: --config.epochs=1600 --config.optimizer.warmup_epochs=40
"""

from ml_collections import ConfigDict, FieldReference

from lmim_jax.configs import vit_b


def get_config() -> ConfigDict:
    """vit_b, with MAE's method and its warm-up from 0 and cosine to 0."""
    config = vit_b.get_config()
    config.method = mae(config.data.get_ref("channels"))
    config.optimizer.update(warmup_start=0.0, floor=0.0)
    # All but one-dimensional parameters
    config.optimizer.decay_rules = ((".*/(bias|scale)", False), (".*", True))
    config.representation.image = "cls"  # after the final norm, as in the authors' linear probe
    return config


def mae(channels: FieldReference) -> ConfigDict:
    """Options of the method.

    Args:
      channels: of images, `data.channels`.
    """
    method = ConfigDict()
    method.name = "mae"
    method.grid = (14, 14)  # rows, columns of patches
    method.patch_size = 16
    method.channels = FieldReference(channels)  # of images: data.channels
    method.width = 768
    method.depth = 12
    method.heads = 12
    method.mlp_ratio = 4.0
    method.norm_eps = 1e-6
    method.registers = 0  # tokens of the encoder that stand for nothing
    method.decoder_width = 512
    method.decoder_depth = 8
    method.decoder_heads = 16
    method.sampler = "random"  # random | checkerboard | checkerboard2 (2 x 2), with ratio 0.5
    method.mask_ratio = 0.75  # share of the patches
    # Of several modalities: each has a mask of its own, or all the same: independent | joint
    method.modality_masks = "independent"
    method.norm_pix = True  # each patch of the target to mean 0, deviation 1
    method.dtype = "bfloat16"  # of activations; parameters, norms, softmax and losses are float32
    method.attention = "auto"  # auto | xla (anywhere) | cudnn (fused, NVIDIA GPUs, bfloat16)
    return method
