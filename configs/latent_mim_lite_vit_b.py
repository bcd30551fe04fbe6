"""Latent MIM Lite, ViT-B/16, ImageNet-1k, 800 epochs: targets are a frozen random projection.

    lmim train --config=latent_mim_lite_vit_b --config.data.path=IMAGENET --workdir=RUN

No teacher: two fifths of the compute of vit_b. OlmoEarth (Ai2) reports that such targets trained
where its full Latent MIM had collapsed; no result for ImageNet is published.
"""

from ml_collections import ConfigDict

from lmim_jax.configs import vit_b


def get_config() -> ConfigDict:
    """vit_b with other targets."""
    config = vit_b.get_config()
    config.method.target = "random_projection"
    return config
