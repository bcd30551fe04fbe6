"""A search for a recipe of Latent MIM that beats the published one at equal compute.

    lmim study --config=recipe_search --set=data.path=TINY --out=OUT --records=results/recipe_search
    lmim study --config=recipe_search:screen,shapes --out=OUT
    lmim study --config=recipe_search:final --set=data.path=TINY --out=OUT

The argument is ROUND or ROUND,DATASET. Each run changes the published recipe, at the size `nano` of
configs/tiny_imagenet.py or at that of quickstart for `shapes`, and takes as many optimizer steps as
cost the FLOPs of the published one: a cheaper step means more of them. Warm-up and schedules follow
the length. --hours=2 stops in time, and the command again goes on. Rounds:

- `screen`: one seed of every single change;
- `combinations`: one seed of several changes at once;
- `switches`: another seed of what later papers add (docs/methods.md), whose first is in `screen`;
- `final`: the published recipe and the best one, PLUS, three seeds, at the size `micro`, with all
  evaluations; its records may be kept beside those of the benchmark. `final,cifar10` is
  configs/cifar10.py with PLUS, one seed, for which nothing was tuned.
"""

import functools
import importlib
import pathlib
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from lmim_jax.configs import benchmark
from lmim_jax.data import modalities
from lmim_jax.evaluators import base as evaluators
from lmim_jax.methods import base
from lmim_jax.perf import flops
from lmim_jax.utils.errors import UserError

TRAINS = False  # it is a study
PUBLISHED = "published"
# The best of the rounds before, by the sum of both figures; also configs/latent_mim_plus_vit_b.py
PLUS = "a quarter of the batch, 0.7 times the learning rate, first block, temperature 0.1"
NANO = "configs/tiny_imagenet.py:latent_mim,nano"
MICRO = "configs/tiny_imagenet.py:latent_mim,micro"
RECIPES = {  # the published one: in the search, and in the final comparison
    "tiny_imagenet": (NANO, MICRO),
    "shapes": ("configs/quickstart.py", "configs/quickstart.py"),
    "cifar10": ("configs/cifar10.py", "configs/cifar10.py"),
}
IMAGES = {"tiny_imagenet": 200 * 50, "shapes": 8192, "cifar10": 10 * 1000}  # of training


class Candidate(NamedTuple):
    """A change of the recipe: new values of options, and factors by which others are multiplied.

    Options are named by their paths in the config, such as method.gap.
    """

    name: str
    options: dict[str, Any]
    factors: Mapping[str, float] = types.MappingProxyType({})


JOINT = {"method.target": "joint"}
SIGREG = {"method.sigreg_weight": 0.05}
SWITCHES = (  # of later papers
    Candidate("teacher sees all patches", {"method.target_patches": "all"}),
    Candidate("2 masks an image", {"method.target_patches": "all", "method.masks_per_image": 2}),
    Candidate("4 masks an image", {"method.target_patches": "all", "method.masks_per_image": 4}),
    Candidate("duplicates are no negatives", {"method.duplicate_cosine": 0.9}),
    Candidate(
        "loss on visible patches", {"method.target_patches": "all", "method.context_weight": 0.5}
    ),
    Candidate("noise on positions", {"method.position_noise": 0.25}),
    Candidate("SIGReg", SIGREG),
    Candidate("variance hinge", {"method.variance_weight": 1.0}),
    Candidate("joint training", JOINT),
    Candidate("joint training with SIGReg", {**JOINT, **SIGREG}),
    Candidate(
        "joint training with SIGReg and hinge", {**JOINT, **SIGREG, "method.variance_weight": 1.0}
    ),
)
OTHER_IMAGES = {"method.negatives": "batch", "micro_batches": 1}
HALF_BATCH = {"batch_size": 0.5, "micro_batches": 0.5}
SMALL_BATCH = {**HALF_BATCH, "optimizer.base_lr": 2}  # half the batch, the same learning rate
QUARTER_BATCH = {"batch_size": 0.25, "micro_batches": 0.25}
NO_PROJECTOR = {"method.projector_depth": 0}
FIRST_BLOCK = {**NO_PROJECTOR, "method.target_layers": (0,)}
GOAL_0 = {"method.similarity_start": 0.0, "method.similarity_end": 0.0}
COLD = {"method.tau": 0.1}
CANDIDATES = (
    Candidate("negatives of other images", OTHER_IMAGES),
    Candidate(
        "negatives of other images, predictions not standardized",
        {**OTHER_IMAGES, "method.standardize": False},
    ),
    Candidate("predictions not standardized", {"method.standardize": False}),
    Candidate("half the batch", {}, HALF_BATCH),
    Candidate("half the batch, the same learning rate", {}, SMALL_BATCH),
    Candidate(
        "a quarter of the batch, half the learning rate",
        {},
        {**QUARTER_BATCH, "optimizer.base_lr": 2},
    ),
    Candidate("no projector", NO_PROJECTOR),
    Candidate("projector of 1 layer", {"method.projector_depth": 1}),
    Candidate("projector of 2 layers", {"method.projector_depth": 2}),
    Candidate("no similarity goal", {"method.similarity_weight": 0.0}),
    Candidate(
        "similarity goal 0.5 to 0", {"method.similarity_start": 0.5, "method.similarity_end": 0.0}
    ),
    Candidate("similarity goal 0", GOAL_0),
    Candidate("10 of 64 visible", {"method.num_visible": 10}),
    Candidate("16 of 64 visible", {"method.num_visible": 16}),
    Candidate("24 of 64 visible", {"method.num_visible": 24}),
    Candidate("no gap", {"method.gap": 0}),
    Candidate("gap 1", {"method.gap": 1}),
    Candidate("gap 4", {"method.gap": 4}),
    Candidate(
        "no projector, targets: mean of 3 blocks",
        {**NO_PROJECTOR, "method.target_layers": (1, 2, 3), "method.target_combine": "mean"},
    ),
    Candidate("targets: random projection", {"method.target": "random_projection"}),
    Candidate("no projector, targets: first block", FIRST_BLOCK),
    Candidate("temperature 0.07", {"method.tau": 0.07}),
    Candidate("temperature 0.1", COLD),
    Candidate("temperature 0.4", {"method.tau": 0.4}),
    Candidate("momentum from 0.9", {"method.momentum_start": 0.9}),
    Candidate("momentum from 0.99", {"method.momentum_start": 0.99}),
    Candidate("half the learning rate", {}, {"optimizer.base_lr": 0.5}),
    Candidate("twice the learning rate", {}, {"optimizer.base_lr": 2.0}),
    Candidate("4 times the learning rate", {}, {"optimizer.base_lr": 4.0}),
    Candidate("learning rate to 0", {"optimizer.floor": 0.0, "optimizer.warmup_start": 0.0}),
    Candidate("weight decay 0.2", {"optimizer.weight_decay": 0.2}),
    Candidate("decoder of 1 block", {"method.decoder_depth": 1}),
    Candidate("decoder of 4 blocks", {"method.decoder_depth": 4}),
    Candidate("twice the decoder's width", {}, {"method.decoder_width": 2}),
    Candidate("larger crops", {"augment.scale": (0.5, 1.0)}),
    Candidate("smaller crops", {"augment.scale": (0.08, 1.0)}),
    *SWITCHES,
)
COMBINATIONS = (  # of what the screen found
    Candidate("half the batch, temperature 0.1", COLD, SMALL_BATCH),
    Candidate("half the batch, goal 0", GOAL_0, SMALL_BATCH),
    Candidate("half the batch, no projector", NO_PROJECTOR, SMALL_BATCH),
    Candidate("half the batch, first block", FIRST_BLOCK, SMALL_BATCH),
    Candidate("half the batch, first block, temperature 0.1", {**FIRST_BLOCK, **COLD}, SMALL_BATCH),
    Candidate("half the batch, first block, goal 0", {**FIRST_BLOCK, **GOAL_0}, SMALL_BATCH),
    Candidate(
        "half the batch, no projector, goal 0, temperature 0.1",
        {**NO_PROJECTOR, **GOAL_0, **COLD},
        SMALL_BATCH,
    ),
    Candidate(
        "half the batch, first block, goal 0, temperature 0.1",
        {**FIRST_BLOCK, **GOAL_0, **COLD},
        SMALL_BATCH,
    ),
    Candidate(
        "a quarter of the batch, 0.7 times the learning rate, first block, temperature 0.1",
        {**FIRST_BLOCK, **COLD},
        {**QUARTER_BATCH, "optimizer.base_lr": 2.8},
    ),
    Candidate(
        "a quarter of the batch, 0.7 times the learning rate, no projector, temperature 0.1",
        {**NO_PROJECTOR, **COLD},
        {**QUARTER_BATCH, "optimizer.base_lr": 2.8},
    ),
)
ROUNDS = {  # candidates and seeds
    "screen": (CANDIDATES, (0,)),
    "combinations": (COMBINATIONS, (0,)),
    "switches": (SWITCHES, (0, 1)),
    "final": ((), (0, 1, 2)),
}


def get_config(which: str = "screen,tiny_imagenet") -> ConfigDict:
    """What `lmim study` runs, see there.

    Args:
      which: ROUND or ROUND,DATASET.

    Raises:
      UserError: there is no such round or dataset.
    """
    name, _, dataset = which.partition(",")
    dataset = dataset or "tiny_imagenet"
    for given, known in ((name, ROUNDS), (dataset, IMAGES)):
        if given not in known:
            raise UserError(f"recipe_search:{which}: {given!r} must be one of: {' | '.join(known)}")
    config = ConfigDict()
    candidates, config.seeds = ROUNDS[name]
    if name == "final":
        config.runs = _final(dataset)
        if dataset == "tiny_imagenet":
            config.later_seeds = benchmark.NO_BASELINES
        if dataset == "cifar10":
            config.seeds = config.seeds[:1]
    else:
        recipe, _ = RECIPES[dataset]
        steps = published_steps(recipe, dataset)
        runs = [(PUBLISHED, f"{steps} steps", recipe, (f"total_steps={steps}",))]
        runs += [_run(candidate, candidate.name, recipe, dataset) for candidate in candidates]
        config.runs = tuple(runs)
    config.groups = ((name, "first", tuple(run[0] for run in config.runs)),)
    config.cost = False
    return config


def _final(dataset: str) -> tuple[tuple, ...]:
    """The published recipe and PLUS."""
    _, recipe = RECIPES[dataset]
    published_changes: tuple[str, ...] = ()
    title, described, _, changes = _run(plus_candidate(), "latent_mim_plus", recipe, dataset)
    if dataset == "cifar10":  # parts of 32 images, as in docs/results/cifar10.md
        published_changes = (f"micro_batches={published(recipe).batch_size // 32}",)
        options = dict(change.split("=", 1) for change in changes)
        options["micro_batches"] = str(int(options["batch_size"]) // 32)
        changes = tuple("=".join(option) for option in options.items())
    if dataset == "tiny_imagenet":
        changes += benchmark.NO_BASELINES
    plus = (title, described, recipe, changes)
    steps = published_steps(recipe, dataset)
    return (("latent_mim", f"{steps} steps", recipe, published_changes), plus)


def plus_candidate() -> Candidate:
    """The candidate PLUS."""
    found = {candidate.name: candidate for candidate in (*CANDIDATES, *COMBINATIONS)}
    return found[PLUS]


def _run(
    candidate: Candidate, title: str, recipe: str, dataset: str
) -> tuple[str, str, str, tuple[str, ...]]:
    """A run of a study, as long as costs the FLOPs of the published recipe.

    Args:
      candidate: what is changed.
      title: of the run.
      recipe: the published one.
      dataset: a key of RECIPES.
    """
    config = published(recipe)
    changes = changes_of(candidate, config)
    steps = published_steps(recipe, dataset)
    if any(path.startswith(("method.", "batch_size")) for path in changes):
        steps = round(steps * step_gigaflops(config) / step_gigaflops(changed(config, changes)))
    flags = [f"{key}={value}" for key, value in changes.items()]
    flags.append(f"total_steps={steps}")
    for name, section in config.evaluators.items():
        if name != evaluators.STRICT and section.every:  # during training: at the end
            flags.append(f"evaluators.{name}.every=0.0")
    return title, f"{steps} steps", recipe, tuple(flags)


def published_steps(recipe: str, dataset: str) -> int:
    """Steps of the published recipe.

    Args:
      recipe: its name.
      dataset: a key of RECIPES.
    """
    config = published(recipe)
    return IMAGES[dataset] // config.batch_size * config.epochs


def published(recipe: str) -> ConfigDict:
    """The config of a published recipe, one of RECIPES."""
    file, _, argument = recipe.partition(":")
    module = importlib.import_module(f"lmim_jax.configs.{pathlib.Path(file).stem}")
    return module.get_config(argument) if argument else module.get_config()


def changes_of(candidate: Candidate, recipe: ConfigDict) -> dict[str, Any]:
    """The values of all options that a candidate changes, by their paths."""
    changes = dict(candidate.options)
    for path, factor in candidate.factors.items():
        value = functools.reduce(getattr, path.split("."), recipe)
        changes[path] = max(1, round(value * factor)) if isinstance(value, int) else value * factor
    return changes


def changed(recipe: ConfigDict, changes: dict[str, Any]) -> ConfigDict:
    """A copy of a recipe with other values of some options."""
    other = recipe.copy_and_resolve_references()
    other.update_from_flattened_dict(changes)
    return other


def step_gigaflops(recipe: ConfigDict) -> float:
    """FLOPs of a train step, in billions."""
    method = base.from_config(
        modalities.method_options(recipe), total_steps=1000, steps_per_epoch=100
    )
    return _step_gigaflops(method, recipe.batch_size)


@functools.cache
def _step_gigaflops(method: Any, batch_size: int) -> float:
    return flops.count_method(method, batch_size).total * batch_size / 1e9
