"""Arrays in memory that the processes of a host share, so that data workers do not copy them."""

import mmap
import os
import pathlib
import tempfile
import weakref
from typing import BinaryIO

import numpy as np
from jaxtyping import Shaped
from numpy.typing import DTypeLike

HAS_REFERENCES = hasattr(os, "memfd_create")  # Linux: files in memory that can be opened again


def new_file() -> BinaryIO:
    """An empty file without a name, in memory where the system has such files."""
    if HAS_REFERENCES:
        return os.fdopen(os.memfd_create("lmim_jax"), "w+b")
    return tempfile.TemporaryFile()


class SharedArray:
    """A read-only array of one dimension in an anonymous file.

    Pickling passes a reference, and a process on the same host maps the same memory; it ends with
    the last process that maps it. Where there are no files in memory (macOS), pickling copies.

    Args:
      file: with the elements, from `new_file`.
      dtype: of the elements.

    Attributes:
      array: the elements.
    """

    array: Shaped[np.ndarray, " N"]

    def __init__(self, file: BinaryIO, dtype: DTypeLike):
        file.flush()
        self._descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._descriptor)
        size = os.fstat(self._descriptor).st_size
        self._memory: mmap.mmap | None = None
        self.array = np.zeros(0, dtype)
        if size:  # an empty file cannot be mapped
            self._memory = mmap.mmap(self._descriptor, size, access=mmap.ACCESS_READ)
            self.array = np.frombuffer(self._memory, dtype)

    def bytes_until(self, end: bytes, start: int) -> bytes:
        """The bytes from `start` to the next occurrence of `end`, without it."""
        assert self._memory is not None
        return self._memory[start : self._memory.find(end, start)]

    def __reduce__(self):
        if HAS_REFERENCES:
            return _open, (f"/proc/{os.getpid()}/fd/{self._descriptor}", self.array.dtype)
        return share, (np.array(self.array),)


def _open(path: str, dtype: np.dtype) -> SharedArray:
    """The array in a file of another process."""
    with pathlib.Path(path).open("rb") as file:
        return SharedArray(file, dtype)


def share(array: Shaped[np.ndarray, " N"]) -> SharedArray:
    """A copy of an array in memory that other processes can map."""
    with new_file() as file:
        file.write(np.ascontiguousarray(array).data)
        return SharedArray(file, array.dtype)
