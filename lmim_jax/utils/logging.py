"""The console log."""

import logging

import absl.logging
import jax


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


def duration(seconds: float) -> str:
    """Format a duration: 3725 -> "1h02m", 125 -> "2m05s", 42 -> "42s"."""
    seconds = int(seconds)
    if seconds >= 3600:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    if seconds >= 60:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds}s"
