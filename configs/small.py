"""Every method at the size of a laptop, on small sets of images: only the method differs.

    lmim train --config=small:latent_mim,shapes --workdir=RUN
    lmim train --config=small:mae,cifar10 --config.data.path=CIFAR10 --workdir=RUN
    lmim train --config=small:interactive_mim,rgb_thermal --config.data.path=PAIRS --workdir=RUN
    lmim train --config=small:latent_mim,hit_uav --config.data.path=HIT_UAV --workdir=RUN

All have the same encoder (96 wide, 4 deep, 8 x 8 patches), optimizer, crops and evaluation;
targets, masks, losses and schedules are those of each method's paper. A run takes 2 to 4 minutes on
two CPU cores, with hit_uav half an hour to an hour on one; RESULTS.md lists what the methods reach.
"""

import functools
import importlib
from collections.abc import Callable

from ml_collections import ConfigDict, FieldReference

from lmim_jax.configs import evaluate, interactive_mim_vit_s, quickstart
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
    known = {**_with_recipe("vit_s"), **methods()}  # also those for pairs alone
    for name, choices in ((method, known), (dataset, DATASETS)):
        if name not in choices:
            listed = " | ".join(choices)
            raise UserError(f"configs/small.py:{which}: {name!r} must be one of: {listed}")
        choices[name](config)
    return config


def methods() -> dict[str, Change]:
    """The methods for images in general: Latent MIM and all that have a recipe NAME_vit_b."""
    found: dict[str, Change] = {"latent_mim": latent_mim, "latent_mim_lite": latent_mim_lite}
    found.update(_with_recipe("vit_b"))
    return found


def _with_recipe(size: str) -> dict[str, Change]:
    """The methods that have a recipe NAME_SIZE."""
    found: dict[str, Change] = {}
    for name in base.names():
        recipe = f"{name}_{size}"
        if recipe in recipes.names():
            found[name] = functools.partial(other_method, name=name, recipe=recipe)
    return found


def latent_mim(config: ConfigDict) -> None:
    """As in quickstart."""


def latent_mim_lite(config: ConfigDict) -> None:
    """Targets are a frozen random projection of the patches, without a teacher."""
    config.method.target = "random_projection"


def other_method(config: ConfigDict, name: str, recipe: str) -> None:
    """The method of a recipe, NAME_vit_b or NAME_vit_s, with small sizes."""
    module = importlib.import_module(f"lmim_jax.configs.{recipe}")
    config.method = module.get_config().method
    config.method.channels = FieldReference(config.data.get_ref("channels"))
    config.method.update({key: value for key, value in SIZES.items() if key in config.method})
    config.method.update(getattr(module, "SMALL", {}))
    config.optimizer.lr_rules = module.get_config().optimizer.lr_rules
    if base.method_class(name).needs_whole_batch(config.method):
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


def rgb_thermal(config: ConfigDict) -> None:
    """Pairs of RGB and thermal images, see interactive_mim_vit_s.py: 64 pixels, 200 epochs."""
    config.epochs = 200
    config.batch_size = 32
    config.data.update(source="folder", canvas=128)
    interactive_mim_vit_s.rgb_and_thermal(config)
    for modality in config.data.modalities.values():
        modality.patch_size = config.method.patch_size


def hit_uav(config: ConfigDict) -> None:
    """Aerial thermal images of 640 x 512 pixels, see evaluate.py: detection at start and end.

    The folder has train.json, test.json and their images in train/ and test/. Crops show as much of
    the scene to a pixel as the input of the detector, which is smaller than in evaluate.py and
    learned for half as long.
    """
    config.epochs = 200
    config.batch_size = 32
    config.micro_batches = 1
    config.data.update(source="folder", canvas=640)
    config.augment.scale = (0.05, 0.2)
    del config.evaluators.knn  # there are no classes
    config.evaluators.detection = evaluate.get_config("detection").hit_uav
    config.evaluators.detection.update(size=(192, 240), epochs=10.0, every=float(config.epochs))
    config.evaluators.detection.path = config.data.get_ref("path")
    config.evaluators.detection.seed = config.get_ref("seed")


DATASETS: dict[str, Change] = {
    "shapes": shapes,
    "cifar10": cifar10,
    "rgb_thermal": rgb_thermal,
    "hit_uav": hit_uav,
}
