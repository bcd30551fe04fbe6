"""A run that is there: its config, method, newest weights and images, for tools that look at it."""

import dataclasses
import json
import pathlib

from ml_collections import ConfigDict

from lmim_jax import checkpoint, manifest, sharding
from lmim_jax.data import augment, sources
from lmim_jax.data.evaluation import Evaluation
from lmim_jax.errors import UserError
from lmim_jax.methods import base as methods


@dataclasses.dataclass(frozen=True)
class Run:
    """folder: the --workdir; config: a ConfigDict; method: see methods/base.py; params, target: numpy trees;
    step: optimiser steps that the weights have seen; data: an `evaluation.Evaluation`."""

    folder: pathlib.Path
    config: ConfigDict
    method: object
    params: dict
    target: dict
    step: int
    data: Evaluation


def open_run(folder, path=""):
    """Open the --workdir of a run.

    Args:
      path: where its images are now; "": where they were (`config.data.path`).

    Raises:
      UserError: no run, no checkpoint, or no images there.
    """
    file = pathlib.Path(folder, "config.json")
    if not file.is_file():
        raise UserError(f"{folder} is no run: it has no config.json; give the --workdir of one")
    try:
        config = ConfigDict(_tuples(json.loads(file.read_text())))
    except ValueError as error:
        raise UserError(f"{file} is damaged: {error}") from error
    config.data.path = path or config.data.path
    method = methods.from_config(config.method, total_steps=1, steps_per_epoch=1)
    params, target = checkpoint.weights(folder, method)
    step = manifest.good_step(folder)
    augmentation = augment.from_config(config.augment, image_size=method.image_size, eval_size=method.feature_size)
    source = {split: sources.from_config(config.data, split) for split in ("train", "test")}
    data = Evaluation(source, config.data, augmentation, sharding.make_mesh())
    return Run(pathlib.Path(folder), config, method, params, target, step, data)


def _tuples(value):
    """JSON has no tuples, and fields must be hashable."""
    if isinstance(value, dict):
        return {key: _tuples(inner) for key, inner in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
