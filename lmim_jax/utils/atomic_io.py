"""Writing files atomically: after a kill or a power cut, a file is the old or the new one."""

import io
import os
import pathlib


def write(path: str | os.PathLike[str], content: str | bytes | memoryview) -> None:
    """Write a file atomically: to a temporary file beside it, flushed to disk, then renamed."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        content = content.encode()
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    flush_folder(path.parent)


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
