"""The encoder of an earlier run as the teacher of a new one: `config.method.target=frozen:RUN`.

The method of that run is stored in the config of the new one, and its weights in the checkpoints,
so that a run that has begun no longer needs the other one, except to be resumed by its command.
"""

from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from lmim_jax.convert import origin
from lmim_jax.methods.base import Method
from lmim_jax.train import runs
from lmim_jax.train.initialization import InitialWeights
from lmim_jax.utils.errors import UserError

PREFIX = "frozen:"


def folder(method: ConfigDict) -> str:
    """The run or exported model that `config.method` names, or "" where it names none."""
    target = method.get("target", "")
    return target.removeprefix(PREFIX) if target.startswith(PREFIX) else ""


def method_of(config: ConfigDict) -> dict[str, Any] | None:
    """The `config.method` of the run that the frozen teacher of a recipe is from, or None.

    Raises:
      UserError: its folder is no run or exported model, or its images were normalized differently.
    """
    name = folder(config.method)
    if not name:
        return None
    try:
        found = runs.read_config(name)
    except UserError as error:
        raise UserError(f"config.method.target={PREFIX}{name}: {error}") from error
    for key in ("mean", "std"):
        theirs = tuple(found["augment"][key])
        ours = tuple(config.augment[key])
        if theirs != ours:
            raise UserError(
                f"config.method.target={PREFIX}{name}: that run has augment.{key}={theirs}, this "
                f"one {ours}; give --config.augment.{key}={','.join(map(str, theirs))}"
            )
    return found["method"]


def weights(name: str, method: Method) -> InitialWeights:
    """The weights of the frozen teacher of a new run.

    Args:
      name: the run or exported model.
      method: of the new run.

    Raises:
      UserError: nothing was saved there yet.
    """
    source = runs.open_run(name)
    which = source.choose_weights(None)
    encoder = source.encoder_params(which)["encoder"]
    leaves = jax.tree_util.tree_leaves_with_path({"frozen": encoder})
    arrays = {}
    for path, leaf in leaves:
        arrays[jax.tree_util.keystr(path, simple=True, separator="/")] = np.asarray(leaf)
    wanted = jax.eval_shape(lambda: method.target_of(method.init(jax.random.key(0))))
    if len(jax.tree.leaves(wanted)) != len(arrays):
        raise UserError(f"config.method.target={PREFIX}{name}: its weights do not fit its method")
    record = {
        "frozen_teacher": str(source.folder.absolute()),
        "frozen_teacher_weights": which,
        "frozen_teacher_step": source.step,
        "frozen_teacher_checkpoint": source.weights.checkpoint,
        "frozen_teacher_origin": origin.read(source.folder),
    }
    line = f"frozen teacher: the {which} encoder of {name}, step {source.step:,}"
    return InitialWeights({}, arrays, record, [line])
