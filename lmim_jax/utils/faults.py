"""Faults of the environment, told from damaged content, and waited for.

Too many open files, an I/O error, a stale handle, a lack of memory, a time-out: none of them says
anything about the file that was being read. They pass, or somebody has to mend them.
"""

import errno
import logging
import os
import pathlib
import re
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

from lmim_jax.utils.errors import DataLoaderTimeout
from lmim_jax.utils.logging import duration

log = logging.getLogger(__name__)

Result = TypeVar("Result")

DENIED = {errno.EACCES, errno.EPERM}
# There is no such file, or it may not be read; but see `has_vanished` and `all_denied`
ABSENT = DENIED | {
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
}
# Recognized by their texts in the errors of libraries that do not pass on the number
RECOGNIZED = (
    errno.EMFILE,
    errno.ENFILE,
    errno.EIO,
    errno.ESTALE,
    errno.ENOMEM,
    errno.ENOBUFS,
    errno.ETIMEDOUT,
    errno.EAGAIN,
    errno.EINTR,
    errno.ENOTCONN,
    errno.ECONNRESET,
    errno.ECONNREFUSED,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETUNREACH,
)
TEXTS = re.compile(
    "|".join(re.escape(os.strerror(number)) for number in RECOGNIZED)
    # Of libjpeg, libjpeg-turbo and Pillow; of network clients
    + "|insufficient memory|memory allocation failure|out of memory|timed out",
    re.IGNORECASE,
)
# How ArrayRecord's library reports a call of the operating system, and the file it is about
SYSTEM_CALL = re.compile(r"\b\w+\(\) failed: ([^;]+)")
OPENED = re.compile(r"\bopen\(\) failed: [^;]+; opening ([^;]+)")
NUMBERS = {os.strerror(number): number for number in errno.errorcode}

FIRST_PAUSE = 0.1  # seconds; every pause is twice as long as the one before
LONGEST_PAUSE = 15.0
REPORT_EVERY = 600.0  # seconds between two warnings about the same kind of fault
RETRY_SECONDS = 600.0  # how long files are tried again that have no option for it

_reported: dict[str, float] = {}  # when a kind of fault was last reported, by its text


class ReadFailed(DataLoaderTimeout):
    """Something could not be read for minutes, and not because it is damaged or missing."""


def is_environment_fault(error: BaseException) -> bool:
    """Whether an error, or one that it was raised from, is a fault of the environment."""
    link: BaseException | None = error
    while link is not None:
        verdict = _verdict(link)
        if verdict is not None:
            return verdict
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return False


def _verdict(error: BaseException) -> bool | None:
    """Whether an error by itself is a fault of the environment; None: it does not say."""
    if isinstance(error, MemoryError | TimeoutError | ConnectionError):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno not in ABSENT
    text = str(error)
    if SYSTEM_CALL.search(text):
        return number_of(error) not in ABSENT
    if TEXTS.search(text):
        return True
    return None


def number_of(error: BaseException) -> int | None:
    """The errno of an error, also if only its text has it; None: unknown."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    called = SYSTEM_CALL.search(str(error))
    if called:
        return NUMBERS.get(called[1])
    return None


def has_vanished(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder is gone, as where a file system is not mounted any more."""
    try:
        pathlib.Path(folder).stat()
    except PermissionError:
        return False
    except OSError:
        return True
    return False


def all_denied(files: Iterable[str | os.PathLike[str]]) -> bool:
    """Whether no file may be read, as where a login or a ticket of the file system has expired."""
    for file in files:
        try:
            pathlib.Path(file).open("rb").close()
        except PermissionError:
            continue
        except OSError:
            return False
        return False
    return True


def check_file_system(
    error: OSError, root: str | os.PathLike[str], others: Iterable[str | os.PathLike[str]]
) -> None:
    """Raise ESTALE where not a file is at fault, but the file system that it is on.

    Args:
      error: of reading the file: it is not there, or may not be read.
      root: the folder or archive that the file is in.
      others: a few other files.
    """
    if isinstance(error, FileNotFoundError) and has_vanished(root):
        message = f"{root} is gone; is its file system mounted?"
        raise OSError(errno.ESTALE, message, str(root)) from error
    if isinstance(error, PermissionError) and all_denied(others):
        message = "other files may not be read either; has a login or a ticket expired?"
        raise OSError(errno.ESTALE, message, str(error.filename)) from error


def retry(read: Callable[[], Result], describe: Callable[[], str], seconds: float) -> Result:
    """Read something, again after growing pauses while the environment is at fault.

    Args:
      read: raises any error.
      describe: () -> the name of what is read, for messages.
      seconds: how long to try.

    Raises:
      ReadFailed: the environment was at fault all the time.
      Exception: any other error of `read`, at once.
    """
    began: float | None = None
    pause = FIRST_PAUSE
    while True:
        try:
            result = read()
        except Exception as error:
            if isinstance(error, ReadFailed) or not is_environment_fault(error):
                raise
            now = time.monotonic()
            if began is None:
                began = now
            waited = now - began
            if waited >= seconds:
                raise ReadFailed(_final_message(describe(), error, waited)) from error
            _report(describe(), error, seconds)
            time.sleep(min(pause, seconds - waited))
            pause = min(2 * pause, LONGEST_PAUSE)
            continue
        if began is not None and time.monotonic() - began > 1:
            waited = time.monotonic() - began
            log.warning("%s is readable again, after %s", describe(), duration(waited))
        return result


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters; its type where it has none."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


def _final_message(name: str, error: Exception, waited: float) -> str:
    hint = ""
    if os.strerror(errno.EMFILE) in str(error):
        hint = "; raise the limit of open files (ulimit -n)"
    return (
        f"{name} could not be read for {waited:.0f} s: {first_line(error)}{hint}; this is a fault "
        "of the storage or of this machine, not of the file"
    )


def _report(name: str, error: Exception, seconds: float) -> None:
    """Warn about a fault, unless one of this kind was reported a short time ago."""
    number = number_of(error)
    kind = os.strerror(number) if number else type(error).__name__
    now = time.monotonic()
    if now - _reported.get(kind, -REPORT_EVERY) < REPORT_EVERY:
        return
    _reported[kind] = now
    log.warning(
        "cannot read %s: %s; trying again for %s (more of this kind is not reported)",
        name,
        first_line(error),
        duration(seconds),
    )
