"""Checkpoints: written by Orbax, committed by a manifest, and verified before they are used.

workdir/checkpoints/512/state/...        written by Orbax, a folder per tensor
workdir/checkpoints/512/manifest.json    written last: sizes, checksums, shapes
workdir/checkpoints/aside/512-damaged    a step that did not verify

In a bucket the same holds: the manifest alone says that a step is complete.
"""

import contextlib
import logging
import math
import threading
import time
import types
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from lmim_jax.distributed import multihost
from lmim_jax.distributed.preemption import Preempted
from lmim_jax.train import checkpoint_manifest
from lmim_jax.train.checkpoint_manifest import COMMITTED, FOLDER, newest_good_step, steps
from lmim_jax.train.lock import Lock, LockLost
from lmim_jax.train.metric_writer import read_metrics
from lmim_jax.train.state import TrainState
from lmim_jax.utils import atomic_io, buckets, faults
from lmim_jax.utils.errors import UserError

log = logging.getLogger(__name__)

SAVE_TIMEOUT = 1200  # seconds


class SaveFailed(RuntimeError):
    """Several saves in a row failed; the message says why."""


class Checkpoints:
    """Saves in the background, one at a time; restores verified steps; deletes old ones.

    A failed save is logged immediately, its files are removed, and the good steps are kept. Use it
    in a `with` block, which waits for the save in progress when it ends.
    """

    def __init__(
        self, workdir: buckets.Pathname, config: ConfigDict, lock: Lock | None = None
    ) -> None:
        """Open the checkpoints of a run.

        Args:
          workdir: of the run.
          config: `checkpoint_keep`, `checkpoint_keep_every`, `checkpoint_best` and
            `checkpoint_max_failures` are read.
          lock: of the run; nothing is written once it is lost. None: the caller knows that there
            is no other writer.
        """
        self._workdir = buckets.path(workdir)
        self._config = config
        self._lock = lock
        self._root = self._workdir.absolute() / FOLDER
        self._thread: threading.Thread | None = None
        self._error: str | None = None  # of the last save, if it failed
        self._failures = 0  # in a row
        self._saved_step: int | None = None  # the last step that was saved or restored
        self._attempt = 0
        self._orbax = _checkpointer(self._barrier)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        if kind is KeyboardInterrupt:  # abort at once
            return
        # A preempted run exits as saved, so an unsaved one must raise
        self.wait(must_succeed=kind in (None, Preempted))
        self._orbax.close()

    @property
    def failing(self) -> bool:
        """Whether the last save failed and can be retried immediately.

        Several processes learn about a failure at different times, so they wait for the next
        scheduled save instead.
        """
        return self._failures > 0 and jax.process_count() == 1

    def latest(self) -> int | None:
        """The newest committed step, or None; its contents are not verified."""
        return max(self._committed(), default=None)

    def describe(self) -> str:
        """A clause for error messages: which checkpoint a stopped run has left."""
        try:
            latest = self.latest()
        except OSError as error:  # it must not hide the error that it is to explain
            return f"its checkpoints cannot be listed at the moment ({error.strerror})"
        if latest is None:
            return "no checkpoint had been saved"
        return f"the checkpoint of step {latest} is good"

    def restore(self, abstract: TrainState, shardings: Any) -> TrainState | None:
        """Restore the newest good state.

        Args:
          abstract: the expected state, as arrays or shapes.
          shardings: a tree of shardings like it.

        Returns:
          The state, or None where nothing was saved yet.

        Raises:
          UserError: no step is good, or its tensors have other names, shapes or dtypes.
        """
        step = self._step_to_restore()
        if step is None:
            return None
        folder = self._root / str(step)
        saved = checkpoint_manifest.read(folder)["tensors"]
        differences = _tensor_differences(saved, _tensor_table(abstract))
        if differences:
            listed = "; ".join(differences[:3])
            if len(differences) > 3:
                listed += f" and {len(differences) - 3} more"
            raise UserError(
                f"the checkpoint of step {step} in {self._workdir} holds another model: {listed}"
            )

        def placed(leaf: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        target = jax.tree.map(placed, _without_key(abstract), shardings)
        restore_args = ocp.checkpoint_utils.construct_restore_args(target)
        args = ocp.args.PyTreeRestore(target, restore_args=restore_args)
        restored = _reader().restore(str(folder / "state"), args=args)
        self._saved_step = step
        return restored.replace(rng=jax.random.wrap_key_data(restored.rng))

    def _step_to_restore(self) -> int | None:
        """The newest good step, verified by process 0; None where nothing was saved yet."""
        return multihost.decide(lambda: newest_good_step(self._workdir, quarantine=True))

    def save(self, state: TrainState, step: int) -> None:
        """Start saving a state; it may be donated once this returns.

        Raises:
          SaveFailed: `checkpoint_max_failures` saves in a row have failed.
        """
        start = time.perf_counter()
        self.wait()
        folder = self._root / str(step)
        self._attempt += 1  # equal on all processes, as all of them save
        try:
            self._confirm_lock()
            if self._failures:  # the old one would raise its error again
                self._orbax = _checkpointer(self._barrier)
            if jax.process_index() == 0:
                checkpoint_manifest.delete(folder)
            folder.mkdir(parents=True, exist_ok=True)
            self._barrier("folder")
            args = ocp.args.PyTreeSave(_without_key(state))
            self._orbax.save(str(folder / "state"), args=args, force=True)
        except Exception as error:
            self._handle_failure(step, error)
        else:
            self._thread = threading.Thread(
                target=self._commit, args=(step, _tensor_table(state)), name=f"commit step {step}"
            )
            self._thread.start()
        if self._failures and self._failures >= self._config.checkpoint_max_failures:
            raise SaveFailed(
                f"{self._failures} saves in a row failed: {self._error}; {self.describe()}"
            )
        blocked = time.perf_counter() - start
        log.info("saving step %d (training was blocked for %.2f s)", step, blocked)

    def is_saved(self, step: int) -> bool:
        """Whether a step was saved or restored by this process; waits for the save in progress."""
        self.wait()
        return self._saved_step == step

    def wait(self, must_succeed: bool = False) -> None:
        """Wait for the save in progress.

        Raises:
          SaveFailed: `must_succeed` is set, and the save failed.
        """
        if self._thread:
            self._thread.join()
            self._thread = None
        if must_succeed and self._failures:
            raise SaveFailed(f"the state is not saved: {self._error}; {self.describe()}")

    def _commit(self, step: int, tensors: dict[str, dict[str, Any]]) -> None:
        """In the background: wait for Orbax, write the manifest, and only then delete old steps."""
        try:
            self._orbax.wait_until_finished()
            if jax.process_index() == 0:
                checkpoint_manifest.write(
                    self._root / str(step), tensors, self._confirm_lock, step=step
                )
                atomic_io.write(self._root / COMMITTED, "")
            self._barrier("committed")
        except Exception as error:  # disk full, folder deleted, ...: training continues
            self._handle_failure(step, error)
            return
        self._failures = 0
        self._error = None
        self._saved_step = step
        if jax.process_index() == 0:
            try:
                self._delete_old_steps()
            except (OSError, ValueError) as error:  # the step just committed is good in any case
                log.error("old checkpoints could not be deleted: %s", error)

    def _confirm_lock(self) -> None:
        """Raise an error unless this run is still the one that writes here."""
        if self._lock:
            self._lock.confirm()

    def _barrier(self, key: str, timeout_ms: int = SAVE_TIMEOUT * 1000) -> None:
        """Wait for the other processes of a save; raise an error if one of them has failed.

        Orbax's own barrier would wait until it times out.
        """
        place = f"save/{self._attempt}/{key}"
        multihost.barrier(place, f"failed/{self._attempt}", timeout_ms / 1000)

    def _handle_failure(self, step: int, error: Exception) -> None:
        """Report a failed save, here and to the other processes, and remove its files."""
        self._failures += 1
        self._error = faults.first_line(error)
        with contextlib.suppress(Exception):  # the coordinator may be gone
            multihost.abort(f"failed/{self._attempt}", self._error)
        if not isinstance(error, LockLost):  # else the files may be those of the other run
            with contextlib.suppress(OSError):
                checkpoint_manifest.delete(self._root / str(step))
        log.error(
            "SAVING STEP %d FAILED (%d of %d in a row before the run stops): %s; %s. Retrying soon",
            step,
            self._failures,
            self._config.checkpoint_max_failures,
            self._error,
            self.describe(),
        )

    def _committed(self) -> list[int]:
        """Committed steps, oldest first."""
        found = steps(self._workdir).items()
        return [step for step, path in found if checkpoint_manifest.is_committed(path)]

    def _delete_old_steps(self) -> None:
        """Delete steps that the retention policy does not keep, and older ones that are partial."""
        committed = self._committed()
        keep = self._steps_to_keep(committed)
        for step, path in steps(self._workdir).items():
            if step < committed[-1] and step not in keep:
                checkpoint_manifest.delete(path)

    def _steps_to_keep(self, committed: list[int]) -> set[int]:
        """The newest steps, every multiple of an interval, and the best by a metric."""
        keep = set(committed[-self._config.checkpoint_keep :])
        interval = self._config.checkpoint_keep_every
        if interval:
            keep |= {step for step in committed if step % interval == 0}
        metric = self._config.checkpoint_best
        if metric:
            values = {}
            for line in read_metrics(self._workdir):
                value = line.get(metric)
                if value is not None and math.isfinite(value) and line["step"] in committed:
                    values[line["step"]] = value
            if values:
                keep.add(max(values, key=values.__getitem__))
        return keep


def newest_step(workdir: buckets.Pathname) -> int:
    """The newest good step of a run.

    Raises:
      UserError: there is none.
    """
    step = newest_good_step(workdir)
    if step is None:
        raise UserError(
            f"{workdir}: no checkpoints here; give the --workdir of a run that has saved one"
        )
    return step


def read_weights(workdir: buckets.Pathname, method: Any, step: int) -> tuple[Any, Any]:
    """Read the weights of a good step, without the optimizer's state.

    Args:
      workdir: of the run.
      method: of the run; see methods/base.py.
      step: of a good checkpoint; see `newest_step`.

    Returns:
      (params, target), trees of numpy arrays.
    """
    params = jax.eval_shape(method.init, jax.random.key(0))
    tree = {"params": params, "target": method.target_of(params)}
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    args = ocp.args.PyTreeRestore(tree, restore_args=as_numpy, partial_restore=True)
    folder = buckets.path(workdir).absolute() / FOLDER / str(step)
    restored = _reader().restore(str(folder / "state"), args=args)
    return restored["params"], restored["target"]


def _checkpointer(barrier: Callable[..., None]) -> ocp.AsyncCheckpointer:
    """Orbax's checkpointer, with a folder per tensor, so that a damaged tensor can be named.

    Files are not compressed: float32 weights do not shrink.

    Args:
      barrier: how processes wait for each other, a function of (key, timeout_ms).
    """
    options = ocp.options.AsyncOptions(timeout_secs=SAVE_TIMEOUT, barrier_sync_fn=barrier)
    return ocp.AsyncCheckpointer(_handler(), async_options=options)


def _reader() -> ocp.Checkpointer:
    """Orbax's checkpointer for reading.

    In a bucket it would look for a file of its own that says that the state is complete, which
    states that were saved elsewhere and copied there lack: our manifest says it.
    """
    by_name = ocp.path.atomicity.AtomicRenameTemporaryPath
    return ocp.Checkpointer(_handler(), temporary_path_class=by_name)


def _handler() -> ocp.PyTreeCheckpointHandler:
    return ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=True, use_compression=False)


def _without_key(state: TrainState) -> TrainState:
    """A state (of arrays or of shapes) with its random key as plain numbers."""
    if isinstance(state.rng, jax.ShapeDtypeStruct):
        return state.replace(rng=jax.eval_shape(jax.random.key_data, state.rng))
    return state.replace(rng=jax.random.key_data(state.rng))


def _tensor_table(state: TrainState) -> dict[str, dict[str, Any]]:
    """{path: {"shape", "dtype"}} of a state."""
    table = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(_without_key(state)):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        table[name] = {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
    return table


def _tensor_differences(saved: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """The tensors that differ, such as "params/bias: float32[40] -> float32[41]"."""
    differences = []
    for name in sorted(saved.keys() | expected.keys()):
        old = saved.get(name)
        new = expected.get(name)
        if old != new:
            differences.append(f"{name}: {_tensor_type(old)} -> {_tensor_type(new)}")
    return differences


def _tensor_type(tensor: dict[str, Any] | None) -> str:
    return f"{tensor['dtype']}{tensor['shape']}" if tensor else "absent"
