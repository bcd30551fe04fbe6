"""Every method on Tiny ImageNet: what its features are worth, and what its training costs.

    lmim study --config=benchmark --set=data.path=TINY --records=results/benchmark --out=OUT
    lmim study --config=benchmark:small --set=data.path=TINY --parallel=2 --out=OUT
    lmim study --config=benchmark:micro,rates --set=data.path=TINY --out=OUT

TINY is a folder with train/CLASS/*.JPEG and test/CLASS/*.JPEG. The recipes are those of
configs/tiny_imagenet.py: micro for two CPU cores, small for one GPU. `rates` trains one seed of
every method with a third of the learning rate, with the learning rate, and with three times as
much. --hours=2 stops in time; the command again goes on.
"""

import importlib

from ml_collections import ConfigDict

from lmim_jax.configs import compare, small, tiny_imagenet

TRAINS = False  # it is a study
SEEDS = (0, 1)
# Raw pixels and color histograms are measured by the first run, for all
NO_BASELINES = (
    "evaluators.knn.baselines=False",
    "evaluators.logistic_regression.baselines=False",
)
FACTORS = {"1/3": 1 / 3, "1": 1.0, "3": 3.0}  # of the learning rate


def get_config(which: str = "micro") -> ConfigDict:
    """What `lmim study` runs, see there.

    Args:
      which: a size of configs/tiny_imagenet.py, or SIZE,rates.
    """
    size, _, part = which.partition(",")
    config = ConfigDict()
    config.cost = not part  # measure what training costs
    config.baselines = True  # rows of raw pixels and of untrained encoders
    if part:
        config.seeds = SEEDS[:1]
        config.runs, config.groups = _rates(size)
        return config
    config.seeds = SEEDS
    config.later_seeds = NO_BASELINES
    runs = []
    changes: tuple[str, ...] = ()
    for name in small.methods():
        runs.append((name, description(name), _recipe(name, size), changes))
        changes = NO_BASELINES
    config.runs = tuple(runs)
    config.groups = (("benchmark", "none", tuple(small.methods())),)
    return config


def description(name: str) -> str:
    """What a method predicts, or else the title of its recipe."""
    if name in compare.TARGETS:
        return compare.TARGETS[name]
    recipe = importlib.import_module(f"lmim_jax.configs.{name}_vit_b")
    return (recipe.__doc__ or "").partition("\n")[0]


def _recipe(name: str, size: str) -> str:
    return f"configs/tiny_imagenet.py:{name},{size}"


def _rates(size: str) -> tuple[tuple, tuple]:
    """Runs with several learning rates, and a group for each method."""
    runs = []
    groups = []
    for name in small.methods():
        names = []
        base_lr = tiny_imagenet.get_config(f"{name},{size}").optimizer.base_lr
        for title, factor in FACTORS.items():
            run = f"{name}, lr x {title}"
            names.append(run)
            change = f"optimizer.base_lr={factor * base_lr:.3g}"
            runs.append((run, description(name), _recipe(name, size), (change, *NO_BASELINES)))
        groups.append((name, "none", tuple(names)))
    return tuple(runs), tuple(groups)
