"""A saved model, opened to be used: the newest checkpoint of a run, or what `lmim export --format=flax` wrote."""

import dataclasses
import pathlib

from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from lmim_jax.methods import base
from lmim_jax.train import checkpoints, runs
from lmim_jax.utils import array_io
from lmim_jax.utils.errors import UserError

WEIGHTS = "model.safetensors"  # of an exported folder, instead of checkpoints


@dataclasses.dataclass(frozen=True)
class Model:
    """What a folder holds.

    path: the folder. config: as it was trained with. method: without a schedule. params, target: numpy trees; the
    second is {} where there is no teacher. step: optimiser steps that the weights have seen. exported: of a folder that
    was exported, "online" or "target", which its params are; None for a run.
    """

    path: pathlib.Path
    config: ConfigDict
    method: object
    params: dict
    target: dict
    step: int
    exported: str | None = None

    def choose(self, wanted):
        """`wanted`, or where it is None: the weights that the run's own evaluators look at, "online" or "target".

        Raises:
          UserError: they look at both, or there are none; or the weights were chosen when this folder was made.
        """
        if self.exported:
            if wanted not in (None, self.exported):
                raise UserError(
                    f"{self.path} holds the {self.exported} weights; for others, export the run again"
                )
            return self.exported
        measured = {section.params for section in self.config.evaluators.values()}
        if not wanted and len(measured) != 1:
            raise UserError(
                "this run's evaluators do not say which weights are the ones to take; give --weights"
            )
        return wanted or measured.pop()

    def weights(self, which):
        """Parameters for `method.features`: "online", or "target", which has the teacher's in place of the online ones.

        Raises:
          UserError: neither, or there is no teacher's encoder.
        """
        if which not in ("online", "target"):
            raise UserError(f"weights {which!r} are none of: online | target")
        if self.exported:  # the chosen ones are in place of the online ones
            return self.params
        if which == "target" and "encoder" not in self.target:
            raise UserError(
                f"{self.path}: there is no target encoder here; take the online weights"
            )
        return {**self.params, **self.target} if which == "target" else self.params


def open_model(path):
    """Open a run with its newest good checkpoint, or a folder made by `lmim export --format=flax`.

    Raises:
      UserError: neither is there, or no checkpoint is good.
    """
    path = pathlib.Path(path).expanduser()
    config = runs.read_config(path)
    method = base.from_config(config["method"], total_steps=1, steps_per_epoch=1)
    if (path / WEIGHTS).is_file():
        tree = unflatten_dict(array_io.read(path / WEIGHTS)[0], sep="/")
        made = config.pop("exported")
        return Model(
            path, runs.with_tuples(config), method, tree, {}, made["step"], made["weights"]
        )
    step = checkpoints.newest(path)
    return Model(
        path, runs.with_tuples(config), method, *checkpoints.weights(path, method, step), step
    )


def flat(tree):
    """{path with slashes: array}."""
    return flatten_dict(tree, sep="/")
