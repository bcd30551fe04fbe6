"""CAPI, ViT-S/16, ImageNet-1k, 300 epochs: the recipe of capi_vit_b with other networks.

    lmim train --config=capi_vit_s --config.data.path=IMAGENET --workdir=RUN

The authors publish no recipe and no result for this size.
"""

from ml_collections import ConfigDict

from lmim_jax.configs import capi_vit_b
from lmim_jax.models.vit import VARIANTS


def get_config() -> ConfigDict:
    """capi_vit_b and its differences."""
    config = capi_vit_b.get_config()
    config.method.update(VARIANTS["S/16"])
    config.method.update(decoder_width=384, decoder_heads=6)
    return config
