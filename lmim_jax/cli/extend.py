"""Trains a run for longer than it was to, from its last checkpoint with the optimizer's state.

    lmim extend RUN --epochs=1600
    lmim extend RUN --epochs=1600 --schedule=restart

--schedule=continue: learning rate, weight decay and EMA momentum are from here on those of a run
that had the new length from the start, so that the learning rate of a finished run rises to where
the longer cosine is. --schedule=restart: they begin again, with a warm-up in proportion, and take
the added steps. The extension is stored in the run. Running the same command again resumes it.

A run whose length was given by --config.total_steps is extended by --total_steps.
"""

from absl import flags
from ml_collections import ConfigDict

from lmim_jax.cli import app, train
from lmim_jax.train import runs, workdir
from lmim_jax.utils import commands
from lmim_jax.utils.errors import UserError

RECIPES: dict[str, str | None] = {}


def main(arguments: list[str]) -> None:
    """Extend a run."""
    given = flags.FLAGS
    folder, _ = app.run_and_arguments(arguments)
    config = read_recipe(folder)
    lengths = {"epochs": given.epochs, "total_steps": given.total_steps}
    chosen = {key: value for key, value in lengths.items() if value is not None}
    if len(chosen) != 1:
        raise UserError("give the new length of the run: --epochs=N, or --total_steps=N")
    config.update(chosen)
    train.run(config, folder, given.schedule)


def read_recipe(folder: str) -> ConfigDict:
    """The recipe of a run.

    Raises:
      UserError: it is not a run.
    """
    stored = runs.read_config(folder)
    if "exported" in stored:
        command = commands.line("train", f"--config.init_from={folder}")
        raise UserError(f"{folder} is an exported model; {command} starts a run")
    stored.pop(workdir.IMAGES, None)
    return runs.with_tuples(stored)


def define_flags() -> None:
    """Define the flags of the command."""
    app.define_workdir("The run, if it is not the argument.")
    flags.DEFINE_integer("epochs", None, "The new number of epochs, in all. Example: --epochs=1600")
    flags.DEFINE_integer(
        "total_steps", None, "The new number of steps, in all. Example: --total_steps=500000"
    )
    train.define_schedule()
    train.define_processes()
