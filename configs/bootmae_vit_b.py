"""BootMAE, ViT-B/16, ImageNet-1k, 801 epochs: the released recipe.

    python main.py --config=configs/bootmae_vit_b.py --config.data.path=IMAGENET --workdir=RUN

The authors report 84.2 % top-1 after fine-tuning, 66.1 % by a linear probe on the mean of the tokens of the ninth or
tenth block (their README says 9, their script 10), and 49.1 mIoU on ADE20K (UperNet). Sources: the paper
(arXiv 2207.07116) and the released code (github.com/LightDXY/BootMAE), which this follows where they differ.
Global batch 2048, 500,625 steps: so says the README, though its command (16 GPUs x 256) would give 4096.
"""

from ml_collections import ConfigDict

from lmim_jax.configs import vit_b


def get_config():
    """vit_b and its differences."""
    config = vit_b.get_config()
    config.batch_size = 2048  # peak learning rate 1.2e-3
    config.epochs = 801
    config.augment.update(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    config.method = bootmae(config.data.get_ref("channels"))
    config.optimizer.warmup_start = 0.0
    config.optimizer.floor = (
        1 / 12
    )  # 1e-4 at this batch size; the released code fixes that, whatever the peak is
    config.optimizer.decay_rules = ((".*(bias|norm).*|encoder/cls_token", False), (".*", True))
    return config


def bootmae(channels):
    """The method's knobs."""
    method = ConfigDict()
    method.name = "bootmae"  # a file in lmim_jax/methods/
    method.grid = (14, 14)  # rows, columns of patches
    method.patch_size = 16
    method.channels = channels
    # encoder; L: lmim_jax/models/vit.py VARIANTS
    method.width = 768
    method.depth = 12
    method.heads = (
        12  # also of both decoders; heads of the pixel decoder are floor(512 / 12) = 42 wide
    )
    method.mlp_ratio = 4.0
    method.norm_eps = 1e-6
    # masks: blocks, then single patches at random
    method.num_visible = 49  # of grid[0] x grid[1] = 196
    method.block_total = 120  # patches masked by blocks
    method.block_smallest = 16  # area of a block in patches
    method.block_largest = 60
    method.block_aspect = 0.3  # height / width of a block: 0.3 .. 1 / 0.3
    method.block_exposed = (
        3  # up to so many patches of the blocks are visible all the same (a quirk of the code)
    )
    # two decoders: of pixels, and of features (as wide as the encoder)
    method.decoder_width = 512  # of the one of pixels
    method.decoder_depth = 2  # of each
    # loss
    method.center_weight = 1.0  # a patch amid masked ones counts 1 + this times; 0: all alike
    method.feature_weight = 1.0  # of the feature loss; that of pixels has 1
    method.feature_ramp = 0.25  # share of the run in which the weight grows to that, epoch by epoch
    # teacher: EMA momentum, linear between these values at epochs 0, 100, 400, and constant afterwards
    method.momentum = (0.999, 0.9999, 0.99999)
    method.momentum_epochs = (
        100,
        400,
    )  # epochs, not shares of the run: a shorter run ends earlier on this line
    # precision and kernels
    method.dtype = (
        "bfloat16"  # of activations; parameters, statistics, softmax, losses and EMA are float32
    )
    method.attention = (
        "xla"  # xla | cudnn (fused, NVIDIA GPUs; not where heads are no multiple of 8 wide: 42)
    )
    return method
