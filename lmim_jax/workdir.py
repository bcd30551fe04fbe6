"""A working directory belongs to one config, one dataset, and one writer at a time."""

import atexit
import datetime
import json
import logging
import os
import pathlib
import re
import shutil
import socket
import threading
import time

import jax
from flax.traverse_util import flatten_dict

from lmim_jax import distributed, files
from lmim_jax.errors import UserError

log = logging.getLogger(__name__)

# Keys that may differ between a run and its continuation: they change no number of the training.
HARMLESS = re.compile(
    r"log_every|gauge_images|checkpoint_\w+|evaluators\..*|max_skipped|mesh\..*|remat|scan_layers"
    r"|data\.(path|dir|classes|test_split|workers|threads|timeout|max_bad_fraction)"
)
IMAGES = "training_images"  # key of config.json: what identifies them; absent in a run made of imported weights alone
HEARTBEAT = 20.0  # seconds between signs of life in the lock
UNSEEN = 90.0  # seconds that a network file system may take to show a new file to other hosts
STALE = 120.0  # seconds without one after which a writer on another host counts as dead


def check(workdir, config, data):
    """Raise a UserError if `workdir` is that of a run with another config or other data; nothing is written.

    Args:
      config: plain nested dict. data: flat dict that identifies the training images; None: not known yet.

    The error lists the keys that differ.
    """
    path = pathlib.Path(workdir, "config.json")
    if not path.exists():
        return
    known = json.loads(path.read_text())
    ours = _as_read(config, data if IMAGES in known else None)
    flat = [flatten_dict(x, sep=".", keep_empty_nodes=False) for x in (known, ours)]
    keys = sorted(key for key in flat[0].keys() | flat[1].keys() if not HARMLESS.fullmatch(key))
    old, new = ([side.get(key, "absent") for key in keys] for side in flat)
    differing = [f"{key} {a} -> {b}" for key, a, b in zip(keys, old, new, strict=True) if a != b]
    if differing:
        raise UserError(f"{workdir} is the run of another config ({', '.join(differing)}); choose another --workdir")


def claim(workdir, config, data):
    """Make `workdir` the directory of a run with this config and these data, unless it is already; see `check`.

    Raises:
      UserError: naming processes that do not see the same folder.
    """
    path = pathlib.Path(workdir, "config.json")
    if jax.process_index() == 0 and (not path.exists() or (data and IMAGES not in json.loads(path.read_text()))):
        log.info("new run in %s" if not path.exists() else "the images are new to the run in %s", workdir)
        files.write(path, json.dumps(_as_read(config, data), indent=2) + "\n")
    distributed.gather("written")
    deadline = time.monotonic() + UNSEEN
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(1)
    seen = distributed.gather([socket.gethostname(), path.exists()])
    if blind := [f"process {i} (host {host})" for i, (host, found) in enumerate(seen) if not found]:
        raise UserError(f"{workdir} is not the same folder on all hosts: {', '.join(blind)} finds no {path.name} there")


def _as_read(config, data):
    """The content of config.json, as JSON gives it back: tuples are lists."""
    return json.loads(json.dumps({**config, **({IMAGES: data} if data else {})}))


def pin_kernels(workdir, deterministic):
    """On NVIDIA GPUs, keep XLA's choice of kernels with the run, so that a restart computes the same program.

    XLA times several kernels for an operation when it compiles, and may choose another one next time, whose sums are
    rounded otherwise. To be called before jax looks for devices; works through the environment variable XLA_FLAGS.

    Args:
      deterministic: also leave out kernels whose sums depend on timing.
    """
    if not shutil.which("nvidia-smi"):
        return
    rank = os.environ.get("SLURM_PROCID") or os.environ.get("OMPI_COMM_WORLD_RANK") or "0"
    path = pathlib.Path(workdir).absolute() / f"gpu_kernels_{rank}.textproto"
    path.parent.mkdir(parents=True, exist_ok=True)
    flags = [f"--xla_gpu_{'load_autotune_results_from' if path.exists() else 'dump_autotune_results_to'}={path}"]
    flags += ["--xla_gpu_exclude_nondeterministic_ops=true"] if deterministic else []
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags]).strip()


class Lock:
    """workdir/lock: who writes here, and a sign of life of it. To be used in a `with` block."""

    def __init__(self, workdir):
        """Take the lock.

        Raises:
          UserError: another process holds it; named with host, pid and since when. A dead one's lock is taken over.
        """
        self._path, self._held = pathlib.Path(workdir, "lock"), False
        if jax.process_index():
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._mine = {"host": socket.gethostname(), "pid": os.getpid(), "start": _start_of(os.getpid())}
        self._mine["since"] = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        while not self._take():
            holder = self._holder()
            if holder and self._alive(holder):
                raise UserError(
                    f"{workdir} is being written by another run (host {holder['host']}, pid {holder['pid']}, since "
                    f"{holder['since']}); stop that one, or choose another --workdir"
                )
            log.warning("taking over %s: its holder is gone (%s)", self._path, holder or "unreadable")
            self._path.rename(self._path.with_name(f"lock.stale.{os.getpid()}"))  # one of several takers wins
            self._path.with_name(f"lock.stale.{os.getpid()}").unlink()
        self._held = True
        self._stop = threading.Event()
        threading.Thread(target=self._beat, daemon=True, name="lock").start()
        atexit.register(self.release)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.release()

    def release(self):
        """Give the lock back."""
        if self._held:
            self._held = False
            self._stop.set()
            if self._holder() == self._mine:
                self._path.unlink(missing_ok=True)

    def _take(self):
        """Create the lock file, complete at once; False where there is one."""
        draft = self._path.with_name(f"lock.{os.getpid()}")
        draft.write_text(json.dumps(self._mine))
        try:
            os.link(draft, self._path)
        except FileExistsError:
            return False
        finally:
            draft.unlink()
        return True

    def _holder(self):
        """What the lock file says; {} where it is unreadable or gone."""
        try:
            holder = json.loads(self._path.read_text())
            return holder if holder.keys() >= self._mine.keys() else {}
        except (OSError, ValueError, AttributeError):
            return {}

    def _alive(self, holder):
        """Whether the holder still runs: by its process on this host, by its signs of life on others."""
        if holder["host"] == self._mine["host"]:
            return holder["start"] is not None and _start_of(holder["pid"]) == holder["start"]
        return time.time() - self._path.stat().st_mtime < STALE

    def _beat(self):
        while not self._stop.wait(HEARTBEAT):
            try:
                os.utime(self._path)
            except OSError:  # the folder may be gone for a while
                continue


def _start_of(pid):
    """When a process of this host started, in the kernel's ticks since boot; None where there is no such process."""
    if not pathlib.Path("/proc/self/stat").exists():  # macOS: the number alone must do
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return 0
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])
