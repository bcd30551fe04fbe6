"""XLA's choice of kernels on NVIDIA GPUs, kept with a run, so that it resumes with the same ones.

XLA times several kernels for an operation when it compiles, and may choose another one next time,
which rounds differently. It writes its choices anew with every program that it compiles, not
atomically, and a damaged file makes every later compilation fail. So it reads and writes private
files of this process; process 0 publishes what it wrote once programs are compiled:

RUN/gpu_kernels.textproto    a comment that says of what it is valid, then what XLA wrote
"""

import functools
import hashlib
import importlib.metadata
import json
import logging
import pathlib
import shutil
import subprocess
import tempfile
from typing import Any

from lmim_jax.distributed import multihost
from lmim_jax.utils import atomic_io, buckets, xla_flags

log = logging.getLogger(__name__)

NAME = "gpu_kernels.textproto"
PACKAGES = ("jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin")  # XLA is in them
QUERY_TIMEOUT = 300  # seconds; a driver that is not loaded yet takes long
_folder: tempfile.TemporaryDirectory[str] | None = None  # of the private files
_dumped: pathlib.Path | None = None  # what XLA writes in this process
_published = b""


def pin(workdir: buckets.Pathname, process: int) -> list[str]:
    """Make XLA use the choices of a run, and write those that it adds.

    Call it before jax starts its backends; it sets the environment variable XLA_FLAGS.

    Args:
      workdir: of the run.
      process: the number of this process; 0 writes.

    Returns:
      Lines for the log.
    """
    global _folder, _dumped, _published
    if not multihost.visible_gpus():
        return []
    # XLA_FLAGS are divided at spaces, which a run's folder may have in its name
    parent = "/tmp" if len(tempfile.gettempdir().split()) > 1 else None
    _folder = tempfile.TemporaryDirectory(prefix="lmim_jax_kernels_", dir=parent)
    flags = []
    lines = []
    _published = b""
    content, problem = _read(buckets.path(workdir, NAME))
    if problem:
        lines.append(
            f"the kernels that {workdir} has used are not used again, so bits may differ: {problem}"
        )
    if content:
        chosen = pathlib.Path(_folder.name, "chosen.textproto")
        chosen.write_bytes(content)
        flags.append(f"--xla_gpu_load_autotune_results_from={chosen}")
        _published = content
    if process == 0:
        _dumped = pathlib.Path(_folder.name, "dumped.textproto")
        flags.append(f"--xla_gpu_dump_autotune_results_to={_dumped}")
    xla_flags.add("XLA_FLAGS", flags)
    return lines


def publish(workdir: buckets.Pathname) -> None:
    """Keep what XLA has chosen so far with the run, if this process is the one that writes.

    Call it while XLA compiles nothing. A full disk does not stop the run here.

    Args:
      workdir: of the run.
    """
    global _published
    if _dumped is None or not _dumped.is_file():
        return
    content = _dumped.read_bytes()
    if not content or content == _published:
        return
    head = json.dumps({**_valid_for(), "sha256": hashlib.sha256(content).hexdigest()})
    path = buckets.path(workdir, NAME)
    try:
        atomic_io.write(path, f"# {head}\n".encode() + content)
    except OSError as error:
        log.warning("%s was not written: %s", path, error)
        return
    _published = content


def _read(path: buckets.Path) -> tuple[bytes, str]:
    """(the choices, ""), or (b"", why they cannot be used here); of no file, (b"", "")."""
    try:
        head, _, content = path.read_bytes().partition(b"\n")
        values = json.loads(head.removeprefix(b"# "))
        if values.pop("sha256") != hashlib.sha256(content).hexdigest():
            return b"", f"{path} is damaged"
    except FileNotFoundError:
        return b"", ""
    except OSError as error:
        return b"", f"{path} cannot be read: {error}"
    except (ValueError, KeyError, AttributeError):
        return b"", f"{path} is damaged"
    differences = []
    for name, value in _valid_for().items():
        if values.get(name) != value:
            differences.append(f"{name} {values.get(name)} -> {value}")
    if differences:
        return b"", f"{path} is of another system ({', '.join(differences)})"
    return content, ""


@functools.cache
def _valid_for() -> dict[str, Any]:
    """What the choices depend on: {"gpus": models, "jaxlib": version, ...}."""
    found: dict[str, Any] = {"gpus": None}  # where nobody can be asked; XLA compares them too
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, timeout=QUERY_TIMEOUT)
        found["gpus"] = sorted(set(answer.stdout.splitlines()))
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found
