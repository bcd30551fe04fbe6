"""Manifests of checkpoints: which files and tensors a committed step consists of, and whether they still do.

A step is a folder; its manifest is written last, so a step without one is partial. Orbax restores a flipped bit without
an error, hence the checksums.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import shutil
import time

from lmim_jax.utils import atomic_io
from lmim_jax.utils.errors import UserError

log = logging.getLogger(__name__)

NAME = "manifest.json"
FOLDER, ASIDE = "checkpoints", "aside"  # of the steps in a workdir, and of damaged ones in it
SEALED = (
    "sealed-before"  # an empty file: some step was once complete, so finding none now means damage
)
CHUNK = 1 << 22  # bytes read at a time


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The state of a step: "good", "partial" (no manifest) or "damaged"; what is wrong with it; its size in bytes."""

    state: str
    problems: tuple[str, ...]
    size: int

    def __str__(self):
        more = f" and {len(self.problems) - 3} more" if len(self.problems) > 3 else ""
        return (
            f"{self.state}: {'; '.join(self.problems[:3])}{more}" if self.problems else self.state
        )


def write(folder, tensors, **facts):
    """Seal a step: checksum every file below `folder`, flush them to disk, and write the manifest, atomically and last.

    Args:
      tensors: {path: {"shape", "dtype"}}. facts: more to keep in the manifest.

    Returns:
      The manifest.
    """
    folder = pathlib.Path(folder)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    with concurrent.futures.ThreadPoolExecutor() as pool:
        entries = pool.map(
            lambda path: {"size": path.stat().st_size, "sha256": _checksum(path, flush=True)}, paths
        )
        listed = {
            path.relative_to(folder).as_posix(): entry
            for path, entry in zip(paths, entries, strict=True)
        }
    for parent in {path.parent for path in paths}:
        atomic_io.flush_folder(parent)
    manifest = {"time": time.time(), **facts, "files": listed, "tensors": tensors}
    body = json.dumps(manifest, indent=1)
    atomic_io.write(
        folder / NAME,
        json.dumps({"sha256": hashlib.sha256(body.encode()).hexdigest()}) + "\n" + body + "\n",
    )
    return manifest


def read(folder):
    """The manifest of a step.

    Raises:
      FileNotFoundError: there is none. ValueError: it is damaged.
    """
    head, _, body = pathlib.Path(folder, NAME).read_text().partition("\n")
    if (
        json.loads(head)["sha256"] != hashlib.sha256(body[:-1].encode()).hexdigest()
        or body[-1:] != "\n"
    ):
        raise ValueError("its checksum is wrong")
    return json.loads(body)


def _sizes(folder):
    """{name: bytes} of the files below a folder; a run may be writing to it, so files may go."""
    sizes = {}
    for path in (
        pathlib.Path(above, name) for above, _, names in os.walk(folder) for name in names
    ):
        with contextlib.suppress(FileNotFoundError):
            sizes[path.relative_to(folder).as_posix()] = path.stat().st_size
    return sizes


def verify(folder, contents=True):
    """The Verdict on a step.

    Args:
      contents: compare checksums; otherwise only that all files are there with their sizes.
    """
    folder = pathlib.Path(folder)
    sizes = _sizes(folder)
    size = sum(sizes.values())
    try:
        manifest = read(folder)
    except FileNotFoundError:
        return Verdict("partial", (f"{NAME} is missing",), size)
    except (ValueError, KeyError, TypeError, OSError) as error:
        return Verdict("damaged", (f"{NAME}: {error}",), size)

    def problem(entry):
        name, expected = entry
        if name not in sizes:
            return f"{_title(name)} is missing"
        try:
            if sizes[name] != expected["size"]:
                return f"{_title(name)} has {sizes[name]} bytes instead of {expected['size']}"
            if contents and _checksum(folder / name) != expected["sha256"]:
                return f"{_title(name)}: wrong checksum"
        except OSError as error:
            return f"{_title(name)}: {error.strerror}"

    with concurrent.futures.ThreadPoolExecutor() as pool:
        problems = tuple(filter(None, pool.map(problem, manifest["files"].items())))
    return Verdict("damaged" if problems else "good", problems, size)


def steps(workdir):
    """Folders of the steps below workdir/checkpoints, whatever their state: {step: path}, oldest first."""
    root = pathlib.Path(workdir, FOLDER)
    found = (
        {int(path.name): path for path in root.glob("*") if path.name.isdigit()}
        if root.is_dir()
        else {}
    )
    return dict(sorted(found.items()))


def good_step(workdir, set_aside=False):
    """The newest step that verifies, all checksums included; None where none was ever complete.

    Steps that do not are named in a warning and, where asked for, moved to checkpoints/aside.

    Raises:
      UserError: there are steps, and none is good.
    """
    problems = {}
    for step, path in reversed(steps(workdir).items()):
        verdict = verify(path)
        if verdict.state == "good":
            if problems:
                log.warning(
                    "RESTORING AN OLDER CHECKPOINT, step %d: %s", step, "; ".join(problems.values())
                )
            return step
        problems[step] = f"step {step} is {verdict}"
        if set_aside:
            problems[step] += f", moved to {_move_aside(path, verdict.state)}"
    told = "; ".join(problems.values())
    if pathlib.Path(workdir, FOLDER, SEALED).exists():
        told = told or "all of them are gone"
        raise UserError(
            f"{workdir} has no good checkpoint: {told}. To start over, choose another --workdir"
        )
    if problems:
        log.warning("starting from the beginning, as no save was ever completed: %s", told)
    return None


def _move_aside(path, state):
    """Move a step out of the way: checkpoints/aside/512-damaged; an older one of that name is replaced."""
    to = path.parent / ASIDE / f"{path.name}-{state}"
    shutil.rmtree(to, ignore_errors=True)
    to.parent.mkdir(exist_ok=True)
    path.rename(to)
    return to


def _title(name):
    """The name of a file, and of the tensor in it where its folder is one tensor's."""
    parts = pathlib.PurePosixPath(name).parts
    tensor = parts[1] if len(parts) > 2 and "." in parts[1] else None
    return f"{name} (tensor {tensor.replace('.', '/')})" if tensor else name


def _checksum(path, flush=False):
    """SHA-256 of a file, hexadecimal; flushed to disk where asked."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
        if flush:
            os.fsync(file.fileno())
    return digest.hexdigest()
