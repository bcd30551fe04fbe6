"""The four challenges of latent masked image modeling, one remedy at a time, and ablations.

    lmim study --config=study --out=runs/study
    lmim study --config=study:cifar10 --set=data.path=CIFAR10 --out=runs/study_cifar10

The ladder starts from naive joint training with direct regression, which collapses, and adds one
change per rung until it is the paper's recipe; the ablations change one option of that recipe, and
the switches are what later papers add to it. Two more groups put a regularizer in place of the
teacher. The 10 rungs with 2 seeds take about an hour on two CPU cores (--only=ladder). The
results are in RESULTS.md.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

TRAINS = False  # it is a study

# Start of the ladder: one network, regression, a quarter of the patches visible, no gap, no
# constraint, plain decoder
NAIVE = {
    "target": "joint",
    "loss": "mse",
    "num_visible": 16,
    "gap": 0,
    "similarity_weight": 0.0,
    "decoder": "self",
    "visual_cues": False,
    "projector_depth": 0,
}


class Rung(NamedTuple):
    """A change of one option of the method, and its description."""

    name: str
    key: str
    value: Any
    description: str


Run = tuple[str, str, str, tuple[str, ...]]  # name, description, recipe, changes
BEST_GAP = None  # depends on the dataset, see GAPS
LADDER = (
    Rung("stop_gradient", "target", "stop_gradient", "no gradient through the targets"),
    Rung("ema", "target", "ema", "targets from a slow copy of the encoder"),
    Rung("infonce", "loss", "patch_infonce", "patch discrimination instead of regression"),
    Rung("visible", "num_visible", 10, "10 instead of 16 of 64 patches visible"),
    Rung("gap", "gap", BEST_GAP, "a gap between patches"),
    Rung("similarity", "similarity_weight", 0.1, "a constraint on the similarity of patches"),
    Rung("cross", "decoder", "cross", "a decoder with cross-attention"),
    Rung("cues", "visual_cues", True, "visual cues in the mask tokens"),
    Rung("projector", "projector_depth", 3, "a projector behind both encoders"),
)
GAPS = {"shapes": 2, "cifar10": 1}
CIFAR10_RUNGS = ("naive", "ema", "similarity", "projector")  # the most important ones
ABLATIONS = {
    "tau": (0.05, 0.1, 0.5),
    "num_visible": (5, 16, 32),
    "gap": (0, 1, 4),
    "loss": ("mse", "norm_l2", "smooth_l1"),
    "decoder_depth": (1, 4),
    "projector_depth": (0, 1, 2),
    "target_patches": ("all",),
    "similarity_weight": (0.0, 1.0),
    "target": ("stop_gradient", "random", "random_projection"),
}
# What later papers add to the recipe, see docs/methods.md
SWITCHES = {
    "position_noise": (0.25,),
    "duplicate_cosine": (0.999,),
    "sigreg_weight": (0.05,),
    "variance_weight": (1.0,),
}
# The same of switches that need targets of all patches
WHOLE = {"target_patches": "all"}
WHOLE_SWITCHES = {"masks_per_image": (4,), "context_weight": (0.5,)}
SIGREG = {"target": "joint", "sigreg_weight": 0.05}
HINGE = {**SIGREG, "variance_weight": 1.0}


def get_config(dataset: str = "shapes") -> ConfigDict:
    """What `lmim study` runs, see there.

    Args:
      dataset: shapes, or cifar10 with the four most important rungs.
    """
    recipe = f"configs/small.py:latent_mim,{dataset}"
    state = dict(NAIVE)
    runs = [("naive", "joint training, direct regression", recipe, _changes(state))]
    for rung in LADDER:
        state[rung.key] = rung.value
        if rung.value is BEST_GAP:
            state[rung.key] = GAPS[dataset]
        runs.append((rung.name, rung.description, recipe, _changes(state)))
    ladder = tuple(run[0] for run in runs)
    final = ladder[-1]
    ablations = _variants(recipe, state, ABLATIONS)
    switches = _variants(recipe, state, SWITCHES)
    whole_switches = _variants(recipe, {**state, **WHOLE}, WHOLE_SWITCHES)
    regularized = [
        ("joint=sigreg", "joint training with SIGReg", recipe, _changes({**NAIVE, **SIGREG})),
        ("joint=hinge", "the same with a variance hinge", recipe, _changes({**NAIVE, **HINGE})),
    ]
    regularized_recipe = [
        ("target=joint", "target = joint", recipe, _changes({**state, "target": "joint"})),
        ("recipe=sigreg", "target = joint, with SIGReg", recipe, _changes({**state, **SIGREG})),
        ("recipe=hinge", "the same with a variance hinge", recipe, _changes({**state, **HINGE})),
    ]
    runs += [*ablations, *switches, *whole_switches, *regularized, *regularized_recipe]
    if dataset == "cifar10":
        ladder = CIFAR10_RUNGS
    config = ConfigDict()
    config.seeds = (0, 1)
    config.runs = tuple(runs)
    config.groups = (  # (title, compared with: previous | first | none, names of runs)
        ("ladder", "previous", ladder),
        ("ablations", "first", (final, *_names(ablations))),
        ("switches", "first", (final, *_names(switches))),
        ("switches of all patches", "first", ("target_patches=all", *_names(whole_switches))),
        ("SIGReg instead of a teacher", "first", ("ema", "naive", *_names(regularized))),
        ("the same in the recipe", "first", (final, *_names(regularized_recipe))),
    )
    config.cost = False  # of training: see configs/compare.py
    return config


def _variants(recipe: str, base: Mapping[str, Any], options: Mapping[str, tuple]) -> list[Run]:
    """Runs with one other option each."""
    runs = []
    for key, values in options.items():
        for value in values:
            changes = _changes({**base, key: value})
            runs.append((f"{key}={value}", f"{key} = {value}", recipe, changes))
    return runs


def _names(runs: list[Run]) -> list[str]:
    return [run[0] for run in runs]


def _changes(options: Mapping[str, Any]) -> tuple[str, ...]:
    """Options of the method as changes to a recipe, KEY=VALUE."""
    return tuple(f"method.{key}={value}" for key, value in options.items())
