"""After SymMIM, ViT-S/16, 256 pixels, ImageNet-1k, 300 epochs: symmim_vit_b with other networks.

    lmim train --config=symmim_vit_s --config.data.path=IMAGENET --workdir=RUN

No result for this size is known to us.
"""

from ml_collections import ConfigDict

from lmim_jax.configs import symmim_vit_b
from lmim_jax.models.vit import VARIANTS


def get_config() -> ConfigDict:
    """symmim_vit_b and its differences."""
    config = symmim_vit_b.get_config()
    config.method.update(VARIANTS["S/16"])
    config.method.decoder_width = 384
    return config
