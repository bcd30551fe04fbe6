"""The console log."""

import functools
import logging
from collections.abc import Iterable

import absl.logging
import jax

LINE_WIDTH = 120  # columns of a line of metrics on the console
_TIME_WIDTH = len("00:00:00 ")


def log_to_console() -> None:
    """Show the package's log on stderr with the time; of other libraries, only problems."""
    # Orbax logs every file that it writes, and warns about what is intended.
    absl.logging.set_verbosity(absl.logging.ERROR)
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    package = logging.getLogger("lmim_jax")
    package.handlers = [handler]
    package.propagate = False
    package.setLevel(logging.WARNING if jax.process_index() else logging.INFO)


@functools.cache
def log_once(logger: logging.Logger, message: str) -> None:
    """Log what would be the same at every evaluation, the first time only."""
    logger.info(message)


def duration(seconds: float) -> str:
    """Format a duration: 3725 -> "1h02m", 125 -> "2m05s", 42 -> "42s"."""
    seconds = int(seconds)
    if seconds >= 3600:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    if seconds >= 60:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds}s"


def fill_lines(parts: Iterable[str], first: str = "", indent: str = "    ") -> list[str]:
    """Distribute parts of a message over lines that fit on the console beside the time.

    Args:
      parts: none of them is divided; two spaces separate them.
      first: the start of the first line.
      indent: the start of each other line; of the first one too if `first` is empty.
    """
    lines = []
    line = first or indent
    for part in parts:
        separator = "  " if line.strip() else ""
        if separator and len(line + separator + part) > LINE_WIDTH - _TIME_WIDTH:
            lines.append(line)
            line = indent
            separator = ""
        line += separator + part
    if line.strip():
        lines.append(line)
    return lines
