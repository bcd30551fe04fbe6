"""Latent MIM, ViT-B/16, ImageNet-100, 300 epochs: the setting of the paper's ablations.

    python main.py --config=configs/in100_vit_b.py --config.data.source=folder --config.data.path=IN100 --workdir=RUN

IN100 is a folder train/WNID/*.JPEG, test/WNID/*.JPEG of the hundred classes. Global batch 1024, peak lr 6e-4, no
similarity constraint, as in the authors' recorded run. They publish no figure for it in numbers.
"""

from configs import vit_b


def get_config():
    """vit_b and its differences."""
    config = vit_b.get_config()
    config.batch_size = 1024
    config.epochs = 300
    config.optimizer.warmup_epochs = 30.0
    config.method.similarity_weight = 0.0
    return config
