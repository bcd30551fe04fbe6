"""Every method at the size of a laptop, on `shapes` or CIFAR-10, from one base: only the method differs.

    python main.py --config=configs/small.py:latent_mim,shapes --workdir=RUN
    python main.py --config=configs/small.py:mae,cifar10 --config.data.path=CIFAR10 --workdir=RUN

The same encoder (96 wide, 4 deep, 8 x 8 patches), optimiser, crops and evaluation for all; a method keeps what its
paper says of targets, masks, losses and schedules. A run takes 2 to 4 minutes on two CPU cores; what the methods reach
is in RESULTS.md.
"""

from lmim_jax.configs import bootmae_vit_b, ijepa_vit_b, mae_vit_b, pilamim_vit_b, quickstart
from lmim_jax.utils.errors import UserError

SIZES = dict(grid=(8, 8), patch_size=8, width=96, depth=4, heads=4, dtype="float32")
DECODER = dict(decoder_width=64, decoder_depth=2, decoder_heads=4)


def get_config(which="latent_mim,shapes"):
    """quickstart, with another method and other images. `which`: METHOD,DATASET."""
    method, _, dataset = which.partition(",")
    config = quickstart.get_config()
    config.update(epochs=8, log_every=32)
    config.evaluators.knn.baselines = False
    config.evaluators.visualization.every = 0.0
    for name, choices in ((method, METHODS), (dataset, DATASETS)):
        if name not in choices:
            raise UserError(f"configs/small.py:{which}: {name!r} is none of: {' | '.join(choices)}")
        choices[name](config)
    return config


def latent_mim(config):
    """As in quickstart."""


def latent_mim_lite(config):
    """Targets are a frozen random projection of the patches, without a teacher."""
    config.method.target = "random_projection"


def mae(config):
    """MAE."""
    config.method = mae_vit_b.mae(config.data.get_ref("channels"))
    config.method.update(**SIZES, **DECODER)


def pilamim(config):
    """PiLaMIM."""
    config.method = pilamim_vit_b.pilamim(config.data.get_ref("channels"))
    config.method.update(**SIZES, **DECODER, latent_decoder_width=64)


def ijepa(config):
    """I-JEPA; on 8 x 8 patches its context has 11 of them on average, and 17 at most in 200 batches."""
    config.method = ijepa_vit_b.ijepa(config.data.get_ref("channels"))
    config.method.update(**SIZES, **DECODER, context_capacity=20, min_context=3)


def bootmae(config):
    """BootMAE; its momentum rises at the same shares of the run, between values for 500 steps instead of 500,000."""
    config.method = bootmae_vit_b.bootmae(config.data.get_ref("channels"))
    config.method.update(**SIZES, decoder_width=64)
    config.method.update(num_visible=16, block_total=39, block_smallest=5, block_largest=20)
    config.method.update(momentum=(0.99, 0.995, 0.999), momentum_epochs=(1, 4))


def shapes(config):
    """As in quickstart: 8,192 drawn images of 64 pixels."""


def cifar10(config):
    """The first 1,000 (200) images of each class, 32 pixels, in patches of 4; a folder, see configs/cifar10.py."""
    config.epochs = 12
    config.data.update(source="folder", canvas=32, train_per_class=1000, test_per_class=200)
    config.augment.eval_resize = 32
    config.method.patch_size = 4
    if "gap" in config.method:
        config.method.gap = 1


METHODS = {
    method.__name__: method
    for method in (latent_mim, latent_mim_lite, pilamim, mae, ijepa, bootmae)
}
DATASETS = {"shapes": shapes, "cifar10": cifar10}
