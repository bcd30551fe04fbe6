"""CAPI, ViT-B/16, ImageNet-1k, 300 epochs: predict clusters of latents, which are learned as well.

    lmim train --config=capi_vit_b --config.data.path=IMAGENET --workdir=RUN

Global batch 2048, 187,500 steps. The authors publish no recipe and no result for this size: batch,
number of clusters and length are choices made here, everything else is that of capi_vit_l. Sources:
the paper (arXiv 2502.08769) and the configuration of the released code.

Assignments are balanced over the whole batch, so that micro_batches must be 1.
"""

from ml_collections import ConfigDict, FieldReference

from lmim_jax.configs import vit_b

# At the size of configs/small.py: a quarter of the 128 images of a batch, and 10 of 64 patches are
# predicted
SMALL = {"clusters": 32, "prediction_ratio": 0.25, "drop_path": 0.0, "momentum": 0.99}


def get_config() -> ConfigDict:
    """vit_b and its differences."""
    config = vit_b.get_config()
    config.batch_size = 2048
    config.epochs = 300
    config.augment.scale = (0.6, 1.0)
    config.method = capi(config.data.get_ref("channels"))
    optimizer = config.optimizer
    optimizer.base_lr = 1.25e-4  # peak 1e-3 at this batch size
    # From 0 in a tenth of the run (numpy.linspace), then 0.8 of half a cosine to 0
    optimizer.warmup_epochs = FieldReference(30.0) * config.get_ref("epochs") / 300
    optimizer.update(warmup_start=0.0, peak_in_warmup=True, floor=0.0, cosine_share=0.8)
    optimizer.weight_decay = 0.1
    optimizer.decay_rules = (
        ("clustering/.*", 0.1),  # an optimizer of its own there, with torch's default of 0.01
        (".*/bias", False),
        (".*norm.*", 0.1),
        (".*", True),  # registers, mask token and gains too
    )
    optimizer.lr_rules = (
        ("clustering/.*", 0.5),  # 5e-4 there, with the same schedule
        (".*/patch_embed/.*", 0.2),
        (".*", 1.0),
    )
    # As in the released evaluation: the teacher, and of an image the mean of what the first block
    # of the predictor makes of it
    config.representation.update(weights="target", image="predicted", patches="patches")
    return config


def capi(channels: FieldReference) -> ConfigDict:
    """Options of the method.

    Args:
      channels: of images, `data.channels`.
    """
    method = ConfigDict()
    method.name = "capi"  # a file in lmim_jax/methods/
    method.grid = (14, 14)  # rows, columns of patches
    method.patch_size = 16
    method.channels = FieldReference(channels)  # of images: data.channels
    method.width = 768
    method.depth = 12
    method.heads = 12
    method.mlp_ratio = 4.0
    method.norm_eps = 1e-5  # of RMSNorms
    method.registers = 16  # tokens on the border of the image that stand for nothing; 4, 8, ...
    # How queries and keys are turned by their coordinates: axial | capi (the halves of a head are
    # mixed, as in the released code: for published weights)
    method.rope = "axial"
    method.rope_frequencies = (7.0, 7e-4)  # the highest and the lowest: turns over an image
    method.drop_path = 0.2  # of the student: share of dropped branches, the same in every block
    # predictor: queries attend to the encoder's tokens, not to each other
    method.decoder_width = 768
    method.decoder_depth = 12
    method.decoder_heads = 12
    # masks: inverse_block (one block is visible) | block (it is masked) | random
    method.sampler = "inverse_block"
    method.roll = True  # shift the block by any number of rows and columns, round the edges
    method.mask_ratio = 0.65  # share of the patches
    method.prediction_ratio = 0.05  # share of the masked patches that are predicted
    # clusters: as many as images in a batch, as in capi_vit_l
    method.clusters = 2048
    method.sinkhorn_tau = 0.06  # temperature of assignments
    method.sinkhorn_iterations = 3  # how often clusters and patches are balanced in turn
    method.positionwise = True  # balance the clusters at every position; False: over all together
    method.cluster_tau = 0.12  # temperature of the softmax that is compared with assignments
    method.tau = 0.12  # the same of predictions
    # teacher: 1 - momentum rises from 0 on a line and falls along a cosine, as the learning rate
    method.momentum = 0.999  # EMA momentum where it is lowest
    method.momentum_warmup = 0.1  # share of the run until then
    method.momentum_share = 0.8  # of half a cosine that follows
    method.dtype = "bfloat16"  # of activations; parameters, norms, softmax, losses, EMA are float32
    method.attention = "auto"  # auto | xla (anywhere) | cudnn (fused, NVIDIA GPUs, bfloat16)
    return method
