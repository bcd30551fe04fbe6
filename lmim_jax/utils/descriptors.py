"""The limit of open files of this process (`ulimit -n`)."""

import contextlib
import resource

LARGEST = 1 << 20  # where the hard limit is higher or there is none
MACOS_LARGEST = 10_240  # OPEN_MAX, above which macOS refuses
SPARE = 128  # descriptors for everything but the dataset: libraries, logs, checkpoints


def raise_limit() -> int:
    """Raise the soft limit of open files to the hard one; returns the limit.

    Child processes inherit it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for wanted in (LARGEST, MACOS_LARGEST):
        if hard != resource.RLIM_INFINITY:
            wanted = min(wanted, hard)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            with contextlib.suppress(ValueError, OSError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return LARGEST if soft == resource.RLIM_INFINITY else soft
