"""Checkpoint manifests: the files and tensors of a committed step, and whether they are intact.

A step is a folder. Its manifest is written last, so a step without a manifest is partial. The
manifest holds checksums, because Orbax restores a flipped bit without an error.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import shutil
import time
from collections.abc import Callable
from typing import Any

from lmim_jax.utils import atomic_io, buckets, faults
from lmim_jax.utils.errors import UserError

log = logging.getLogger(__name__)

NAME = "manifest.json"
FOLDER = "checkpoints"  # in a workdir: one sub-folder per step
QUARANTINE = "aside"  # in FOLDER: steps that did not verify
COMMITTED = "sealed-before"  # in FOLDER: an empty file, present once any step has been committed
CHUNK = 1 << 22  # bytes read at a time
READERS = 16  # threads that read files


@dataclasses.dataclass(frozen=True)
class CheckpointStatus:
    """The result of verifying a step.

    Attributes:
      state: "good", "partial" (it has no manifest) or "damaged".
      problems: one sentence per missing or damaged file.
      size: bytes on disk.
    """

    state: str
    problems: tuple[str, ...]
    size: int

    def __str__(self) -> str:
        if not self.problems:
            return self.state
        listed = "; ".join(self.problems[:3])
        if len(self.problems) > 3:
            listed += f" and {len(self.problems) - 3} more"
        return f"{self.state}: {listed}"


def write(
    folder: buckets.Pathname,
    tensors: dict[str, dict[str, Any]],
    confirm: Callable[[], None],
    **metadata: Any,
) -> dict[str, Any]:
    """Commit a step: read its files back, flush them to disk, then write the manifest atomically.

    Args:
      folder: of the step.
      tensors: {path: {"shape", "dtype"}}.
      confirm: raises an error if the step may not be committed any more.
      **metadata: more entries for the manifest.

    Returns:
      The manifest.
    """
    folder = buckets.path(folder)
    sizes = buckets.file_sizes(folder)

    def describe(name: str) -> dict[str, Any]:
        return {"size": sizes[name], "sha256": _checksum(folder / name, sizes[name], flush=True)}

    with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
        files = dict(zip(sizes, pool.map(describe, sizes), strict=True))
    if isinstance(folder, pathlib.Path):
        for parent in {(folder / name).parent for name in files}:
            atomic_io.flush_folder(parent)
    manifest = {"time": time.time(), **metadata, "files": files, "tensors": tensors}
    body = json.dumps(manifest, indent=1)
    head = json.dumps({"sha256": hashlib.sha256(body.encode()).hexdigest()})
    confirm()
    atomic_io.write(folder / NAME, f"{head}\n{body}\n")
    return manifest


def read(folder: buckets.Pathname) -> dict[str, Any]:
    """Read the manifest of a step.

    Raises:
      FileNotFoundError: the step has no manifest.
      ValueError: the manifest is damaged.
    """
    head, _, body = buckets.path(folder, NAME).read_text().partition("\n")
    digest = hashlib.sha256(body[:-1].encode()).hexdigest()
    if json.loads(head)["sha256"] != digest or body[-1:] != "\n":
        raise ValueError("its checksum is wrong")
    return json.loads(body)


def checksum(folder: buckets.Pathname) -> str:
    """The SHA-256 of a step's manifest, which itself contains the checksums of all its files."""
    head, _, _ = buckets.path(folder, NAME).read_text().partition("\n")
    return json.loads(head)["sha256"]


def is_committed(folder: buckets.Pathname) -> bool:
    """Whether a step has a manifest; its contents are not verified."""
    return buckets.path(folder, NAME).is_file()


def delete(folder: buckets.Pathname) -> None:
    """Delete a step, its manifest first: a step that is half deleted counts as partial."""
    buckets.path(folder, NAME).unlink(missing_ok=True)
    buckets.remove_tree(buckets.path(folder))


def verify(folder: buckets.Pathname, contents: bool = True) -> CheckpointStatus:
    """Compare a step with its manifest.

    Args:
      folder: of the step.
      contents: compare checksums; otherwise check only that all files exist and have their sizes.
    """
    folder = buckets.path(folder)
    try:
        sizes = _read_patiently(folder, lambda: buckets.file_sizes(folder))
    except (OSError, faults.ReadFailed) as error:
        return CheckpointStatus("damaged", (f"it cannot be listed: {error}",), 0)
    total = sum(sizes.values())
    try:
        manifest = _read_patiently(folder / NAME, lambda: read(folder))
    except FileNotFoundError:
        return CheckpointStatus("partial", (f"{NAME} is missing",), total)
    except (ValueError, KeyError, TypeError, OSError, faults.ReadFailed) as error:
        return CheckpointStatus("damaged", (f"{NAME}: {error}",), total)

    def check(name: str) -> str | None:
        expected = manifest["files"][name]
        return _file_problem(folder, name, expected, sizes.get(name), contents)

    with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
        problems = tuple(filter(None, pool.map(check, manifest["files"])))
    state = "damaged" if problems else "good"
    return CheckpointStatus(state, problems, total)


def _file_problem(
    folder: buckets.Path, name: str, expected: dict[str, Any], size: int | None, contents: bool
) -> str | None:
    """What is wrong with a file of a step; None where nothing is."""
    if size is None:
        return f"{_describe(name)} is missing"
    if size != expected["size"]:
        return f"{_describe(name)} has {size} bytes instead of {expected['size']}"
    if not contents:
        return None
    path = folder / name
    try:
        checksum = _read_patiently(path, lambda: _checksum(path, size))
    except OSError as error:
        return f"{_describe(name)}: {error.strerror}"
    except faults.ReadFailed as error:
        return f"{_describe(name)}: {error}"
    if checksum != expected["sha256"]:
        return f"{_describe(name)}: wrong checksum"
    return None


def _read_patiently(path: buckets.Path, read_it: Callable[[], Any]) -> Any:
    """The result of reading a file, again while the environment is at fault."""
    return faults.retry(read_it, lambda: str(path), faults.RETRY_SECONDS)


def steps(workdir: buckets.Pathname) -> dict[int, buckets.Path]:
    """{step: folder} of all steps in workdir/checkpoints in any state, oldest first."""
    found: dict[int, buckets.Path] = {}
    for path in buckets.matching(buckets.path(workdir, FOLDER), "*"):
        if path.name.isdigit():
            found[int(path.name)] = path
    return dict(sorted(found.items()))


def newest_committed_step(workdir: buckets.Pathname) -> int | None:
    """The newest step that has a manifest, or None; its contents are not verified."""
    committed = [step for step, path in steps(workdir).items() if is_committed(path)]
    return max(committed, default=None)


def newest_good_step(workdir: buckets.Pathname, quarantine: bool = False) -> int | None:
    """The newest step whose checksums all match; None where no step was ever committed.

    Steps that do not verify are listed in a warning.

    Args:
      workdir: of the run.
      quarantine: move steps that do not verify to checkpoints/aside; in a bucket, their manifests.

    Raises:
      UserError: steps were committed, and none of them is good.
    """
    problems: list[str] = []
    for step, path in reversed(steps(workdir).items()):
        status = verify(path)
        if status.state == "good":
            if problems:
                listed = "; ".join(problems)
                log.warning("RESTORING AN OLDER CHECKPOINT, step %d: %s", step, listed)
            return step
        problem = f"step {step} is {status}"
        if quarantine:
            problem += _move_to_quarantine(path, status.state)
        problems.append(problem)
    listed = "; ".join(problems)
    if buckets.path(workdir, FOLDER, COMMITTED).is_file():
        listed = listed or "all of them have been deleted"
        raise UserError(
            f"{workdir} has no good checkpoint: {listed}. To start over, choose another --workdir"
        )
    if problems:
        log.warning("starting from the beginning, as no save was ever completed: %s", listed)
    return None


def _move_to_quarantine(path: buckets.Path, state: str) -> str:
    """Move a step to, for example, checkpoints/aside/512-damaged, replacing an older one.

    Of partial steps, which every kill during a save leaves, only the last one is kept. In a bucket,
    where moving means copying, only its manifest is moved, which makes it partial.

    Returns:
      What was moved where, for a message.
    """
    if isinstance(path, buckets.BucketPath):
        manifest = path / NAME
        if not manifest.is_file():
            return ""
        copy = path.parent / QUARANTINE / f"{path.name}-{state}-{NAME}"
        copy.write_bytes(manifest.read_bytes())
        manifest.unlink()
        return f", {NAME} moved to {copy}"
    destination = path.parent / QUARANTINE / f"{path.name}-{state}"
    replaced = [destination]
    if state == "partial":
        replaced += destination.parent.glob(f"*-{state}")
    for older in replaced:
        shutil.rmtree(older, ignore_errors=True)
    destination.parent.mkdir(exist_ok=True)
    path.rename(destination)
    return f", moved to {destination}"


def _describe(name: str) -> str:
    """The name of a file, with that of its tensor where its folder holds a single tensor."""
    parts = pathlib.PurePosixPath(name).parts
    if len(parts) > 2 and "." in parts[1]:
        return f"{name} (tensor {parts[1].replace('.', '/')})"
    return name


def _checksum(path: buckets.Path, size: int, flush: bool = False) -> str:
    """The hexadecimal SHA-256 of a file; `flush` also flushes it to disk."""
    digest = hashlib.sha256()
    if isinstance(path, buckets.BucketPath):
        for chunk in path.read_chunks(size, CHUNK):
            digest.update(chunk)
        return digest.hexdigest()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
        if flush:
            os.fsync(file.fileno())
    return digest.hexdigest()
