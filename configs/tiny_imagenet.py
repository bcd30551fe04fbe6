"""Every method on Tiny ImageNet (64 pixels): the published recipe at the size of one machine.

    lmim train --config=tiny_imagenet:latent_mim --config.data.path=TINY --workdir=RUN
    lmim train --config=tiny_imagenet:mae,small --config.data.path=TINY --workdir=RUN

The argument is METHOD or METHOD,SIZE; micro is for two CPU cores, small for one GPU, and nano for
searches with many short runs, which measure k-NN and logistic regression alone. TINY is a folder
with train/CLASS/*.JPEG and test/CLASS/*.JPEG. Encoder, images, epochs, batch size and evaluation
are the same for every method. Crops, masks, losses, and the shapes of the schedules are
those of the method's recipe. What a paper fixes in relation to the length of its run is scaled by
three rules:

- the warm-up takes the published share of the epochs;
- an EMA starts with a momentum that averages over at most a twentieth of the run: 0.996 averages
  over 250 steps, and a run of 2,000 steps starts at 0.99. If the momentum then changes by epochs,
  it does so at the published shares of the run, and 1 - momentum by the published factors. Where
  the EMA has a warm-up, its lowest momentum follows the rule;
- the learning rate is the published one, times a factor of the encoder's width, see SIZES.
"""

import importlib
import re
import types
from typing import Any

from ml_collections import ConfigDict

from lmim_jax.configs import evaluate, small, vit_b
from lmim_jax.evaluators import base as evaluators
from lmim_jax.methods import base
from lmim_jax.utils.errors import UserError

# `images` are the first of each class, and `decoder` the options of decoders and projectors, as far
# as a method has them
SIZES: dict[str, dict[str, Any]] = {
    "nano": dict(
        encoder=dict(width=96, depth=4, heads=4, dtype="float32"),
        decoder=dict(decoder_width=64, decoder_depth=2, decoder_heads=4, projector_width=256),
        images=50,
        epochs=8,
        probe_epochs=0.0,  # none
        batch_size=128,
        micro_batches=4,
        rate=16.0,
    ),
    "micro": dict(
        encoder=dict(width=192, depth=4, heads=3, dtype="float32"),
        decoder=dict(decoder_width=128, decoder_depth=2, decoder_heads=4, projector_width=512),
        images=50,
        epochs=16,
        probe_epochs=5.0,
        batch_size=128,
        micro_batches=8,
        rate=8.0,
    ),
    "small": dict(
        encoder=dict(width=384, depth=12, heads=6, dtype="bfloat16"),
        decoder=dict(decoder_width=256, decoder_depth=4, decoder_heads=8, projector_width=1024),
        images=200,
        epochs=100,
        probe_epochs=10.0,
        batch_size=512,
        micro_batches=1,
        rate=4.0,
    ),
}
CLASSES = 200
LONGEST_AVERAGE = 1 / 20  # of the run
EVALUATIONS = ("knn", "logistic_regression", "fewshot")  # at the start and at the end
PROBES = ("linear_probe", "attentive_probe")  # at the end
SEARCHED = ("knn", "logistic_regression")  # what searches compare


def get_config(which: str = "latent_mim,micro") -> ConfigDict:
    """The recipe of a method, with other sizes.

    Args:
      which: METHOD or METHOD,SIZE.
    """
    name, _, size = which.partition(",")
    recipe = method_recipe(name)
    config: ConfigDict = recipe.get_config()
    options = SIZES.get(size or "micro")
    if options is None:
        raise UserError(f"tiny_imagenet:{which}: {size!r} must be one of: {' | '.join(SIZES)}")
    published = config.copy_and_resolve_references()
    config.batch_size = options["batch_size"]
    if not base.method_class(config.method.name).needs_whole_batch(config.method):
        config.micro_batches = options["micro_batches"]
    config.epochs = options["epochs"]
    config.data.update(source="folder", canvas=64, train_per_class=options["images"])
    config.augment.eval_resize = 64  # the whole image
    _resize(config.method, options, getattr(recipe, "SMALL", {}))
    config.optimizer.base_lr = config.optimizer.base_lr * options["rate"]
    steps = CLASSES * options["images"] // options["batch_size"] * options["epochs"]
    _shorten(config, published, steps)
    _evaluate(config, options["probe_epochs"])
    if size == "nano":
        for title in set(config.evaluators) - {evaluators.STRICT, *SEARCHED}:
            del config.evaluators[title]
        config.evaluators.logistic_regression.update(baselines=False, l2=(1e-5, 1e-4, 1e-3, 1e-2))
        config.evaluators.knn.baselines = False
    config.update(log_every=50, checkpoint_every=500, gauge_images=256)
    return config


def method_recipe(name: str) -> types.ModuleType:
    """The module of the ViT-B recipe of a method.

    Raises:
      UserError: no such method.
    """
    if name == "latent_mim":
        return vit_b
    if name not in small.methods():
        raise UserError(f"tiny_imagenet:{name}: must be one of: {' | '.join(small.methods())}")
    return importlib.import_module(f"lmim_jax.configs.{name}_vit_b")


def _resize(method: ConfigDict, options: dict[str, Any], own: dict[str, Any]) -> None:
    """8 x 8 patches of 8 pixels, and the widths and depths of a size.

    Args:
      method: is changed.
      options: of the size, see SIZES.
      own: what the method itself needs for so few patches, see configs/small.py.
    """
    sizes = dict(grid=(8, 8), patch_size=8, **options["encoder"], **options["decoder"])
    sizes["latent_decoder_width"] = options["decoder"]["decoder_width"]
    method.update({key: value for key, value in sizes.items() if key in method})
    if "gap" in method:
        method.gap = 2  # a quarter of the patch, as published
    method.update(own)


def _shorten(config: ConfigDict, published: ConfigDict, steps: int) -> None:
    """Start EMAs at a momentum for a run of so many steps."""
    method = config.method
    least = 1 / (LONGEST_AVERAGE * steps)
    if "momentum_start" in method:
        method.momentum_start = min(published.method.momentum_start, 1 - least)
    if "momentum_epochs" in method:
        momenta = published.method.momentum
        factor = max(1.0, least / (1 - momenta[0]))
        method.momentum = tuple(1 - factor * (1 - momentum) for momentum in momenta)
        share = config.epochs / published.epochs
        method.momentum_epochs = tuple(
            max(1, round(share * epoch)) for epoch in published.method.momentum_epochs
        )
    elif "momentum" in method:  # where it is lowest
        method.momentum = min(published.method.momentum, 1 - least)


def _evaluate(config: ConfigDict, probe_epochs: float) -> None:
    """Measure at the start and at the end, on the features that the recipe names.

    Args:
      config: is changed.
      probe_epochs: how long linear and attentive probes train.
    """
    config.representation.image = _scaled(config.representation.image, config.method.depth)
    sections = evaluate.get_config()
    for title in (*EVALUATIONS, *PROBES):
        section = sections[title].to_dict()
        section.update(every=0.0, params="", batch_size=100)
        if title in EVALUATIONS:
            section["every"] = float(config.epochs)
        else:
            section["epochs"] = probe_epochs
        if "baselines" in section:
            section["baselines"] = True
        config.evaluators[title] = section
    config.evaluators.knn.k = (20,)
    config.evaluators.fewshot.update(shots=(), draws=3)


def _scaled(feature: str, depth: int) -> str:
    """A feature of a block, by the same share of the depth: block09 of 12 is block02 of 4."""
    found = re.fullmatch(r"block(\d+)/tokens", feature)
    if found is None:
        return feature
    blocks = round((int(found[1]) + 1) * depth / vit_b.get_config().method.depth)
    return f"block{blocks - 1:02d}/tokens"
