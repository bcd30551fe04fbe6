"""What main.py and the tools share as commands: one line and an exit code for every mistake, instead of a traceback."""

import itertools
import pathlib

from absl import app, flags

from lmim_jax.utils.errors import DataLoaderTimeout, UserError, fail


def run(main, default_config=None, **defaults):
    """Parse the flags and call `main(argv)`.

    Args:
      default_config: the recipe where `--config` is not given; None: a command without a recipe.
      defaults: files of more flags that are configs, by name.

    Exits with one line on stderr: 2 for a mistake in the flags, and for a UserError; 1 where the data do not come.
    """

    def reporting(argv):
        try:
            return main(argv)
        except UserError as error:
            fail(error)
        except DataLoaderTimeout as error:
            fail(error, 1)

    app.run(reporting, flags_parser=lambda argv: parse_flags(argv, default_config, **defaults))


def parse_flags(argv, default_config, **defaults):
    """absl's parser, with one line and exit code 2 instead of a traceback on a mistake in the flags."""
    given = [argument.lstrip("-").partition("=") for argument in argv[1:]]
    pairs = itertools.pairwise([*given, ("", "", "")])
    configs = {"config": default_config, "compare": None, **defaults}
    recipes = {name: value or after[0] for (name, _, value), after in pairs if name in configs}
    missing = {name: path for name, path in configs.items() if path and name not in recipes}
    argv = [argv[0], *(f"--{name}={path}" for name, path in missing.items()), *argv[1:]]
    for name, path in {**recipes, **missing}.items():
        if not pathlib.Path(path.partition(":")[0]).is_file():
            fail(f"--{name}={path}: no such file; the recipes are in configs/")
    try:
        return flags.FLAGS(argv)
    except (flags.Error, UserError) as error:
        fail(error)
    except (AttributeError, KeyError) as error:
        while isinstance(error.args[0], Exception):  # ml_collections wraps its message
            error = error.args[0]
        key, _, hint = str(error.args[0]).partition("\n")
        key = next((name for name, *_ in given if key.strip("'") in name.split(".")), key)
        fail(f"unknown config key {key}. {hint or 'Every key is in configs/vit_b.py'}")
