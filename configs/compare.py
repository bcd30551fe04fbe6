"""All methods with equal encoder, data, epochs, optimizer and evaluation.

    lmim study --config=compare --out=runs/compare
    lmim study --config=compare:cifar10 --set=data.path=CIFAR10 --out=runs/compare_c10
    lmim study --config=compare:hit_uav --only=detection --set=data.path=HIT_UAV --out=runs/hit_uav

The first command trains on `shapes` and takes about half an hour on two CPU cores. Besides quality,
the cost of training is reported: FLOPs and images per second, measured after all runs. The results
are in RESULTS.md; at this size and length they say little about ImageNet.
"""

import importlib

from ml_collections import ConfigDict

from lmim_jax.configs import small

TRAINS = False  # it is a study
TARGETS = {  # what a method predicts; of other methods, their recipe's title
    "latent_mim": "latents, patch discrimination",
    "latent_mim_lite": "a random projection of patches, patch discrimination",
    "pilamim": "pixels, latents and CLS, regression",
    "mae": "normalized pixels, regression",
    "ijepa": "latents of blocks, regression",
    "bootmae": "normalized pixels and latents, regression",
    "capi": "clusters of latents, classification",
    "data2vec2": "mean of latents of several blocks, regression",
    "symmim": "pixels, regression, and images of the batch, discrimination",
}


def get_config(dataset: str = "shapes") -> ConfigDict:
    """What `lmim study` runs, see there.

    Args:
      dataset: shapes | cifar10 | hit_uav, whose images have boxes instead of classes.
    """
    runs = []
    targets = dict(TARGETS)
    for name in small.methods():
        if name not in targets:
            recipe = importlib.import_module(f"lmim_jax.configs.{name}_vit_b")
            targets[name] = (recipe.__doc__ or "").partition("\n")[0]
    for name, target in targets.items():
        flags: tuple[str, ...] = ()
        if dataset == "hit_uav" and name != "latent_mim":  # untrained encoders are equal
            flags = ("evaluators.detection.every=0.0",)
        runs.append((name, target, f"configs/small.py:{name},{dataset}", flags))
    shuffled = (
        "pilamim_shuffled",
        "the same, targets shuffled",
        f"configs/small.py:pilamim,{dataset}",
        ("method.align_targets=False",),
    )
    config = ConfigDict()
    config.seeds = (0, 1)
    config.runs = (*runs, shuffled)
    config.groups = (
        ("comparison", "none", tuple(targets)),
        ("what the released code of PiLaMIM does", "first", ("pilamim", "pilamim_shuffled")),
    )
    if dataset == "hit_uav":
        config.groups += (("detection", "none", ("latent_mim", "mae")),)
        config.baselines = True  # rows of untrained encoders
    config.cost = True  # measure what training costs
    return config
