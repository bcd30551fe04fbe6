"""Train: python main.py --config=configs/vit_b.py --workdir=DIR [--config.KEY=VALUE ...]

Running the same command again goes on where it stopped. Only flags live here; the story is in lmim_jax/train.py.
"""

import itertools
import pathlib

from absl import app, flags
from ml_collections import config_flags

from lmim_jax.errors import UserError, fail

DEFAULT = "configs/quickstart.py"
_CONFIG = config_flags.DEFINE_config_file("config", None, f"Recipe; default: {DEFAULT}.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; default: runs/NAME_OF_THE_RECIPE.")
_COORDINATOR = flags.DEFINE_string("coordinator", "", "Several processes: host:port of the first (else: detected).")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", 0, "With --coordinator: how many processes there are.")
_PROCESS_ID = flags.DEFINE_integer("process_id", -1, "With --coordinator: which of them this is, from 0.")


def main(argv):
    """Train as the flags say; one line, and exit code 2 for what only the user can mend, 1 for a run that diverged."""
    from lmim_jax import checkpoint, distributed, metrics, preemption, train, workdir  # not for loader workers

    recipe = pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    folder = _WORKDIR.value or f"runs/{recipe}"
    try:
        workdir.pin_kernels(folder, _CONFIG.value.deterministic)
        distributed.initialize(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
        metrics.log_to_console()
        if len(argv) > 1:
            raise UserError(f"unknown argument {argv[1]!r}; flags look like --config.batch_size=256")
        train.train(_CONFIG.value, folder)
    except UserError as error:
        fail(error)
    except (metrics.NonFinite, checkpoint.SaveFailed) as error:
        fail(error, 1)
    except preemption.Preempted as error:
        fail(f"{error}; its state is saved, run the same command again to go on", preemption.EXIT_CODE)


def parse_flags(argv):
    """absl's parser, with one line and exit code 2 instead of a traceback on a mistake in the flags."""
    given = [argument.lstrip("-").partition("=") for argument in argv[1:]]
    pairs = itertools.pairwise([*given, ("", "", "")])
    paths = [value or following[0] for (name, _, value), following in pairs if name == "config"]
    if not paths:
        argv = [argv[0], f"--config={DEFAULT}", *argv[1:]]
    elif not pathlib.Path(paths[-1].partition(":")[0]).is_file():
        fail(f"--config={paths[-1]}: no such file; the recipes are in configs/")
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        fail(error)
    except (AttributeError, KeyError) as error:
        while isinstance(error.args[0], Exception):  # ml_collections wraps its message
            error = error.args[0]
        key, _, hint = str(error.args[0]).partition("\n")
        key = next((name for name, *_ in given if key.strip("'") in name.split(".")), key)
        fail(f"unknown config key {key}. {hint or 'Every key is in configs/vit_b.py'}")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
