"""Weights of another run or of an exported model as the start of a new run: `config.init_from`.

What has the same name and shape is copied; everything else is as in a new run. Positions are not
weights: they are computed for the grid.
"""

import dataclasses
import json
from typing import Any

import jax
import numpy as np

from lmim_jax.convert import origin
from lmim_jax.methods.base import Method
from lmim_jax.train import runs
from lmim_jax.train.state import TrainState
from lmim_jax.utils import atomic_io, buckets
from lmim_jax.utils.errors import UserError

LISTED = 3  # names of fresh arrays in a line


@dataclasses.dataclass(frozen=True)
class InitialWeights:
    """What a new run takes from another one.

    Attributes:
      params: {path: float32 array} to copy.
      target: the same for the teacher, which takes that of the other run, or else `params`.
      record: for RUN/init_from.json: the source and the names of what is copied and fresh.
      lines: on what is copied and what is fresh, for people.
    """

    params: dict[str, np.ndarray]
    target: dict[str, np.ndarray]
    record: dict[str, Any]
    lines: list[str]

    def put_into(self, state: TrainState, shardings: Any) -> TrainState:
        """A fresh state with these weights, placed as it is."""
        return state.replace(
            params=_replace(state.params, shardings.params, self.params),
            target=_replace(state.target, shardings.target, self.target),
        )

    def joined(self, other: "InitialWeights") -> "InitialWeights":
        """These weights and those of another source."""
        return InitialWeights(
            self.params | other.params,
            self.target | other.target,
            self.record | other.record,
            self.lines + other.lines,
        )

    def write(self, workdir: buckets.Pathname) -> None:
        """Write the record into a run."""
        atomic_io.write(
            buckets.path(workdir, origin.INITIAL), json.dumps(self.record, indent=2) + "\n"
        )


def read(folder: str, method: Method) -> InitialWeights:
    """Read what of a run or of an exported model belongs into a new run.

    Args:
      folder: the run or the exported model.
      method: of the new run.

    Raises:
      UserError: it is neither, or nothing of its encoder fits.
    """
    try:
        source = runs.open_run(folder)
        weights = source.weights
    except UserError as error:
        raise UserError(f"config.init_from: {error}") from error
    fresh_params = jax.eval_shape(method.init, jax.random.key(0))
    wanted = _shapes(fresh_params)
    found = _arrays(weights.params)
    params = _fitting(wanted, found)
    if not any(name.startswith("encoder/") for name in params):
        raise UserError(
            f"config.init_from={folder}: no array of its encoder fits this one "
            f"(config.method.width={method.width} and its {source.method.width})"
        )
    wanted_target = _shapes(method.target_of(fresh_params))
    target = _fitting(wanted_target, params) | _fitting(wanted_target, _arrays(weights.target))
    unused = sorted(found.keys() - params.keys())
    record = {
        "folder": str(buckets.path(folder).absolute()),
        "step": weights.step,
        "origin": origin.read(source.folder),
        "checkpoint": weights.checkpoint,
        "copied": sorted(params),
        "fresh": sorted(wanted.keys() - params.keys()),
        "unused": unused,
    }
    lines = [f"weights of {folder}, step {weights.step:,}; optimizer and schedules are new:"]
    lines += _describe(wanted, found, params, "")
    lines += _describe(wanted_target, _arrays(weights.target) or params, target, "teacher's ")
    old = "x".join(map(str, source.method.grid))
    new = "x".join(map(str, method.grid))
    lines.append(f"  positions: computed, for {new} patches (there: {old})")
    if unused:
        modules = sorted({name.partition("/")[0] for name in unused})
        lines.append(f"  not used: {len(unused)} arrays of {', '.join(modules)}")
    return InitialWeights(params, target, record, lines)


def _describe(
    wanted: dict[str, tuple[int, ...]],
    found: dict[str, np.ndarray],
    copied: dict[str, np.ndarray],
    whose: str,
) -> list[str]:
    """A line for each module: how many of its arrays are copied, and which are fresh."""
    lines = []
    for module in sorted({name.partition("/")[0] for name in wanted}):
        names = [name for name in sorted(wanted) if name.partition("/")[0] == module]
        fresh = [name for name in names if name not in copied]
        line = f"  {whose}{module}: {len(names) - len(fresh)} of {len(names)} arrays copied"
        if fresh:
            listed = [_describe_fresh(name, wanted, found) for name in fresh[:LISTED]]
            if len(fresh) > LISTED:
                listed.append("...")
            line += f", {len(fresh)} fresh ({'; '.join(listed)})"
        lines.append(line)
    return lines


def _describe_fresh(
    name: str, wanted: dict[str, tuple[int, ...]], found: dict[str, np.ndarray]
) -> str:
    """Why an array is fresh: it is not there, or has another shape."""
    if name not in found:
        return f"{name}: not there"
    return f"{name}: {list(found[name].shape)} -> {list(wanted[name])}"


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {_name(path): leaf.shape for path, leaf in leaves}


def _arrays(tree: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {_name(path): np.asarray(leaf) for path, leaf in leaves}


def _fitting(
    wanted: dict[str, tuple[int, ...]], found: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The arrays that have the wanted names and shapes."""
    fitting = {}
    for name, array in found.items():
        if wanted.get(name) == array.shape:
            fitting[name] = array
    return fitting


def _replace(tree: Any, shardings: Any, arrays: dict[str, np.ndarray]) -> Any:
    """A tree with some of its leaves replaced, each placed as the one it replaces."""

    def placed(path: tuple[Any, ...], leaf: jax.Array, sharding: jax.sharding.Sharding) -> Any:
        name = _name(path)
        if name not in arrays:
            return leaf
        array = arrays[name].astype(leaf.dtype)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree_util.tree_map_with_path(placed, tree, shardings)
