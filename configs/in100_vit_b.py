"""Latent MIM, ViT-B/16, ImageNet-100, 300 epochs: the setting of the paper's ablations.

    lmim train --config=in100_vit_b --config.data.path=IMAGENET --workdir=RUN

IMAGENET is a folder train/WNID/*.JPEG, test/WNID/*.JPEG of all classes or of these hundred; those
of imagenet100.txt are used. From TFDS instead: --config.data.source=tfds
--config.data.name=imagenet2012 --config.data.dir=DIR --config.data.test_split=validation. Global
batch 1024, peak learning rate 6e-4, no similarity constraint, as in the authors' recorded run. They
publish no numbers for it.
"""

import pathlib

from ml_collections import ConfigDict, FieldReference

from lmim_jax.configs import vit_b


def get_config() -> ConfigDict:
    """vit_b and its differences."""
    config = vit_b.get_config()
    config.batch_size = 1024
    config.epochs = 300
    config.data.classes = str(pathlib.Path(__file__).with_name("imagenet100.txt"))
    config.optimizer.warmup_epochs = FieldReference(30.0) * config.get_ref("epochs") / 300
    config.method.similarity_weight = 0.0
    return config
