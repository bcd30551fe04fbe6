"""All methods side by side: equal encoder, data, epochs, optimiser and evaluation; only the method differs.

    lmim study --config=configs/compare.py --out=runs/compare                   (on `shapes`)
    lmim study --config=configs/compare.py:cifar10 --set=data.path=CIFAR10 --out=runs/compare_c10

Beside quality stands what training costs: FLOPs and images per second, measured when all runs are done. About half an
hour on two CPU cores. What it came to is in RESULTS.md; at this size and length it says little of ImageNet.
"""

from ml_collections import ConfigDict

from lmim_jax.configs import small

WORDS = {
    "latent_mim": "latents, patch discrimination",
    "latent_mim_lite": "a random projection of patches, patch discrimination",
    "pilamim": "pixels, latents and CLS, regression",
    "mae": "normalised pixels, regression",
    "ijepa": "latents of blocks, regression",
    "bootmae": "normalised pixels and latents, regression",
}


def get_config(dataset="shapes"):
    """What tools/study.py runs; see there. `dataset`: shapes | cifar10."""
    config = ConfigDict()
    config.seeds = (0, 1)
    recipe = lambda name: f"configs/small.py:{name},{dataset}"
    shuffled = (
        "pilamim_shuffled",
        "the same, targets shuffled",
        recipe("pilamim"),
        ("method.align_targets=False",),
    )
    config.runs = (*((name, WORDS[name], recipe(name), ()) for name in small.METHODS), shuffled)
    config.groups = (
        ("comparison", "none", tuple(small.METHODS)),
        ("what the released code of PiLaMIM does", "first", ("pilamim", "pilamim_shuffled")),
    )
    config.cost = True  # measure what training costs
    return config
