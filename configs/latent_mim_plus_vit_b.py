"""Latent MIM, ViT-B/16, ImageNet-1k, with the changes that a search on small images found best.

    lmim train --config=latent_mim_plus_vit_b --config.data.path=IMAGENET --workdir=RUN

Targets are the tokens of the first block instead of a projector's, so that a step costs two fifths
of vit_b's FLOPs an image; smaller batches, a lower temperature, and as many epochs as cost what the
800 of vit_b do. docs/results/recipe_search.md has the measurements: Tiny ImageNet with encoders of
four blocks, where it gains 0.5 to 0.8 points by most measures and loses 2.3 by an attentive probe;
on CIFAR-10 and on drawn images, for which it was not tuned, it is not better than vit_b's recipe.
Nothing is known of it at the size of ViT-B: deeper targets may win there.
"""

from ml_collections import ConfigDict

from lmim_jax.configs import vit_b


def get_config() -> ConfigDict:
    """vit_b and its differences."""
    config = vit_b.get_config()
    config.batch_size = 1024
    config.epochs = 1989
    config.method.target_layers = (0,)
    config.method.projector_depth = 0
    config.method.tau = 0.1
    config.optimizer.base_lr = 4.2e-4  # 0.7 times the peak of vit_b
    return config
