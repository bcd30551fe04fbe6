"""Helpers for tests of evaluators on masks, clips and object counts: a method that sees classes."""

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

STEP = 45  # gray levels between classes


class Sees:
    """A method whose features are one-hot in the mean gray level of a patch, which is its class.

    With `shuffled`, they are one-hot in random numbers instead.
    """

    grid = (8, 8)
    patch_size = 4

    def __init__(self, classes=6, shuffled=False):
        self.classes = classes
        self.shuffled = shuffled

    def features(self, params, images):
        """Of patches, and the share of patches of each class as "cls"."""
        batch, height, width, _ = images.shape
        side = self.patch_size
        cells = images.mean(-1).reshape(batch, height // side, side, width // side, side)
        cells = cells.mean((2, 4)).reshape(batch, -1)
        if self.shuffled:
            positions = jnp.arange(cells.shape[1])[None]
            noise = jnp.abs(jnp.sin((cells + 1) * 1e4 + positions * 78.2))
            level = jnp.floor(noise * self.classes)
        else:
            level = jnp.round(cells * 255 / STEP)
        numbers = jnp.arange(self.classes).reshape(1, 1, -1)
        one_hot = (level[..., None] == numbers).astype(jnp.float32)
        return {"patches": one_hot, "cls": one_hot.mean(1)}


def no_mask(index):
    """The mask of every image where there are none."""
    return None


def turn(root):
    """Say in the EXIF data of all images below a folder that they are stored upside down."""
    exif = Image.Exif()
    exif[0x0112] = 3
    for path in root.rglob("*.png"):
        Image.open(path).save(path, exif=exif)


def evaluation(sources=None, grid=(8, 8), patch_size=4, **change):
    """An `EvaluationData` of images as large as the grid, whose levels are not normalized."""
    size = (grid[0] * patch_size, grid[1] * patch_size)
    config = vit_b.get_config()
    config.data.update(canvas=max(size), threads=1, **change)
    config.augment.update(
        eval_resize=min(size), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), interpolation="bilinear"
    )
    augmentation = Augment.from_config(config.augment, image_size=size, eval_size=size)
    if sources is None:
        sources = {"train": types.SimpleNamespace(mask=no_mask), "test": None}
    return EvaluationData(sources, config.data, augmentation, sharding.make_mesh())


def evaluator(kind, /, **change):
    """The evaluator of a section of configs/evaluate.py."""
    section = {**evaluate.get_config()[kind].to_dict(), "feature": "patches", **change}
    config = ConfigDict({kind: section})
    base.fill_in(config, vit_b.representation())
    (scheduled,) = base.from_config(config, steps_per_epoch=1, has_target=False)
    return scheduled.evaluator


def save(path, numbers, scale=1):
    """Write int [H, W] as a gray PNG of numbers x scale."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((numbers * scale).astype(np.uint8)).save(path)
