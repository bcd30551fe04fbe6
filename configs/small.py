"""Every method at the size of a laptop, on `shapes` or CIFAR-10: only the method differs.

    lmim train --config=small:latent_mim,shapes --workdir=RUN
    lmim train --config=small:mae,cifar10 --config.data.path=CIFAR10 --workdir=RUN

All have the same encoder (96 wide, 4 deep, 8 x 8 patches), optimizer, crops and evaluation;
targets, masks, losses and schedules are those of each method's paper. A run takes 2 to 4 minutes on
two CPU cores; RESULTS.md lists what the methods reach.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from lmim_jax.configs import bootmae_vit_b, ijepa_vit_b, mae_vit_b, pilamim_vit_b, quickstart
from lmim_jax.utils.errors import UserError

SIZES = dict(grid=(8, 8), patch_size=8, width=96, depth=4, heads=4, dtype="float32")
DECODER = dict(decoder_width=64, decoder_depth=2, decoder_heads=4)


def get_config(which: str = "latent_mim,shapes") -> ConfigDict:
    """quickstart, with another method and other images.

    Args:
      which: METHOD,DATASET.
    """
    method, _, dataset = which.partition(",")
    config = quickstart.get_config()
    config.update(epochs=8, log_every=32)
    del config.evaluators.logistic_regression
    config.evaluators.knn.baselines = False
    config.evaluators.visualization.every = 0.0
    for name, choices in ((method, METHODS), (dataset, DATASETS)):
        if name not in choices:
            listed = " | ".join(choices)
            raise UserError(f"configs/small.py:{which}: {name!r} must be one of: {listed}")
        choices[name](config)
    return config


def latent_mim(config: ConfigDict) -> None:
    """As in quickstart."""


def latent_mim_lite(config: ConfigDict) -> None:
    """Targets are a frozen random projection of the patches, without a teacher."""
    config.method.target = "random_projection"


def mae(config: ConfigDict) -> None:
    """MAE."""
    config.method = mae_vit_b.mae(config.data.get_ref("channels"))
    config.method.update(**SIZES, **DECODER)


def pilamim(config: ConfigDict) -> None:
    """PiLaMIM."""
    config.method = pilamim_vit_b.pilamim(config.data.get_ref("channels"))
    config.method.update(**SIZES, **DECODER, latent_decoder_width=64)


def ijepa(config: ConfigDict) -> None:
    """I-JEPA; of 8 x 8 patches, its context has 11 on average, and at most 17 in 200 batches."""
    config.method = ijepa_vit_b.ijepa(config.data.get_ref("channels"))
    config.method.update(**SIZES, **DECODER, context_capacity=20, min_context=3)


def bootmae(config: ConfigDict) -> None:
    """BootMAE; its momentum rises over the same shares of the run, adapted to 500 steps."""
    config.method = bootmae_vit_b.bootmae(config.data.get_ref("channels"))
    config.method.update(**SIZES, decoder_width=64)
    config.method.update(num_visible=16, block_total=39, block_smallest=5, block_largest=20)
    config.method.update(momentum=(0.99, 0.995, 0.999), momentum_epochs=(1, 4))


def shapes(config: ConfigDict) -> None:
    """As in quickstart: 8,192 synthetic images of 64 pixels."""


def cifar10(config: ConfigDict) -> None:
    """The first 1,000 (200) images of each class, see cifar10.py: 32 pixels, in patches of 4."""
    config.epochs = 12
    config.data.update(source="folder", canvas=32, train_per_class=1000, test_per_class=200)
    config.augment.eval_resize = 32
    config.method.patch_size = 4
    if "gap" in config.method:
        config.method.gap = 1


Change = Callable[[ConfigDict], None]
METHODS: dict[str, Change] = {
    "latent_mim": latent_mim,
    "latent_mim_lite": latent_mim_lite,
    "pilamim": pilamim,
    "mae": mae,
    "ijepa": ijepa,
    "bootmae": bootmae,
}
DATASETS: dict[str, Change] = {"shapes": shapes, "cifar10": cifar10}
