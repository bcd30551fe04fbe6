"""What only the user can mend."""

import sys


class UserError(ValueError):
    """A mistake in a flag, a config, a file or a folder: the message names it and says what to do."""


def fail(message, code=2):
    """Print one line to stderr and exit; 2 is for what only the user can mend."""
    print("error:", " ".join(str(message).split()), file=sys.stderr)
    sys.exit(code)
