"""A run as others open it: its config, its method, its newest weights, and images to look at through them."""

import dataclasses
import json
import pathlib

import jax
from ml_collections import ConfigDict

from lmim_jax.data import sources
from lmim_jax.data.augment import device
from lmim_jax.data.eval.eval_data import EvaluationData
from lmim_jax.distributed import sharding
from lmim_jax.methods import base as methods
from lmim_jax.train import checkpoint_manifest, checkpoints
from lmim_jax.utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class Weights:
    """Weights to evaluate, as in a `state.TrainState`: params and target, trees; of which step, and their checksum.

    checkpoint: of a saved step, the SHA-256 of its manifest, which holds those of all its files; "" for fresh weights.
    """

    params: dict
    target: dict
    step: int
    checkpoint: str


@dataclasses.dataclass(frozen=True)
class Run:
    """A run on disk: its folder, its config (of plain values) and its method."""

    workdir: pathlib.Path
    config: dict
    method: object

    def weights(self, mesh):
        """Its newest good Weights, on all devices.

        Raises:
          UserError: nothing was saved yet, or nothing of it is good.
        """
        step = checkpoints.newest(self.workdir)
        params, target = checkpoints.weights(self.workdir, self.method, step)
        sealed = (
            checkpoint_manifest.steps(self.workdir)[step] / checkpoint_manifest.NAME
        ).read_text()
        placed = jax.device_put((params, target), sharding.replicated(mesh))
        return Weights(*placed, step, json.loads(sealed.partition("\n")[0])["sha256"])

    def untrained(self, mesh):
        """The Weights that it began with, on all devices."""

        def fresh():
            params = self.method.init(
                jax.random.split(jax.random.key(self.config["seed"]))[0]
            )  # as in state.init
            return params, self.method.target_of(params)

        return Weights(*jax.jit(fresh, out_shardings=sharding.replicated(mesh))(), 0, "")

    def images(self, knobs, mesh, **options):
        """Images to evaluate on, an `EvaluationData`: unaugmented, at the size that the encoder was trained on.

        Args:
          knobs: as `config.data`; such as that of the run itself. options: of an `EvaluationData`.

        Raises:
          UserError: they are not there.
        """
        source = {split: sources.from_config(knobs, split) for split in ("train", "test")}
        sizes = dict(image_size=self.method.image_size, eval_size=self.method.feature_size)
        fields = {
            name: tuple(x) if isinstance(x, list) else x
            for name, x in self.config["augment"].items()
        }
        return EvaluationData(source, knobs, device.from_config(fields, **sizes), mesh, **options)

    def data_config(self, defaults, changes):
        """The knobs of its images, a ConfigDict.

        Args:
          defaults: all knobs there are; for what was not a knob yet when the run was made.
          changes: {knob: value} instead of those of the run.
        """
        return ConfigDict(
            {
                **defaults,
                **{k: v for k, v in self.config["data"].items() if k in defaults},
                **changes,
            }
        )


def open_run(workdir):
    """The Run in a folder.

    Raises:
      UserError: there is none, or it cannot be read.
    """
    config = read_config(workdir)
    return Run(
        pathlib.Path(workdir),
        config,
        methods.from_config(config["method"], total_steps=1, steps_per_epoch=1),
    )


def read_config(workdir):
    """The config.json of a run, of plain values.

    Raises:
      UserError: there is none, or it is not that of a run.
    """
    path = pathlib.Path(workdir, "config.json")
    try:
        config = json.loads(path.read_text())
        if missing := {"method", "data", "augment", "seed"} - config.keys():
            raise KeyError(*sorted(missing))
    except FileNotFoundError as error:
        raise UserError(
            f"{workdir} is no run: it has no config.json; give the --workdir of one"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} cannot be read as the config of a run ({type(error).__name__}: {error})"
        ) from error
    return config


@dataclasses.dataclass(frozen=True)
class Opened:
    """A run with its newest weights and its images, on all devices: what pictures are made of.

    folder: its workdir; config: a ConfigDict; method: see methods/base.py; params, target: trees; step: optimiser steps
    that the weights have seen; data: an `EvaluationData`.
    """

    folder: pathlib.Path
    config: ConfigDict
    method: object
    params: dict
    target: dict
    step: int
    data: EvaluationData


def open_with_images(workdir, path=""):
    """Open the run in a folder.

    Args:
      path: where its images are now; "": where they were (`config.data.path`).

    Raises:
      UserError: no run, no checkpoint, or no images there.
    """
    run, mesh = open_run(workdir), sharding.make_mesh()
    config = with_tuples(run.config)
    config.data.path = str(path) or config.data.path
    weights = run.weights(mesh)
    parts = run.method, weights.params, weights.target, weights.step
    return Opened(run.workdir, config, *parts, run.images(config.data, mesh))


def with_tuples(value):
    """A ConfigDict of what JSON gave back: its lists were tuples."""
    if isinstance(value, dict):
        return ConfigDict({key: with_tuples(x) for key, x in value.items()})
    return tuple(map(with_tuples, value)) if isinstance(value, list) else value
