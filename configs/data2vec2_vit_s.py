"""data2vec 2.0, ViT-S/16, ImageNet-1k, 75 epochs: the recipe of data2vec2_vit_b, other networks.

    lmim train --config=data2vec2_vit_s --config.data.path=IMAGENET --workdir=RUN

The decoder is as wide as the encoder. The authors publish no recipe and no result for this size.
"""

from ml_collections import ConfigDict

from lmim_jax.configs import data2vec2_vit_b
from lmim_jax.models.vit import VARIANTS


def get_config() -> ConfigDict:
    """data2vec2_vit_b and its differences."""
    config = data2vec2_vit_b.get_config()
    config.method.update(VARIANTS["S/16"])
    config.method.decoder_width = 384
    return config
