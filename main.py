"""Train: python main.py --config=configs/vit_b.py --workdir=DIR [--config.KEY=VALUE ...]

Running the same command again goes on where it stopped. Only flags live here; the story is in lmim_jax/train.py.
"""

import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file(
    "config", "configs/quickstart.py", "Recipe, a file that defines get_config().", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; default: runs/NAME_OF_THE_RECIPE.")


def main(argv):
    """Train as the flags say; exit code 2 and one line on what only the user can mend."""
    from lmim_jax.errors import UserError

    logging.set_verbosity(logging.INFO)
    recipe = pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    try:
        if len(argv) > 1:
            raise UserError(f"unknown argument {argv[1]!r}; flags look like --config.batch_size=256")
        from lmim_jax import train

        train.train(_CONFIG.value, _WORKDIR.value or f"runs/{recipe}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def parse_flags(argv):
    """absl's parser, with one line and exit code 2 instead of a traceback on a mistake in the flags or the recipe."""
    try:
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
