"""Checkpoints: written by Orbax, sealed by a manifest, verified before use, and never trusted without one.

workdir/checkpoints/512/state/...        what Orbax wrote, a folder per tensor
workdir/checkpoints/512/manifest.json    written last: sizes, checksums, shapes
workdir/checkpoints/aside/512-damaged    a step that did not verify
"""

import logging
import pathlib
import shutil
import threading
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from lmim_jax.distributed import multihost
from lmim_jax.distributed.preemption import Preempted
from lmim_jax.train import checkpoint_manifest
from lmim_jax.train.checkpoint_manifest import FOLDER, SEALED, good_step, steps
from lmim_jax.train.metric_writer import history
from lmim_jax.utils.errors import UserError

log = logging.getLogger(__name__)

DELETED = "deleted-"  # prefix of a step on its way out
SLOWEST = 1200  # seconds that a save may take


class SaveFailed(RuntimeError):
    """Checkpoints could not be written, several times in a row; the message says why."""


class Checkpoints:
    """Saves in the background, one at a time; restores what verifies; deletes what is no longer to be kept.

    A failed save is told at once, its leftovers are removed, and the good steps stay. To be used in a `with` block, at
    whose end saves under way are waited for.
    """

    def __init__(self, workdir, config):
        """`config`: checkpoint_keep, checkpoint_keep_every, checkpoint_best, checkpoint_max_failures are read."""
        self._workdir, self._config = pathlib.Path(workdir), config
        self._root = self._workdir.absolute() / FOLDER
        self._thread, self._error, self._failures, self._attempt = None, None, 0, 0
        self._orbax = _orbax(self._meet)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self.wait(
            must_succeed=kind in (None, Preempted)
        )  # a preempted run that is not saved must not look like one
        self._orbax.close()

    @property
    def failing(self):
        """Whether the last save failed and can be tried again at once.

        Several processes hear of it at different moments, so they wait for the next save that is due.
        """
        return self._failures > 0 and jax.process_count() == 1

    def latest(self):
        """The newest sealed step, or None; its contents are not verified."""
        sealed = [
            step
            for step, path in steps(self._workdir).items()
            if (path / checkpoint_manifest.NAME).exists()
        ]
        return sealed[-1] if sealed else None

    def restore(self, abstract, shardings):
        """The newest good state, placed by `shardings`, or None where nothing was saved yet.

        Raises:
          UserError: no step is good, or its tensors have other names, shapes or dtypes.
        """
        step, problem = None, None
        if jax.process_index() == 0:
            try:
                step = good_step(self._workdir, set_aside=True)
            except UserError as error:
                problem = error
        found = (-1 if step is None else step, problem is not None)
        step, failed = (int(x) for x in multihost_utils.broadcast_one_to_all(np.int32(found)))
        if failed:
            raise problem or UserError("process 0 finds no good checkpoint; see its message")
        if step < 0:
            return None
        folder = self._root / str(step)
        known, wanted = checkpoint_manifest.read(folder)["tensors"], _tensors(abstract)
        if differing := sorted(
            name for name in known.keys() | wanted.keys() if known.get(name) != wanted.get(name)
        ):
            form = lambda tensor: f"{tensor['dtype']}{tensor['shape']}" if tensor else "absent"
            listed = "; ".join(
                f"{n}: {form(known.get(n))} -> {form(wanted.get(n))}" for n in differing[:3]
            )
            more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise UserError(
                f"the checkpoint of step {step} in {self._workdir} holds another model: {listed}{more}"
            )
        place = lambda leaf, sharding: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding
        )
        target = jax.tree.map(place, _plain(abstract), shardings)
        restore_args = ocp.checkpoint_utils.construct_restore_args(target)
        found = self._orbax.restore(
            folder / "state", args=ocp.args.PyTreeRestore(target, restore_args=restore_args)
        )
        return found.replace(rng=jax.random.wrap_key_data(found.rng))

    def save(self, state, step):
        """Start saving a state; it may be donated once this returns.

        Raises:
          SaveFailed: `checkpoint_max_failures` saves in a row have failed.
        """
        began = time.perf_counter()
        self.wait()
        folder = self._root / str(step)
        self._attempt += 1  # equal on all processes, as all of them save
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._meet("folder")
            self._orbax.save(folder / "state", args=ocp.args.PyTreeSave(_plain(state)), force=True)
        except Exception as error:
            self._failed(step, error)
        else:
            self._thread = threading.Thread(
                target=self._seal, args=(step, _tensors(state)), name=f"seal step {step}"
            )
            self._thread.start()
        if self._failures >= self._config.checkpoint_max_failures:
            raise SaveFailed(
                f"{self._failures} saves in a row failed: {self._error}; {self.tell()}"
            )
        log.info(
            "saving step %d (training was held up for %.2f s)", step, time.perf_counter() - began
        )

    def wait(self, must_succeed=False):
        """Wait for the save under way.

        Raises:
          SaveFailed: it must succeed, and did not.
        """
        if self._thread:
            self._thread.join()
            self._thread = None
        if must_succeed and self._failures:
            raise SaveFailed(f"the state is not saved: {self._error}; {self.tell()}")

    def tell(self):
        """Half a sentence for an error: what a stopped run has left."""
        latest = self.latest()
        return (
            "no checkpoint had been saved"
            if latest is None
            else f"the checkpoint of step {latest} is good"
        )

    def _seal(self, step, tensors):
        """In the background: once Orbax is done, write the manifest; then, and only then, delete old steps."""
        try:
            self._orbax.wait_until_finished()
            if jax.process_index() == 0:
                checkpoint_manifest.write(self._root / str(step), tensors, step=step)
                (self._root / SEALED).touch()
            self._meet("sealed")
        except (
            Exception
        ) as error:  # disk full, folder gone, ...: training goes on, and the save is tried again
            self._failed(step, error)
            return
        self._failures, self._error = 0, None
        if jax.process_index() == 0:
            try:
                self._delete_old()
            except OSError as error:  # what has just been sealed is good all the same
                log.error("old checkpoints could not be deleted: %s", error)

    def _meet(self, key, timeout_ms=SLOWEST * 1000):
        """Wait for the other processes in a save; raise what made one of them fail. Orbax itself would wait on."""
        multihost.barrier(f"save/{self._attempt}/{key}", f"failed/{self._attempt}", timeout_ms / 1000)

    def _failed(self, step, error):
        """Report a failed save, here and to the other processes, and remove what it has left."""
        self._failures, self._error = self._failures + 1, _first_line(error)
        multihost.abort(f"failed/{self._attempt}", self._error)
        shutil.rmtree(self._root / str(step), ignore_errors=True)
        self._orbax = _orbax(self._meet)  # the old one would raise the error again
        log.error(
            "SAVING STEP %d FAILED (%d of %d in a row before the run stops): %s; %s. Trying again soon",
            *(step, self._failures, self._config.checkpoint_max_failures, self._error, self.tell()),
        )

    def _delete_old(self):
        """Delete sealed steps that nothing asks to keep; renamed first, so that none is ever half a step."""
        sealed = [
            step
            for step, path in steps(self._workdir).items()
            if (path / checkpoint_manifest.NAME).exists()
        ]
        newest, every, best = (
            self._config[f"checkpoint_{name}"] for name in ("keep", "keep_every", "best")
        )
        keep = set(sealed[-newest:]) | {step for step in sealed if every and step % every == 0}
        lines = history(self._workdir) if best else []
        values = {
            line["step"]: line[best] for line in lines if best in line and line["step"] in sealed
        }
        keep |= {max(values, key=values.get)} if values else set()
        for step in set(sealed) - keep:
            (self._root / str(step)).rename(self._root / f"{DELETED}{step}")
        for path in self._root.glob(f"{DELETED}*"):
            shutil.rmtree(path, ignore_errors=True)


def newest(workdir):
    """The newest good step of a run; UserError where there is none."""
    step = good_step(workdir)
    if step is None:
        raise UserError(
            f"{workdir}: no checkpoints here; give the --workdir of a run that has saved one"
        )
    return step


def weights(workdir, method, step=None):
    """Weights of a run, without the optimiser: (params, target), numpy trees.

    Args:
      step: of a good checkpoint; None: the newest.

    Raises:
      UserError: there is no checkpoint below workdir, or none is good.
    """
    step = newest(workdir) if step is None else step
    params = jax.eval_shape(method.init, jax.random.key(0))
    tree = {"params": params, "target": method.target_of(params)}
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    restore = ocp.args.PyTreeRestore(tree, restore_args=as_numpy, partial_restore=True)
    found = _orbax().restore(
        pathlib.Path(workdir).absolute() / FOLDER / str(step) / "state", args=restore
    )
    return found["params"], found["target"]


def _orbax(meet=None):
    """A folder per tensor, so that damage can be named; not compressed: float32 weights do not shrink.

    meet: how the processes wait for each other, (key, timeout_ms).
    """
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=True, use_compression=False)
    options = ocp.options.AsyncOptions(timeout_secs=SLOWEST, barrier_sync_fn=meet)
    return ocp.AsyncCheckpointer(handler, async_options=options)


def _plain(state):
    """A state (of arrays or of shapes) with its random key as plain numbers."""
    key_data = jax.random.key_data
    abstract = isinstance(state.rng, jax.ShapeDtypeStruct)
    return state.replace(
        rng=jax.eval_shape(key_data, state.rng) if abstract else key_data(state.rng)
    )


def _tensors(state):
    """{path: {"shape", "dtype"}} of a state."""
    paths = jax.tree_util.tree_leaves_with_path(_plain(state))
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    return {
        name(path): {"shape": list(leaf.shape), "dtype": str(leaf.dtype)} for path, leaf in paths
    }


def _first_line(error):
    """The first line of an error's message, at most 200 characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
