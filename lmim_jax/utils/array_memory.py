"""Memory of large arrays on the host."""

import ctypes
import math
import os
import sys

import numpy as np
from jaxtyping import Shaped
from numpy.typing import DTypeLike

ALIGNMENT = 64  # bytes; on CPUs, JAX uses an array that is so aligned without copying it

# Options of glibc's mallopt (malloc.h), and their values: never give memory back to the system,
# take none of it by mmap, which would give it back, and have one arena, as others do so too
KEPT = {-1: -1, -4: 0, -8: 1}  # M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX


def keep_freed() -> bool:
    """Keep freed memory in this process, to be used again; call it before large arrays are made.

    XLA frees the intermediate arrays of a program after each call on a CPU. Otherwise the system
    takes them back and clears them page by page for the next call, which takes 10 to 30 % of a
    train step. The variable GLIBC_TUNABLES, if it is set, decides instead.

    Returns:
      Whether memory is kept: the C library is glibc, and nobody else decides.
    """
    if not sys.platform.startswith("linux") or "GLIBC_TUNABLES" in os.environ:
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):  # musl: not glibc
        return False
    return all(library.mallopt(option, value) == 1 for option, value in KEPT.items())


def empty(shape: tuple[int, ...], dtype: DTypeLike) -> Shaped[np.ndarray, "..."]:
    """An uninitialized array that JAX need not copy on CPUs."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    first = -memory.ctypes.data % ALIGNMENT
    return memory[first : first + size].view(dtype).reshape(shape)


def copy(array: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
    """A copy that JAX need not copy again on CPUs."""
    copied = empty(array.shape, array.dtype)
    copied[...] = array
    return copied


def compact_rows(array: Shaped[np.ndarray, "N ..."], keep: Shaped[np.ndarray, " N"]) -> np.ndarray:
    """The rows of an array where `keep`, in place: the others are overwritten."""
    kept = np.flatnonzero(keep)
    rows = 65_536
    for first in range(0, len(kept), rows):
        chosen = kept[first : first + rows]
        array[first : first + len(chosen)] = array[chosen]  # no row moves backwards
    return array[: len(kept)]
