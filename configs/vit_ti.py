"""Latent MIM, ViT-Ti/16, ImageNet-1k: the recipe of vit_b with another encoder.

    lmim train --config=vit_ti --config.data.path=IMAGENET --workdir=RUN

Decoder and projector are as wide in proportion to the encoder as those of vit_b. The authors
publish no result for this size.
"""

from ml_collections import ConfigDict

from lmim_jax.configs import vit_b
from lmim_jax.models.vit import VARIANTS


def get_config() -> ConfigDict:
    """vit_b and its differences."""
    config = vit_b.get_config()
    config.method.update(VARIANTS["Ti/16"])
    config.method.update(decoder_width=128, decoder_heads=4, projector_width=1024)
    return config
