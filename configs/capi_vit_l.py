"""CAPI, ViT-L/14, 500,000 steps of 16,384 images: the published recipe.

    lmim train --config=capi_vit_l --config.data.path=IMAGENET --workdir=RUN

The same for every dataset; on ImageNet-1k, 6410 epochs. The authors report 82.9 % top-1 with an
attentive probe for the model trained on ImageNet-1k. 408 GFLOP an image and step. Sources: the
paper (arXiv 2502.08769) and `default_pretrain_config.yaml` of the released code.
"""

from ml_collections import ConfigDict

from lmim_jax.configs import capi_vit_b
from lmim_jax.models.vit import VARIANTS


def get_config() -> ConfigDict:
    """capi_vit_b and its differences."""
    config = capi_vit_b.get_config()
    config.batch_size = 16_384
    config.epochs = 6410  # of 78 steps each on ImageNet-1k
    config.total_steps = 500_000
    config.optimizer.base_lr = 1.5625e-5  # peak 1e-3 at this batch size
    config.method.update(VARIANTS["L/16"])
    config.method.update(grid=(16, 16), patch_size=14, clusters=16_384)
    config.method.update(decoder_width=1024, decoder_heads=16)
    config.remat = "dots"  # everything between products is computed again, as in the released code
    return config
