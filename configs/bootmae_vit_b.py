"""BootMAE, ViT-B/16, ImageNet-1k, 801 epochs: the released recipe.

    lmim train --config=bootmae_vit_b --config.data.path=IMAGENET --workdir=RUN

The authors report 84.2 % top-1 after fine-tuning, 66.1 % by a linear probe on the mean of the
tokens of the ninth or tenth block (their README says 9, their script 10), and 49.1 mIoU on ADE20K
(UperNet). Sources: the paper (arXiv 2207.07116) and the released code
(github.com/LightDXY/BootMAE), which this recipe follows where they differ. Global batch 2048,
500,625 steps, according to the README; its command (16 GPUs x 256) would give 4096.
"""

from ml_collections import ConfigDict, FieldReference, config_dict

from lmim_jax.configs import vit_b

# At the size of configs/small.py: over the same shares of a run of 500 steps
SMALL = {"momentum": (0.99, 0.995, 0.999), "momentum_epochs": (1, 4)}


def get_config() -> ConfigDict:
    """vit_b and its differences."""
    config = vit_b.get_config()
    config.batch_size = 2048  # peak learning rate 1.2e-3
    config.epochs = 801
    config.optimizer.warmup_epochs = FieldReference(40.0) * config.get_ref("epochs") / 801
    config.augment.update(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    config.method = bootmae(config.data.get_ref("channels"))
    config.optimizer.update(warmup_start=0.0, peak_in_warmup=True)  # numpy.linspace as released
    config.optimizer.floor = 1 / 12  # 1e-4 at this batch size, a fixed value in the released code
    config.optimizer.decay_rules = ((".*(bias|norm).*|encoder/cls_token", False), (".*", True))
    # The mean over patches after the tenth block, as in the script of the authors' linear probe
    config.representation.image = "block09/tokens"
    return config


def bootmae(channels: FieldReference) -> ConfigDict:
    """Options of the method.

    Args:
      channels: of images, `data.channels`.
    """
    method = ConfigDict()
    method.name = "bootmae"  # a file in lmim_jax/methods/
    method.grid = (14, 14)  # rows, columns of patches
    method.patch_size = 16
    method.channels = FieldReference(channels)  # of images: data.channels
    # encoder; L: lmim_jax/models/vit.py VARIANTS
    method.width = 768
    method.depth = 12
    method.heads = 12  # also of both decoders; heads of the pixel decoder are 512 // 12 = 42 wide
    method.mlp_ratio = 4.0
    method.norm_eps = 1e-6
    method.registers = 0  # tokens of the encoder that stand for nothing
    # masks: blocks, then single patches at random. The first four are numbers of patches; unless
    # set, they follow the grid: 49, 120, 16 and 60 of grid[0] x grid[1] = 196
    method.num_visible = config_dict.placeholder(int)
    method.block_total = config_dict.placeholder(int)  # patches masked by blocks
    method.block_smallest = config_dict.placeholder(int)  # least area of a block
    method.block_largest = config_dict.placeholder(int)  # and the largest
    method.block_aspect = 0.3  # height / width of a block: 0.3 .. 1 / 0.3
    method.block_exposed = 3  # up to this many patches of the blocks stay visible, as released
    # two decoders: of pixels, and of features (as wide as the encoder)
    method.decoder_width = 512  # of the pixel decoder
    method.decoder_depth = 2  # of each
    # loss
    method.center_weight = 1.0  # a patch among masked ones has the weight 1 + this; 0: all alike
    method.feature_weight = 1.0  # of the feature loss; the pixel loss has weight 1
    method.feature_ramp = 0.25  # share of the run in which the weight grows to it, epoch by epoch
    # teacher: EMA momentum, linear between these values at epochs 0, 100, 400, then constant
    method.momentum = (0.999, 0.9999, 0.99999)
    method.momentum_epochs = (100, 400)  # epochs: a shorter run ends earlier on this line
    # precision and kernels
    method.dtype = "bfloat16"  # of activations; parameters, norms, softmax, losses, EMA are float32
    method.attention = "auto"  # auto | xla (anywhere) | cudnn (fused; not here: heads are 42 wide)
    return method
