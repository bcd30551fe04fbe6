"""What only the user can mend."""

import difflib
import os
import sys
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in a flag, a config, a file or a folder: the message names it and says what to do."""


class DataLoaderTimeout(RuntimeError):
    """A data worker is dead or does not answer; running the same command again goes on."""


def did_you_mean(value: object, choices: Iterable[str]) -> str:
    """A hint for an error message: "; did you mean X?", or, where nothing is similar, all choices.

    Args:
      value: what was given.
      choices: what is valid.
    """
    known = sorted(choices)
    near = difflib.get_close_matches(str(value), known, n=1)
    if near:
        return f"; did you mean {near[0]}?"
    return f" (choices: {', '.join(known)})"


def fail(message, code=2):
    """Print one line to stderr and exit; 2 is for what only the user can mend."""
    print("error:", " ".join(str(message).split()), file=sys.stderr)
    if isinstance(
        message, DataLoaderTimeout
    ):  # threads that hang in a read would be waited for at exit, for ever
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
