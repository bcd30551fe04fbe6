"""Runs as processes: started, watched, killed, compared."""

import functools
import hashlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import threading
import time

import conftest
import jax
import numpy as np
import orbax.checkpoint as ocp

from lmim_jax.train import checkpoint_manifest, checkpoints
from lmim_jax.utils import buckets

ROOT = pathlib.Path(conftest.ROOT)
# Seconds, on a busy machine: how long processes may be silent, and how long anything may take
SILENCE = 300
LIMIT = 1800
BOOT_ID = "/proc/sys/kernel/random/boot_id"  # by it, jax tells hosts apart
_boot_ids = tempfile.TemporaryDirectory(prefix="boot_ids_")


def on_host(number, command):
    """A command that runs another one as on a host of its own, with its process id.

    Args:
      number: of the host, which has a boot id of its own.
      command: a list; it is returned unchanged where `why_one_host`.
    """
    if why_one_host():
        return command
    return _with_boot_id(number, command)


def _with_boot_id(number, command):
    file = pathlib.Path(_boot_ids.name, str(number))
    file.write_text(f"00000000-0000-4000-8000-{number:012d}\n")
    namespace = ["unshare", "--mount"]
    if os.geteuid() != 0:
        namespace.append("--map-root-user")
    script = f'mount --bind "$0" {BOOT_ID} && exec "$@"'
    return [*namespace, "sh", "-c", script, str(file), *command]


@functools.cache
def why_one_host():
    """Why processes cannot have boot ids of their own; "" if they can."""
    command = _with_boot_id(7, ["cat", BOOT_ID])
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return "unshare not found: apt-get install util-linux"
    if done.stdout.strip().endswith("7"):
        return ""
    return f"mount namespaces are not allowed here: {done.stderr.strip()}"


def start(
    images,
    workdir,
    *flags,
    processes=1,
    devices=1,
    launcher=(),
    different=(),
    program="main.py",
    config="tests/tiny.py",
):
    """Start main.py as users do; several processes are on hosts of their own where possible.

    Args:
      images: a folder of images.
      workdir: of the run.
      *flags: of main.py.
      processes: how many.
      devices: of each process.
      launcher: a command that starts all processes.
      different: a list of more flags for each process.
      program: a script with the flags of main.py.
      config: the recipe.

    Returns:
      A list of Process.
    """
    fake = f"{conftest.FAST} --xla_force_host_platform_device_count={devices}"
    environment = {
        **os.environ,
        "XLA_FLAGS": fake,
        "PYTHONPATH": f"{ROOT}:{ROOT}/tests",
        "JAX_PLATFORMS": "cpu",
    }
    command = [
        *launcher,
        sys.executable,
        program,
        f"--config={config}",
        f"--config.data.path={images}",
        f"--workdir={workdir}",
        "--config.log_every=1",
        "--config.evaluators.knn.every=0",
        "--config.evaluators.visualization.every=0",
        *flags,
    ]
    if processes == 1 or launcher:
        return [Process(command, cwd=ROOT, env=environment)]
    coordinator = f"localhost:{free_port()}"
    started = []
    for rank in range(processes):
        own = [f"--coordinator={coordinator}", f"--num_processes={processes}"]
        own.append(f"--process_id={rank}")
        if different:
            own += different[rank]
        started.append(Process(on_host(rank, [*command, *own]), cwd=ROOT, env=environment))
    return started


def free_port():
    """A port of this machine that is not in use."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


class Process(subprocess.Popen):
    """A process whose output is read continuously: a full pipe would block it."""

    def __init__(self, command, **how):
        super().__init__(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **how
        )
        self.lines = []
        self.heard = time.monotonic()  # when it last wrote something
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.stdout:
            self.lines.append(line)
            self.heard = time.monotonic()

    def output(self):
        """What it and its children have written, once all of them have ended."""
        self._reader.join(SILENCE)
        assert not self._reader.is_alive(), "a process is still writing to the pipe"
        return "".join(self.lines)


def finish(running):
    """Wait for processes: [(exit code, output)]."""
    for process in running:
        wait_for(lambda process=process: process.poll() is not None, running, may_end=True)
    return [(process.returncode, process.output()) for process in running]


def lines(workdir):
    """The complete metric lines of a run, which may still be running."""
    path = buckets.path(workdir, "metrics.jsonl")
    text = path.read_text() if path.is_file() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def losses(workdir):
    """{step: loss} of a run."""
    return {line["step"]: line["loss"] for line in lines(workdir) if "loss" in line}


def step_of(workdir):
    """The last step that a run has logged, 0 before the first."""
    return max(losses(workdir), default=0)


def wait_for(condition, running, may_end=False):
    """Wait until a condition holds, while the processes run.

    They may be as slow as a busy machine makes them, but not silent.

    Args:
      condition: () -> whether it holds.
      running: a list of Process.
      may_end: whether it is no failure that one of them ends.
    """
    began = time.monotonic()
    while not condition():
        for process in running:
            assert may_end or process.poll() is None, process.output()
        now = time.monotonic()
        heard = max([began, *(process.heard for process in running)])
        if now - heard > SILENCE or now - began > LIMIT:
            texts = ["".join(process.lines) for process in running]
            for process in running:
                process.kill()
            raise TimeoutError("\n---\n".join(texts))
        time.sleep(0.002 if not may_end else 0.05)


def saving(workdir):
    """Whether a save is in progress: a step without a manifest."""
    folders = checkpoints.steps(workdir).values()
    return not all(checkpoint_manifest.is_committed(path) for path in folders)


def digest(workdir, step):
    """SHA-256 over the names and bytes of all tensors of a saved step, as read by Orbax."""
    path = checkpoints.steps(workdir)[step].absolute() / "state"
    reader = ocp.PyTreeCheckpointer()
    path = str(path)
    tree = reader.metadata(path).item_metadata.tree
    # As numpy arrays, whatever devices saved them
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    return digest_of_tree(reader.restore(path, restore_args=as_numpy))


def digest_of_tree(tree):
    """SHA-256 over the names and bytes of a tree of arrays."""
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        leaves[jax.tree_util.keystr(path, simple=True, separator="/")] = leaf
    digest = hashlib.sha256()
    for name, leaf in sorted(leaves.items()):
        digest.update(name.encode() + np.asarray(leaf).tobytes())
    return digest.hexdigest()
