"""Writing files so that a kill or a power cut leaves the old one or the new one, never half of one."""

import os
import pathlib


def write(path, content):
    """Write a file atomically: to a temporary beside it, flushed to disk, then renamed. content: str or bytes."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    flush_folder(path.parent)


def write_all(file, data):
    """Write all of `data` to an unbuffered file, or raise an OSError (a write may stop short on a full disk)."""
    while data:
        data = data[file.write(data) :]


def flush_folder(path):
    """Flush a folder's entries (names, not contents) to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
