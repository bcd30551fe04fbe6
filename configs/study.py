"""The four challenges of latent masked image modelling, one remedy at a time; and each knob of the final recipe alone.

    lmim study --config=configs/study.py --out=runs/study                        (on `shapes`)
    lmim study --config=configs/study.py:cifar10 --set=data.path=CIFAR10 --out=runs/study_cifar10

The ladder starts from naive joint training with direct regression, which collapses, and adds one switch a rung until it
is the paper's recipe. 10 rungs x 2 seeds take about an hour on two CPU cores; `--only=ladder` leaves the ablations
out. What it came to is in RESULTS.md.
"""

from ml_collections import ConfigDict

# Where the ladder starts: one network, regression, a quarter of the patches seen, no gap, no constraint, plain decoder
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
LADDER = (  # (name, what it changes, in words)
    ("stop_gradient", "target", "stop_gradient", "no gradient through the targets"),
    ("ema", "target", "ema", "targets from a slow copy of the encoder"),
    ("infonce", "loss", "patch_infonce", "patch discrimination instead of regression"),
    ("visible", "num_visible", 10, "10 instead of 16 of 64 patches visible"),
    ("gap", "gap", None, "a gap between patches"),
    ("similarity", "similarity_weight", 0.1, "a constraint on the similarity of patches"),
    ("cross", "decoder", "cross", "a decoder with cross-attention"),
    ("cues", "visual_cues", True, "visual cues in the mask tokens"),
    ("projector", "projector_depth", 3, "a projector behind both encoders"),
)
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


def get_config(dataset="shapes"):
    """What tools/study.py runs; see there. `dataset`: shapes, or cifar10 with the four rungs that matter most."""
    recipe = f"configs/small.py:latent_mim,{dataset}"
    gap = {"shapes": 2, "cifar10": 1}[dataset]
    state = dict(NAIVE)
    listed = lambda values: tuple(f"method.{key}={value}" for key, value in values.items())
    runs = [("naive", "joint training, direct regression", recipe, listed(state))]
    for name, key, value, what in LADDER:
        state[key] = gap if key == "gap" else value
        runs.append((name, what, recipe, listed(state)))
    ladder = tuple(name for name, *_ in runs)
    final = ladder[-1]
    ablations = []
    for key, values in ABLATIONS.items():
        for value in values:
            ablations.append(
                (f"{key}={value}", f"{key} = {value}", recipe, listed({**state, key: value}))
            )
    config = ConfigDict()
    config.seeds = (0, 1)
    config.runs = (*runs, *ablations)  # (name, what it is, recipe, changes to the recipe)
    config.groups = (  # (title, compared with: previous | first | none, names of runs)
        (
            "ladder",
            "previous",
            ladder if dataset == "shapes" else ("naive", "ema", "similarity", final),
        ),
        ("ablations", "first", (final, *(name for name, *_ in ablations))),
    )
    config.cost = False  # of training: see configs/compare.py
    return config
