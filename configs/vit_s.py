"""Latent MIM, ViT-S/16, ImageNet-1k: the recipe of vit_b with another encoder. The authors publish no figure for it.

python main.py --config=configs/vit_s.py --config.data.source=folder --config.data.path=IMAGENET --workdir=RUN
"""

from lmim_jax.configs import vit_b
from lmim_jax.models.vit import VARIANTS


def get_config():
    """vit_b and its differences."""
    config = vit_b.get_config()
    config.method.update(VARIANTS["S/16"])
    return config
