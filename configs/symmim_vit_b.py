"""After SymMIM, ViT-B/16, 256 pixels, ImageNet-1k, 300 epochs: checkerboards and image contrast.

    lmim train --config=symmim_vit_b --config.data.path=IMAGENET --workdir=RUN

Global batch 4096, 93,600 steps. The authors have released no code. Published (arXiv 2408.12772):
two fixed checkerboards at two scales, a momentum encoder, pixels of hidden patches as targets, a
contrast as in MoCo v3, and 85.9 % top-1 after fine-tuning for ViT-L; nothing for this size.
Everything marked `ours` is a choice made here, with its reason, and untried on ImageNet: results
are not those of the paper.

Images are compared over the whole batch, so that micro_batches must be 1.
"""

from ml_collections import ConfigDict, FieldReference

from lmim_jax.configs import vit_b

# At the size of configs/small.py
SMALL = {"decoder_depth": 1, "projection_width": 64}


def get_config() -> ConfigDict:
    """vit_b and its differences."""
    config = vit_b.get_config()
    config.epochs = 300  # ours: fewer than SimMIM's 800 are claimed to do; MoCo v3 has 300 as well
    # ours: the crops of vit_b, one for both encoders: what differs between them is the mask alone
    config.method = symmim(config.data.get_ref("channels"))
    optimizer = config.optimizer
    # ours: AdamW with 1.5e-4 per 256 images and decay 0.05 as in vit_b, so that methods compare
    optimizer.update(warmup_start=0.0, floor=0.0)  # ours: as in MoCo v3
    # ours: as in MoCo v3
    optimizer.warmup_epochs = FieldReference(40.0) * config.get_ref("epochs") / 300
    # ours: all but one-dimensional parameters, as in MAE
    optimizer.decay_rules = ((".*/(bias|scale)", False), (".*", True))
    # ours: the mean of the normed tokens is what the contrast compares
    config.representation.update(image="patches", patches="patches")
    return config


def symmim(channels: FieldReference) -> ConfigDict:
    """Options of the method.

    Args:
      channels: of images, `data.channels`.
    """
    method = ConfigDict()
    method.name = "symmim"  # a file in lmim_jax/methods/
    # Rows, columns of patches. ours: 256 pixels, as on 14 x 14 patches the cells of the momentum
    # encoder have hidden mirror images; rows and columns must be divisible by 2 x momentum_cell
    method.grid = (16, 16)
    method.patch_size = 16
    method.channels = FieldReference(channels)  # of images: data.channels
    method.width = 768
    method.depth = 12
    method.heads = 12
    method.mlp_ratio = 4.0
    method.norm_eps = 1e-6
    method.registers = 0  # tokens of the encoder that stand for nothing
    # masks, as published: the hidden cells of a checkerboard of cell x cell patches, always the
    # same. ours: hidden patches are replaced by a mask token, as in SimMIM, not left out
    method.cell = 1  # of the online encoder
    # Of the momentum encoder: cells of 32 pixels, as summaries of the paper by others report
    method.momentum_cell = 2
    # pixels: ours, SimMIM's head, one linear layer, and mean absolute error of normalized images,
    # as the masks are compared with SimMIM's
    method.decoder_depth = 1  # linear layers
    method.decoder_width = 768  # between them, if there are more than one
    # contrast: ours, MoCo v3's layers and temperature for ViTs, on the mean of all tokens, as all
    # of them are there and a CLS token would have no pixels to predict
    method.contrast_weight = 1.0  # ours: both losses count alike; 0: pixels alone
    method.tau = 0.2  # temperature
    method.projector_depth = 3  # linear layers behind both encoders
    method.projector_width = 4096  # between them, and those of the predictor
    method.projection_width = 256  # of what is compared
    method.predictor_depth = 2  # linear layers behind the online projector alone
    method.momentum_start = 0.99  # EMA momentum. ours: MoCo v3's, rising along half a cosine
    method.momentum_end = 1.0  # at the end of training
    method.dtype = "bfloat16"  # of activations; parameters, norms, softmax, losses, EMA are float32
    method.attention = "auto"  # auto | xla (anywhere) | cudnn (fused, NVIDIA GPUs, bfloat16)
    return method
