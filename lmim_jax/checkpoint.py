"""Checkpoints with Orbax, and the guard that a working directory belongs to one config."""

import json
import logging
import pathlib
import re

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict

from lmim_jax import files
from lmim_jax.errors import UserError

log = logging.getLogger(__name__)

# Keys that may differ between a run and its continuation: they change no number of the training.
HARMLESS = re.compile(
    r"log_every|gauge_images|checkpoint_every|checkpoint_keep|data\.workers|data\.threads|evaluators\..*"
)


class Checkpoints:
    """Steps of a TrainState below workdir/checkpoints, saved in the background; the newest `keep` are kept."""

    def __init__(self, workdir, keep):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(pathlib.Path(workdir).absolute() / "checkpoints", options=options)

    def latest(self):
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def save(self, state, step):
        """Save in the background (the copy off the devices is done when this returns)."""
        self._manager.save(step, args=ocp.args.StandardSave(state), force=True)

    def restore(self, abstract, shardings):
        """The newest state, placed by `shardings`; a tree of another shape is an error."""
        place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        target = jax.tree.map(place, abstract, shardings)
        return self._manager.restore(self.latest(), args=ocp.args.StandardRestore(target))

    def tell(self):
        """Half a sentence for an error: what a stopped run has left."""
        return (
            "no checkpoint had been saved"
            if self.latest() is None
            else f"the checkpoint of step {self.latest()} is good"
        )

    def close(self):
        """Wait for saves under way."""
        self._manager.wait_until_finished()
        self._manager.close()


def weights(workdir, method):
    """The newest weights of a run, without the optimiser: (params, target), numpy trees.

    Raises:
      UserError: there is no checkpoint below workdir.
    """
    folder = pathlib.Path(workdir).absolute() / "checkpoints"
    if not folder.is_dir() or not any(path.name.isdigit() for path in folder.iterdir()):
        raise UserError(f"{workdir}: no checkpoints here; give the --workdir of a run that has saved one")
    params = jax.eval_shape(method.init, jax.random.key(0))
    tree = {"params": params, "target": method.target_of(params)}
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    with ocp.CheckpointManager(folder, item_handlers=ocp.PyTreeCheckpointHandler()) as manager:
        restore = ocp.args.PyTreeRestore(tree, restore_args=as_numpy, partial_restore=True)
        found = manager.restore(manager.latest_step(), args=restore)
    return found["params"], found["target"]


def claim(workdir, config):
    """Make `workdir` the directory of a run with `config` (a plain nested dict), or check that it is.

    Raises:
      UserError: it belongs to a run with another config; the differing keys are listed.
    """
    path = pathlib.Path(workdir, "config.json")
    config = json.loads(json.dumps(config))  # as it will be read back: tuples are lists
    if path.exists():
        known, ours = (flatten_dict(x, sep=".", keep_empty_nodes=False) for x in (json.loads(path.read_text()), config))
        keys = sorted(key for key in known.keys() | ours.keys() if not HARMLESS.fullmatch(key))
        differing = [key for key in keys if known.get(key, "absent") != ours.get(key, "absent")]
        if differing:
            listed = ", ".join(f"{key} {known.get(key, 'absent')} -> {ours.get(key, 'absent')}" for key in differing)
            raise UserError(f"{workdir} is the run of another config ({listed}); choose another --workdir")
        return
    if jax.process_index() == 0:
        files.write(path, json.dumps(config, indent=2) + "\n")
        log.info("new run in %s", workdir)
