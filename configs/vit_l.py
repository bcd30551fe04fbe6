"""Latent MIM, ViT-L/16, ImageNet-1k: the recipe of vit_b with another encoder.

    lmim train --config=vit_l --config.data.path=IMAGENET --workdir=RUN

The authors publish no result for this size.
"""

from ml_collections import ConfigDict

from lmim_jax.configs import vit_b
from lmim_jax.models.vit import VARIANTS


def get_config() -> ConfigDict:
    """vit_b and its differences."""
    config = vit_b.get_config()
    config.method.update(VARIANTS["L/16"])
    return config
