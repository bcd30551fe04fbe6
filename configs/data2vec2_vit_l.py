"""data2vec 2.0, ViT-L/16, ImageNet-1k, 375,300 steps of 128 images: the published recipe.

    lmim train --config=data2vec2_vit_l --config.data.path=IMAGENET --workdir=RUN

37.5 epochs, with 16 masks per image. The authors report 86.8 % top-1 after fine-tuning, in the
abstract, for 150 epochs. Sources: the paper (arXiv 2212.07525) and `large_images_only_task.yaml`
of the released code (fairseq).
"""

from ml_collections import ConfigDict

from lmim_jax.configs import data2vec2_vit_b
from lmim_jax.models.vit import VARIANTS


def get_config() -> ConfigDict:
    """data2vec2_vit_b and its differences."""
    config = data2vec2_vit_b.get_config()
    config.batch_size = 128
    config.epochs = 38  # of 10,009 steps each on ImageNet-1k
    config.total_steps = 375_300
    config.optimizer.base_lr = 8e-4  # peak 4e-4 at this batch size
    config.method.update(VARIANTS["L/16"])
    config.method.update(prenet_depth=0, target_start=6)  # the last 18 of 24 blocks
    config.method.momentum_ramp = 150_000 / 375_300
    config.method.update(mask_ratio=0.75, mask_adjust=0.1)  # 49 of 196 patches are visible
    config.method.update(decoder_width=1024, decoder_depth=3, decoder_kernel=5)
    config.method.cls_weight = 1.28  # 8 images of a GPU
    return config
