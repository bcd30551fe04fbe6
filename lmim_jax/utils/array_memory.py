"""Memory of large arrays on the host."""

import math

import numpy as np
from jaxtyping import Shaped
from numpy.typing import DTypeLike

ALIGNMENT = 64  # bytes; on CPUs, JAX uses an array that is so aligned without copying it


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
