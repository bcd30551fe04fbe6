"""Time to save and restore a checkpoint, compared with Orbax's CheckpointManager by default."""

import dataclasses
import pathlib
import statistics
import tempfile
import time
from typing import Any

import jax
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from lmim_jax.distributed import sharding
from lmim_jax.train.build import build
from lmim_jax.train.checkpoints import Checkpoints
from lmim_jax.train.state import TrainState


@dataclasses.dataclass(frozen=True)
class CheckpointTimes:
    """Seconds.

    Attributes:
      stall: for which a save blocks the training.
      safe: from the start of a save until the checkpoint is complete on disk.
      restore: to restore it; ours is verified, Orbax's is not.
    """

    stall: float
    safe: float
    restore: float


def measure(config: ConfigDict, folder: str | None, repeats: int) -> dict[str, Any]:
    """Measure checkpoints of the training state of a recipe.

    Args:
      config: the recipe; its data are not read.
      folder: where to write; None: the system's temporary folder.
      repeats: number of repetitions.

    Returns:
      {"gigabytes", "ours": {"stall", "safe", "restore"}, "orbax": {...}}, medians of the seconds;
      see `CheckpointTimes`.
    """
    state, shardings = build(config, steps_per_epoch=1).create_state(sharding.make_mesh())
    state = jax.block_until_ready(state)
    ours = []
    orbax = []
    for step in range(1, repeats + 1):
        with tempfile.TemporaryDirectory(dir=folder) as workdir:
            ours.append(_measure_ours(state, shardings, config, pathlib.Path(workdir), step))
        with tempfile.TemporaryDirectory(dir=folder) as workdir:
            orbax.append(_measure_orbax(state, shardings, pathlib.Path(workdir), step))
    arrays = state.replace(rng=jax.random.key_data(state.rng))
    total_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
    return {
        "gigabytes": total_bytes / 1e9,
        "ours": _medians(ours),
        "orbax": _medians(orbax),
    }


def _medians(times: list[CheckpointTimes]) -> dict[str, float]:
    return {
        "stall": statistics.median(one.stall for one in times),
        "safe": statistics.median(one.safe for one in times),
        "restore": statistics.median(one.restore for one in times),
    }


def _measure_ours(
    state: TrainState, shardings: Any, config: ConfigDict, workdir: pathlib.Path, step: int
) -> CheckpointTimes:
    """Save, wait until the checkpoint is committed, and restore it with verification."""
    with Checkpoints(workdir, config) as checkpoints:
        began = time.perf_counter()
        checkpoints.save(state, step)
        stall = time.perf_counter() - began
        checkpoints.wait(must_succeed=True)
        safe = time.perf_counter() - began
    with Checkpoints(workdir, config) as checkpoints:
        began = time.perf_counter()
        restored = checkpoints.restore(state, shardings)
        assert restored is not None, "the checkpoint that was just saved is missing"
        jax.block_until_ready(restored.params)
        restore = time.perf_counter() - began
    return CheckpointTimes(stall, safe, restore)


def _measure_orbax(
    state: TrainState, shardings: Any, workdir: pathlib.Path, step: int
) -> CheckpointTimes:
    """The same with Orbax's manager by itself, which verifies nothing."""
    with ocp.CheckpointManager(workdir / "orbax") as manager:
        began = time.perf_counter()
        manager.save(step, args=ocp.args.StandardSave(state))
        stall = time.perf_counter() - began
        manager.wait_until_finished()
        safe = time.perf_counter() - began
    abstract_state = jax.tree.map(_abstract_array, state, shardings)
    with ocp.CheckpointManager(workdir / "orbax") as manager:
        began = time.perf_counter()
        restored = manager.restore(step, args=ocp.args.StandardRestore(abstract_state))
        jax.block_until_ready(restored.params)
        restore = time.perf_counter() - began
    return CheckpointTimes(stall, safe, restore)


def _abstract_array(leaf: jax.Array, placement: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placement)


def table(measured: dict[str, Any]) -> str:
    """The result of `measure` as text."""
    lines = [f"{measured['gigabytes']:.2f} GB        stall    safe after    restore   (seconds)"]
    for name in ("ours", "orbax"):
        times = measured[name]
        lines.append(
            f"{name:<12}{times['stall']:>11.2f}{times['safe']:>11.2f}{times['restore']:>11.2f}"
        )
    return "\n".join(lines)
