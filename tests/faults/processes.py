"""Runs as processes: started, watched, killed, compared."""

import hashlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time

import conftest
import jax
import numpy as np
import orbax.checkpoint as ocp

from lmim_jax.train import checkpoint_manifest, checkpoints

ROOT = pathlib.Path(conftest.ROOT)
LIMIT = 300  # seconds that anything may take on a busy machine


def start(
    images, workdir, *flags, processes=1, devices=1, launcher=(), different=(), program="main.py"
):
    """main.py as users call it, as so many processes of so many devices each: a list of Popen.

    launcher: a command that starts all processes; different: a list of more flags for each process; program: with the
    flags of main.py.
    """
    fake = f"{conftest.FAST} --xla_force_host_platform_device_count={devices}"
    environment = {
        **os.environ,
        "XLA_FLAGS": fake,
        "PYTHONPATH": f"{ROOT}:{ROOT}/tests",
        "JAX_PLATFORMS": "cpu",
    }
    common = [
        *launcher,
        sys.executable,
        program,
        "--config=tests/tiny.py",
        f"--config.data.path={images}",
    ]
    common += [f"--workdir={workdir}", "--config.log_every=1", "--config.evaluators.knn.every=0"]
    common += ["--config.evaluators.visualization.every=0", *flags]
    ranks = [[]]
    if processes > 1 and not launcher:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        where = [f"--coordinator=localhost:{port}", f"--num_processes={processes}"]
        ranks = [
            [*where, f"--process_id={i}", *(different[i] if different else ())]
            for i in range(processes)
        ]
    return [Process([*common, *rank], cwd=ROOT, env=environment) for rank in ranks]


class Process(subprocess.Popen):
    """A process whose output is read all the time: one that writes into a full pipe would stand still."""

    def __init__(self, command, **how):
        super().__init__(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **how
        )
        self._lines = []
        self._reader = threading.Thread(target=lambda: self._lines.extend(self.stdout), daemon=True)
        self._reader.start()

    def told(self):
        """What it and its children wrote, once all of them have ended."""
        self._reader.join(LIMIT)
        assert not self._reader.is_alive(), "somebody still holds its output"
        return "".join(self._lines)


def finish(running):
    """Wait for processes: [(exit code, output)]."""
    return [(process.wait(timeout=LIMIT), process.told()) for process in running]


def lines(workdir):
    """The complete metric lines of a run, which may be going on."""
    path = pathlib.Path(workdir, "metrics.jsonl")
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def losses(workdir):
    """{step: loss} of a run."""
    return {line["step"]: line["loss"] for line in lines(workdir) if "loss" in line}


def step_of(workdir):
    """The last step that a run has logged, 0 before the first."""
    return max(losses(workdir), default=0)


def wait_for(condition, running):
    """Wait until a condition holds; the processes must live meanwhile."""
    deadline = time.monotonic() + LIMIT
    while not condition():
        for process in running:
            assert process.poll() is None, process.told()
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.002)


def saving(workdir):
    """Whether a save is under way: a step without a manifest."""
    return any(
        not (path / checkpoint_manifest.NAME).exists()
        for path in checkpoints.steps(workdir).values()
    )


def digest(workdir, step):
    """SHA-256 over all tensors of a saved step, names and bytes, as read by Orbax."""
    path, reader = checkpoints.steps(workdir)[step].absolute() / "state", ocp.PyTreeCheckpointer()
    # as plain arrays, wherever the devices were that saved them
    plain = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), reader.metadata(path).item_metadata.tree
    )
    return digest_of(reader.restore(path, restore_args=plain))


def digest_of(state):
    """The same of a tree of arrays."""
    whole = hashlib.sha256()
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    leaves = {name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
    for path, leaf in sorted(leaves.items()):
        whole.update(path.encode() + np.asarray(leaf).tobytes())
    return whole.hexdigest()
