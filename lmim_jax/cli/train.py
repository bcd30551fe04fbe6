"""Train: python main.py --config=configs/vit_b.py --workdir=DIR [--config.KEY=VALUE ...]

Running the same command again goes on where it stopped. Only flags live here; the story is in lmim_jax/train/loop.py.
"""

import pathlib

from absl import flags
from ml_collections import config_flags

from lmim_jax.utils.errors import UserError, fail
from lmim_jax.utils.logging import log_to_console

RECIPES: dict[str, str | None] = {"config": "quickstart"}


def main(arguments):
    """Train as the flags say; one line, and exit code 2 for what only the user can mend, 1 for a run that diverged."""
    import jax  # neither this nor the rest for loader workers

    from lmim_jax.distributed import multihost, preemption
    from lmim_jax.train import checkpoints, loop, metric_logger, workdir

    given = flags.FLAGS
    recipe = pathlib.Path(config_flags.get_config_filename(given["config"])).stem
    folder = given.workdir or f"runs/{recipe}"
    try:
        workdir.pin_kernels(folder, given.config.deterministic)
        multihost.initialize(
            given.coordinator, given.num_processes, given.process_id, given.heartbeat
        )
        log_to_console()
        if arguments:
            raise UserError(
                f"unknown argument {arguments[0]!r}; flags look like --config.batch_size=256"
            )
        loop.train(given.config, folder)
    except (metric_logger.NonFinite, checkpoints.SaveFailed) as error:
        fail(error, 1)
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        told = str(error).splitlines()[0]
        fail(
            f"an operation over all processes failed; was one lost? The same command goes on. {told}",
            1,
        )
    except preemption.Preempted as error:
        fail(
            f"{error}; its state is saved, run the same command again to go on",
            preemption.EXIT_CODE,
        )


def define_flags():
    """Define the flags of the command."""
    config_flags.DEFINE_config_file(
        "config",
        None,
        "Recipe: its name or a file. Examples: --config=vit_b, --config=mine.py, --config.batch_size=256.",
        lock_config=True,
    )
    flags.DEFINE_string(
        "workdir",
        None,
        "Folder of the run; runs/RECIPE if not given. Example: --workdir=runs/vit_b",
    )
    flags.DEFINE_string(
        "coordinator",
        "",
        "Several processes: host and port of the first one; detected if not given. "
        "Example: --coordinator=10.0.0.2:8482",
    )
    flags.DEFINE_integer(
        "num_processes",
        0,
        "With --coordinator: the number of processes. Example: --num_processes=4",
    )
    flags.DEFINE_integer(
        "process_id",
        -1,
        "With --coordinator: the number of this process, from 0. Example: --process_id=0",
    )
    flags.DEFINE_integer(
        "heartbeat",
        30,
        "Seconds of silence after which a process counts as lost. Example: --heartbeat=60",
    )
