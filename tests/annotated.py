"""For tests of evaluators on masks, clips and attributes: a method that sees classes, and images that show them."""

import types

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from lmim_jax.configs import evaluate, vit_b
from lmim_jax.data.augment.device import Augment
from lmim_jax.data.eval.eval_data import EvaluationData
from lmim_jax.distributed import sharding
from lmim_jax.evaluators import base

STEP = 45  # grey levels between classes


class Sees:
    """Features are one-hot in the mean grey level of a patch, which tells its class; shuffled, in random numbers."""

    grid, patch_size = (8, 8), 4

    def __init__(self, classes=6, shuffled=False):
        self.classes, self.shuffled = classes, shuffled

    def features(self, params, images):
        """Of patches, and the share of patches of each class as "cls"."""
        batch, height, width, _ = images.shape
        p = self.patch_size
        cells = (
            images.mean(-1)
            .reshape(batch, height // p, p, width // p, p)
            .mean((2, 4))
            .reshape(batch, -1)
        )
        level = jnp.round(cells * 255 / STEP)
        if self.shuffled:
            level = jnp.floor(
                jnp.abs(jnp.sin((cells + 1) * 1e4 + jnp.arange(cells.shape[1])[None] * 78.2))
                * self.classes
            )
        one_hot = (level[..., None] == jnp.arange(self.classes).reshape(1, 1, -1)).astype(
            jnp.float32
        )
        return {"patches": one_hot, "cls": one_hot.mean(1)}


def evaluation(sources=None, grid=(8, 8), patch_size=4):
    """An `EvaluationData` of images as large as the grid, levels as they are, on one device's worth of settings."""
    size = grid[0] * patch_size, grid[1] * patch_size
    config = vit_b.get_config()
    config.data.update(canvas=max(size), threads=1)
    config.augment.update(
        eval_resize=min(size), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), interpolation="bilinear"
    )
    augmentation = Augment.from_config(config.augment, image_size=size, eval_size=size)
    sources = sources or {"train": types.SimpleNamespace(mask=lambda index: None), "test": None}
    return EvaluationData(sources, config.data, augmentation, sharding.make_mesh())


def evaluator(kind, /, **change):
    """The evaluator of a section of configs/evaluate.py."""
    section = {**evaluate.get_config()[kind].to_dict(), "feature": "patches", **change}
    return base.from_config(ConfigDict({kind: section}), steps_per_epoch=1, has_target=False)[
        0
    ].evaluator


def save(path, numbers, scale=1):
    """Write int [H, W] as a grey PNG of numbers x scale."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((numbers * scale).astype(np.uint8)).save(path)
