"""Pretrains an encoder with a recipe, or resumes a run.

    lmim train --config=vit_b --config.data.path=IMAGES --workdir=RUN
    lmim train --config=quickstart --config.batch_size=64 --config.epochs=20

Running the same command again resumes the run. Exit codes: 2 for a mistake in flags or config, 1
if the run diverged or cannot save, 75 if it was interrupted and has saved its state.
"""

import logging
import pathlib

import jax
from absl import flags
from ml_collections import config_flags

from lmim_jax.cli import app
from lmim_jax.distributed import multihost, preemption
from lmim_jax.train import checkpoints, loop, metric_logger, workdir
from lmim_jax.utils.errors import fail
from lmim_jax.utils.logging import log_to_console

log = logging.getLogger("lmim_jax.cli.train")

RECIPES: dict[str, str | None] = {"config": "quickstart"}


def main(arguments: list[str]) -> None:
    """Train."""
    given = flags.FLAGS
    recipe = pathlib.Path(config_flags.get_config_filename(given["config"])).stem
    folder = given.workdir or f"runs/{recipe}"
    try:
        flags_of_xla = workdir.set_xla_flags(given.config, folder, given.coordinator)
        multihost.initialize(
            given.coordinator,
            given.num_processes,
            given.process_id,
            given.heartbeat,
            app.device_ids(),
        )
        log_to_console()
        for line in flags_of_xla:
            log.info(line)
        app.no_arguments(arguments, "--config.batch_size=256")
        loop.train(given.config, folder)
    except (metric_logger.NonFinite, checkpoints.SaveFailed) as error:
        fail(error, 1)
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        reason = str(error).splitlines()[0]
        fail(
            "an operation over all processes failed; was one lost? Run the same command again to "
            f"resume. {reason}",
            1,
        )
    except preemption.Preempted as error:
        fail(
            f"{error}; its state is saved, run the same command again to resume",
            preemption.EXIT_CODE,
        )


def define_flags() -> None:
    """Define the flags of the command."""
    app.define_recipe(
        "config",
        "The recipe: a name or a file. "
        "Examples: --config=vit_b, --config=mine.py, --config.batch_size=256",
    )
    flags.DEFINE_string(
        "workdir",
        None,
        "The folder of the run, by default runs/NAME_OF_THE_RECIPE. Example: --workdir=runs/vit_b",
    )
    app.define_processes()
    flags.DEFINE_integer(
        "heartbeat",
        30,
        "Seconds of silence after which a process counts as lost. Example: --heartbeat=60",
    )
