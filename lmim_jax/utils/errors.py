"""Errors that are reported to the user without a traceback."""

import contextlib
import difflib
import os
import sys
import threading
from collections.abc import Iterable
from typing import NoReturn

EXIT_SECONDS = 20.0  # that a process has to end its threads, and to wait for other processes


class UserError(ValueError):
    """A mistake in a flag, a config, a file or a folder: the message names it and how to fix it."""


class DataLoaderTimeout(RuntimeError):
    """A data worker is dead or does not answer; running the same command again resumes."""


def did_you_mean(value: object, choices: Iterable[str]) -> str:
    """Build a hint for an error message: "; did you mean X?", or all choices if none is similar.

    Args:
      value: what was given.
      choices: what is valid.
    """
    known = sorted(choices)
    similar = difflib.get_close_matches(str(value), known, n=1)
    if similar:
        return f"; did you mean {similar[0]}?"
    return f" (choices: {', '.join(known)})"


def fail(message: object, code: int = 2, exit_seconds: float = EXIT_SECONDS) -> NoReturn:
    """Print an error in one line to stderr and exit.

    Args:
      message: an exception or a text.
      code: exit code; 2 is for mistakes of the user.
      exit_seconds: how long to wait for threads, some of which may hang in a read.
    """
    with contextlib.suppress(OSError):  # the terminal may be gone
        print("error:", " ".join(str(message).split()), file=sys.stderr, flush=True)
    if isinstance(message, DataLoaderTimeout):
        exit_now(code)
    # A normal exit waits for all threads
    late = threading.Timer(exit_seconds, exit_now, [code])
    late.daemon = True
    late.start()
    sys.exit(code)


def exit_now(code: int) -> NoReturn:
    """End the process without waiting for its threads."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)
