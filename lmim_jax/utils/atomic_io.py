"""Writing files atomically: after a kill or a power cut, a file is the old or the new one.

Objects in buckets always are.
"""

import contextlib
import io
import os
import pathlib
import tempfile
import time
from collections.abc import Iterator
from typing import BinaryIO

from lmim_jax.utils import buckets

SUFFIX = ".tmp"
LEFTOVER_AGE = 3600.0  # seconds without a change; no write takes so long


def write(path: buckets.Pathname, content: str | bytes | memoryview) -> None:
    """Write a file atomically: to a temporary file beside it, flushed to disk, then renamed."""
    if isinstance(content, str):
        content = content.encode()
    with open_new(path) as file:
        file.write(content)


@contextlib.contextmanager
def open_new(path: buckets.Pathname) -> Iterator[BinaryIO]:
    """A temporary file to be written; without an error, it becomes the file or object `path`."""
    path = buckets.path(path).absolute()  # "." has no name
    if isinstance(path, buckets.BucketPath):
        with tempfile.TemporaryFile() as file:
            yield file
            file.seek(0)
            path.write_bytes(file.read())
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}{SUFFIX}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Remove the temporary files of writers that were killed: those that are old.

    Args:
      folder: that holds them, without its sub-folders.
    """
    for path in pathlib.Path(folder).glob(f"*{SUFFIX}"):
        with contextlib.suppress(OSError):  # its writer lives after all, and has just finished
            if time.time() - path.stat().st_mtime > LEFTOVER_AGE:
                path.unlink()


def write_all(file: io.RawIOBase, data: bytes) -> None:
    """Write all of `data` to an unbuffered file, whose `write` may stop short on a full disk.

    Raises:
      OSError: the disk is full, or another failure.
    """
    while data:
        written = file.write(data)
        data = data[written:]


def flush_folder(path: str | os.PathLike[str]) -> None:
    """Flush a folder's entries (names of files, not their contents) to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
