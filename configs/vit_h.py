"""Latent MIM, ViT-H/14, ImageNet-1k: the recipe of vit_b with another encoder.

    lmim train --config=vit_h --config.data.path=IMAGENET --workdir=RUN

16 x 16 patches of 14 pixels in cells of 18: crops of 288 pixels, evaluation at 224. 26 of 256
patches are visible, the share (10.2 %) of the other sizes. The authors publish no result for this
size.
"""

from ml_collections import ConfigDict

from lmim_jax.configs import vit_b
from lmim_jax.models.vit import VARIANTS


def get_config() -> ConfigDict:
    """vit_b and its differences."""
    config = vit_b.get_config()
    config.method.update(VARIANTS["H/14"], grid=(16, 16))
    return config
