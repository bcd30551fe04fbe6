"""Every method at the size of a laptop, on `shapes` or CIFAR-10: only the method differs.

    lmim train --config=small:latent_mim,shapes --workdir=RUN
    lmim train --config=small:mae,cifar10 --config.data.path=CIFAR10 --workdir=RUN

All have the same encoder (96 wide, 4 deep, 8 x 8 patches), optimizer, crops and evaluation;
targets, masks, losses and schedules are those of each method's paper. A run takes 2 to 4 minutes on
two CPU cores; RESULTS.md lists what the methods reach.
"""

import functools
import importlib
from collections.abc import Callable

from ml_collections import ConfigDict, FieldReference

from lmim_jax.configs import quickstart
from lmim_jax.methods import base
from lmim_jax.utils import recipes
from lmim_jax.utils.errors import UserError

Change = Callable[[ConfigDict], None]

# The options that make every method small, as far as it has them. What else has to change at this
# size is in its recipe, configs/NAME_vit_b.py: a dict SMALL of options of the method.
SIZES = dict(grid=(8, 8), patch_size=8, width=96, depth=4, heads=4, dtype="float32")
SIZES |= dict(decoder_width=64, decoder_depth=2, decoder_heads=4, latent_decoder_width=64)
SIZES |= dict(projector_width=256)


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
    for name, choices in ((method, methods()), (dataset, DATASETS)):
        if name not in choices:
            listed = " | ".join(choices)
            raise UserError(f"configs/small.py:{which}: {name!r} must be one of: {listed}")
        choices[name](config)
    return config


def methods() -> dict[str, Change]:
    """The methods: Latent MIM and all others that have a recipe NAME_vit_b."""
    found: dict[str, Change] = {"latent_mim": latent_mim, "latent_mim_lite": latent_mim_lite}
    for name in base.names():
        if f"{name}_vit_b" in recipes.names():
            found[name] = functools.partial(other_method, name=name)
    return found


def latent_mim(config: ConfigDict) -> None:
    """As in quickstart."""


def latent_mim_lite(config: ConfigDict) -> None:
    """Targets are a frozen random projection of the patches, without a teacher."""
    config.method.target = "random_projection"


def other_method(config: ConfigDict, name: str) -> None:
    """The method of a recipe NAME_vit_b with small sizes."""
    recipe = importlib.import_module(f"lmim_jax.configs.{name}_vit_b")
    config.method = recipe.get_config().method
    config.method.channels = FieldReference(config.data.get_ref("channels"))
    config.method.update({key: value for key, value in SIZES.items() if key in config.method})
    config.method.update(getattr(recipe, "SMALL", {}))
    config.optimizer.lr_rules = recipe.get_config().optimizer.lr_rules
    if base.method_class(name).WHOLE_BATCH:
        config.micro_batches = 1


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


DATASETS: dict[str, Change] = {"shapes": shapes, "cifar10": cifar10}
