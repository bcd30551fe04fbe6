"""What only the user can mend."""

import os
import sys


class UserError(ValueError):
    """A mistake in a flag, a config, a file or a folder: the message names it and says what to do."""


class Stuck(RuntimeError):
    """A data worker is dead or does not answer; running the same command again goes on."""


def fail(message, code=2):
    """Print one line to stderr and exit; 2 is for what only the user can mend."""
    print("error:", " ".join(str(message).split()), file=sys.stderr)
    if isinstance(
        message, Stuck
    ):  # threads that hang in a read would be waited for at exit, for ever
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
