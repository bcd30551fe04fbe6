"""Interactive MIM, ViT-S/16, pairs of RGB and thermal images: after Vu et al. (arXiv 2409.08885).

    lmim train --config=interactive_mim_vit_s --config.data.path=PAIRS --workdir=RUN

PAIRS holds the folders rgb/ and thermal/ with images of the same names and sizes, or is what
lmim prepare PAIRS --modalities=rgb,thermal made. Folders with other names are options, such as
--config.data.modalities.thermal.path=infrared. The authors have released no code. Published:
patches of two co-registered modalities are masked, masked tokens attend to the unmasked ones of
both, and their pixels are predicted; no ratio, depth, width or schedule. Everything marked `ours`
is a choice made here, with its reason: results are not those of the paper.
"""

from ml_collections import ConfigDict, FieldReference

from lmim_jax.configs import vit_b
from lmim_jax.models.vit import VARIANTS

# At the size of configs/small.py
SMALL: dict[str, int] = {}


def get_config() -> ConfigDict:
    """vit_b and its differences."""
    config = vit_b.get_config()
    # ours: sets of pairs have thousands of images, not millions: many epochs of small batches
    config.batch_size = 256
    config.epochs = 800
    rgb_and_thermal(config)
    config.method = interactive_mim(config.data.get_ref("channels"))
    config.method.update(VARIANTS["S/16"])  # ours: the paper has a Swin, which sees all patches
    # ours: MAE's optimizer
    config.optimizer.update(warmup_start=0.0, floor=0.0)
    config.optimizer.decay_rules = ((".*/(bias|scale)", False), (".*", True))
    return config


def rgb_and_thermal(config: ConfigDict) -> None:
    """Give a recipe images of two modalities; its method must take several.

    Args:
      config: with `data` and `augment`, which are changed.
    """
    modalities = config.data.modalities
    modalities.rgb = ConfigDict()
    modalities.rgb.path = "rgb"  # the folder in data.path; of a prepared dataset, the feature
    modalities.rgb.channels = 3
    modalities.rgb.range = "auto"  # as data.range
    modalities.rgb.mean = (0.485, 0.456, 0.406)  # ImageNet's
    modalities.rgb.std = (0.229, 0.224, 0.225)
    # Side of its patches, which divides that of the method: smaller ones are averaged over squares
    # of pixels, for sensors of less resolution whose images were enlarged
    modalities.rgb.patch_size = 16
    modalities.thermal = ConfigDict()
    modalities.thermal.path = "thermal"
    modalities.thermal.channels = 1
    modalities.thermal.range = "auto"
    # ours: the middle of the levels; lmim prepare PAIRS --modalities=rgb,thermal --statistics
    # measures your own
    modalities.thermal.mean = (0.5,)
    modalities.thermal.std = (0.25,)
    modalities.thermal.patch_size = 16
    rgb = modalities.rgb
    thermal = modalities.thermal
    config.data.channels = rgb.get_ref("channels") + thermal.get_ref("channels")
    for key in ("mean", "std"):
        config.augment[key] = rgb.get_ref(key) + thermal.get_ref(key)


def interactive_mim(channels: FieldReference) -> ConfigDict:
    """Options of the method.

    Args:
      channels: of images, `data.channels`.
    """
    method = ConfigDict()
    method.name = "interactive_mim"  # a file in lmim_jax/methods/
    method.grid = (14, 14)  # rows, columns of patches, of every modality
    method.patch_size = 16  # pixels
    method.channels = FieldReference(channels)  # of images: data.channels, of all modalities
    method.width = 384
    method.depth = 12
    method.heads = 6
    method.mlp_ratio = 4.0
    method.norm_eps = 1e-6
    method.registers = 0  # tokens of the encoder that stand for nothing
    method.sampler = "random"  # random | checkerboard | checkerboard2 (2 x 2), with ratio 0.5
    method.mask_ratio = 0.75  # share of the patches of each modality. ours: MAE's
    # independent | joint. ours: independent, so that what is hidden in one modality may be visible
    # in the other: that is the interaction
    method.modality_masks = "independent"
    # cross (masked tokens attend to visible ones alone, as published) | self (MAE's decoder: one
    # sequence of visible and masked tokens)
    method.decoder = "cross"
    method.decoder_width = 512  # of its tokens. ours: MAE's
    method.decoder_depth = 4  # its blocks. ours: half of MAE's, as all of them are cross-attention
    method.decoder_heads = 16  # attention heads of a block
    method.predict = "pixels"  # pixels (as published) | latents (patch discrimination)
    method.norm_pix = True  # pixels: each patch to mean 0, deviation 1. ours: as in MAE
    # latents: as in Latent MIM, see vit_b.py, all of it ours; the teacher sees all patches of all
    # modalities, and a prediction picks its target among those of its own modality
    method.tau = 0.2  # temperature
    method.standardize = True  # standardize predictions over the patches of an image
    method.target = "ema"  # ema | joint | stop_gradient | random | random_projection | frozen:RUN
    method.target_layers = ()  # blocks whose tokens are targets, such as (2, 5, 8, 11); (): output
    method.target_combine = "concat"  # concat | mean: of these layers
    method.target_norm = "layer"  # layer | instance | none: how each of them is standardized
    method.momentum_start = 0.99  # EMA momentum rises along half a cosine
    method.momentum_end = 1.0  # at the end of training
    method.dtype = "bfloat16"  # of activations; parameters, norms, softmax and losses are float32
    method.attention = "auto"  # auto | xla (anywhere) | cudnn (fused, NVIDIA GPUs, bfloat16)
    return method
