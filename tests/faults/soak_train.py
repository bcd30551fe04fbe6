"""main.py whose evaluations fail while FAULT_FILE says "evaluator"."""

import contextlib
import os
import pathlib
import sys

from lmim_jax.cli import __main__ as command
from lmim_jax.evaluators import base

original = base.Scheduled.run


def run(self, *arguments):
    """As in Scheduled, or without memory."""
    with contextlib.suppress(FileNotFoundError):
        if pathlib.Path(os.environ["FAULT_FILE"]).read_text() == "evaluator":
            raise MemoryError("injected")
    return original(self, *arguments)


if __name__ == "__main__":
    base.Scheduled.run = run
    command.main(["train", *sys.argv[1:]])
