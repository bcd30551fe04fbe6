"""The CPU cores that this process may use."""

import contextlib
import os
from collections.abc import Iterator, Sequence


def available() -> list[int]:
    """Numbers of the cores that this process may use, in order."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))  # macOS


@contextlib.contextmanager
def bound_to(cores: Sequence[int]) -> Iterator[None]:
    """Bind child processes that start inside to some cores, if the system can (macOS cannot)."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)  # inherited by children
    try:
        yield
    finally:
        os.sched_setaffinity(0, own)
