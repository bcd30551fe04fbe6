"""The console log."""

import logging

import absl.logging
import jax


def log_to_console():
    """Show the package's log on stderr, with the time; other libraries' only from warnings up."""
    absl.logging.set_verbosity(
        absl.logging.ERROR
    )  # Orbax tells of every file it writes, and warns of what is meant
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # and matplotlib of its fonts
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    package = logging.getLogger("lmim_jax")
    package.handlers, package.propagate = [handler], False
    package.setLevel(logging.WARNING if jax.process_index() else logging.INFO)


def duration(seconds):
    """3725 -> "1h02m", 125 -> "2m05s", 42 -> "42s"."""
    seconds = int(seconds)
    if seconds >= 3600:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 60}m{seconds % 60:02d}s" if seconds >= 60 else f"{seconds}s"
