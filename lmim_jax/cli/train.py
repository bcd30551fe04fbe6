"""Train: python main.py --config=configs/vit_b.py --workdir=DIR [--config.KEY=VALUE ...]

Running the same command again goes on where it stopped. Only flags live here; the story is in lmim_jax/train/loop.py.
"""

import pathlib

from absl import flags
from ml_collections import config_flags

from lmim_jax.cli import app
from lmim_jax.utils.errors import UserError, fail
from lmim_jax.utils.logging import log_to_console

DEFAULT = "configs/quickstart.py"
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, f"Recipe; default: {DEFAULT}.", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; default: runs/NAME_OF_THE_RECIPE."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", "", "Several processes: host:port of the first (else: detected)."
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", 0, "With --coordinator: how many processes there are."
)
_PROCESS_ID = flags.DEFINE_integer(
    "process_id", -1, "With --coordinator: which of them this is, from 0."
)
_HEARTBEAT = flags.DEFINE_integer(
    "heartbeat", 30, "Seconds of silence after which a process counts as lost."
)


def main(argv):
    """Train as the flags say; one line, and exit code 2 for what only the user can mend, 1 for a run that diverged."""
    import jax  # neither this nor the rest for loader workers

    from lmim_jax.distributed import multihost, preemption
    from lmim_jax.train import checkpoints, loop, metric_logger, workdir

    recipe = pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    folder = _WORKDIR.value or f"runs/{recipe}"
    try:
        workdir.pin_kernels(folder, _CONFIG.value.deterministic)
        multihost.initialize(
            _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, _HEARTBEAT.value
        )
        log_to_console()
        if len(argv) > 1:
            raise UserError(
                f"unknown argument {argv[1]!r}; flags look like --config.batch_size=256"
            )
        loop.train(_CONFIG.value, folder)
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


def run():
    """Parse the flags and train."""
    app.run(main, DEFAULT)


if __name__ == "__main__":
    run()
