"""Runs one command: its flags, its help, and mistakes in one line instead of a traceback.

Every command is a module of this package with `RECIPES`, `define_flags()` and `main(arguments)`;
see `Command`.
"""

import functools
import importlib
import re
import sys
import textwrap
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import absl.app
from absl import flags
from flax.traverse_util import flatten_dict
from ml_collections import config_flags

from lmim_jax.distributed import multihost
from lmim_jax.utils import array_memory, descriptors, recipes
from lmim_jax.utils.buckets import BucketError, BucketUnreachable
from lmim_jax.utils.errors import DataLoaderTimeout, UserError, fail

HELP = ("--help", "-help", "-h", "--helpshort")
WIDTH = 100  # columns of the help
_OWN_FLAGS: dict[str, list[str]] = {}  # name of a command's module -> its flags


class Command(Protocol):
    """The interface of a command's module.

    Its docstring is the first part of its help: one line, then examples.
    """

    __name__: str
    __doc__: str | None
    # Flags that hold a config -> the default recipe; None: no default
    RECIPES: Mapping[str, str | None]

    def define_flags(self) -> None:
        """Define the flags of the command; each help text has one sentence and an example."""

    def main(self, arguments: list[str]) -> None:
        """Run the command with the values of its flags.

        Args:
          arguments: the positional arguments.
        """


def run(command: Command, argv: Sequence[str]) -> None:
    """Parse the flags of a command and call its `main`.

    Exits with one line on stderr: with code 2 for a mistake in the flags or a UserError, with
    code 1 if the data loader has stopped.

    Args:
      command: the module.
      argv: its name, then flags and positional arguments, as in `sys.argv`.
    """
    own = _define(command)
    if any(argument in HELP for argument in argv):
        print(help_text(command, own))
        sys.exit(0)

    def call(positional: list[str]) -> None:
        descriptors.raise_limit()
        try:
            command.main(positional[1:])
        except BucketUnreachable as error:
            fail(error, 1)
        except (UserError, BucketError) as error:
            fail(with_own_flags(command, str(error)))
        except DataLoaderTimeout as error:
            fail(error, 1)

    chosen = choose_recipes(command, argv)
    absl.app.run(call, argv=list(argv), flags_parser=functools.partial(parse_flags, chosen))


def keep_freed_memory() -> None:
    """See `array_memory.keep_freed`, for commands that compute on a CPU more than they decode."""
    if not (multihost.visible_gpus() or multihost.visible_tpu_chips()):
        array_memory.keep_freed()


def with_own_flags(command: Command, message: str) -> str:
    """A message with the flags that a command has in place of the options of a config.

    Args:
      command: the module; `FLAGS_OF_OPTIONS`, if it has it: {option, or start of options: flag}.
      message: of an error.
    """
    renamed: Mapping[str, str] = getattr(command, "FLAGS_OF_OPTIONS", {})
    for option, flag in renamed.items():
        message = re.sub(rf"(--)?\bconfig\.{re.escape(option)}", flag, message)
    return message


def choose_recipes(command: Command, argv: Sequence[str]) -> Mapping[str, str | None]:
    """`RECIPES` of a command, or its `RECIPES_OF_ARGUMENTS` if there are positional arguments.

    Args:
      command: the module, whose flags are defined.
      argv: its name, then flags and positional arguments.
    """
    of_arguments: Mapping[str, str | None] | None = getattr(command, "RECIPES_OF_ARGUMENTS", None)
    if of_arguments is not None and _has_arguments(argv, of_arguments):
        return of_arguments
    return command.RECIPES


def _has_arguments(argv: Sequence[str], default_recipes: Mapping[str, str | None]) -> bool:
    """Whether there are positional arguments among `argv`."""
    waiting = False  # for the value of a flag
    for number, argument in enumerate(argv[1:], 1):
        if waiting:
            waiting = False
            continue
        if argument == "--":
            return number + 1 < len(argv)
        if not argument.startswith("-"):
            return True
        name, equals, _ = argument.lstrip("-").partition("=")
        waiting = not equals and not _is_boolean(name, default_recipes)
    return False


def _is_boolean(name: str, default_recipes: Mapping[str, str | None]) -> bool:
    """Whether --NAME, a flag or an option of a default recipe, needs no value."""
    for known in (name, name.removeprefix("no")):
        if known in flags.FLAGS:
            return flags.FLAGS[known].boolean
        flag, _, option = known.partition(".")
        recipe = default_recipes.get(flag)
        if recipe is not None:
            config = importlib.import_module(f"lmim_jax.configs.{recipe}").get_config()
            return isinstance(flatten_dict(config.to_dict(), sep=".").get(option), bool)
    return False


def _define(command: Command) -> list[str]:
    """Define the flags of a command, once; their names, in order."""
    if command.__name__ not in _OWN_FLAGS:
        before = set(flags.FLAGS)
        command.define_flags()
        _OWN_FLAGS[command.__name__] = [name for name in flags.FLAGS if name not in before]
    return _OWN_FLAGS[command.__name__]


def parse_flags(default_recipes: Mapping[str, str | None], argv: Sequence[str]) -> list[str]:
    """absl's parser, with one line and exit code 2 instead of a traceback for a mistake.

    Args:
      default_recipes: `RECIPES` of the command.
      argv: its name, then flags and positional arguments.

    Returns:
      The name and the positional arguments.
    """
    try:
        return flags.FLAGS(_with_recipe_files(default_recipes, argv))
    except (flags.Error, UserError) as error:
        fail(_user_error(error))
    except (AttributeError, KeyError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        if any(frame.name in ("get_config", "exec_module") for frame in frames):
            raise  # a mistake in the code of a recipe, not in a flag
        fail(_unknown_key(error, argv))


def _with_recipe_files(default_recipes: Mapping[str, str | None], argv: Sequence[str]) -> list[str]:
    """`argv` with the files of recipes instead of their names, and with the default recipes.

    Raises:
      UserError: no such recipe.
    """
    arguments = []
    missing = dict(default_recipes)
    waiting = None  # the flag whose value comes as the next argument
    for argument in argv[1:]:
        name, equals, value = argument.lstrip("-").partition("=")
        if waiting is not None:
            argument = f"--{waiting}={_locate(waiting, argument)}"
            waiting = None
        elif argument.startswith("-") and name in default_recipes:
            missing.pop(name, None)
            if not equals:
                waiting = name
                continue
            argument = f"--{name}={_locate(name, value)}"
        arguments.append(argument)
    if waiting is not None:
        raise UserError(f"--{waiting} needs a value, such as --{waiting}=vit_b")
    defaults = []
    for name, recipe in missing.items():
        if recipe is not None:
            defaults.append(f"--{name}={_locate(name, recipe)}")
    return [argv[0], *defaults, *arguments]


def _locate(flag: str, recipe: str) -> str:
    try:
        return recipes.locate(recipe)
    except UserError as error:
        raise UserError(f"--{flag}={error}") from error


def _user_error(error: BaseException) -> BaseException:
    """The UserError of a recipe's `get_config`, which other libraries wrap; else `error`."""
    if isinstance(error, UserError):
        return error
    cause: BaseException | None = error
    found = error
    while cause is not None:
        if isinstance(cause, UserError):
            found = cause
        cause = cause.__cause__ or cause.__context__
    return found


def _former_evaluator(key: str) -> str:
    """A hint if a key is the name of an evaluator before version 0.2; else ""."""
    from lmim_jax.evaluators.base import FORMER_NAMES  # slow to import

    if key in FORMER_NAMES:
        return f"Since version 0.2 this evaluator is called {FORMER_NAMES[key]}"
    return ""


def _unknown_key(error: Exception, argv: Sequence[str]) -> str:
    """The message for a config key that does not exist, with the flag that names it."""
    reason: Any = error
    while isinstance(reason.args[0], Exception):  # ml_collections wraps its message
        reason = reason.args[0]
    key, _, hint = str(reason.args[0]).partition("\n")
    hint = _former_evaluator(key.strip("'")) or hint
    for argument in argv[1:]:
        name = argument.lstrip("-").partition("=")[0]
        if key.strip("'") in name.split("."):
            key = name
            break
    return f"unknown config key {key}. {hint or 'Every key is explained in configs/vit_b.py'}"


def help_text(command: Command, own: Sequence[str]) -> str:
    """The text of `lmim COMMAND --help`: the docstring of the module, and its flags.

    Args:
      command: the module.
      own: the names of its flags.
    """
    lines = [(command.__doc__ or "").strip(), "", "Flags:"]
    for name in own:
        flag: Any = flags.FLAGS[name]
        title = f"--{name}"
        if flag.boolean:
            title = f"--[no]{name}"
        default = flag.default
        if name in command.RECIPES:
            default = command.RECIPES[name]
        if default not in (None, "", []):
            if isinstance(default, list):
                default = ",".join(default)
            title += f" (default: {default})"
        lines.append(f"  {title}")
        text = " ".join(flag.help.split())
        lines.append(textwrap.indent(textwrap.fill(text, WIDTH - 6), " " * 6))
    return "\n".join(lines)


def define_recipe(name: str, text: str) -> None:
    """Define a flag that holds a config, and with it --NAME.KEY=VALUE for its keys.

    Args:
      name: of the flag, one of `RECIPES` of the command.
      text: its help, with an example.
    """
    config_flags.DEFINE_config_file(name, None, text, lock_config=True)


def define_workdir(text: str = "The folder of the run.") -> None:
    """Define --workdir, the flag that names a run in every command.

    Args:
      text: one sentence of help.
    """
    flags.DEFINE_string("workdir", None, f"{text} Example: --workdir=runs/quickstart")


def define_processes() -> None:
    """Define the flags of a command that runs as several processes."""
    flags.DEFINE_string(
        "coordinator",
        "",
        "Several processes: host and port of the first one; found from the environment by default. "
        "Example: --coordinator=10.0.0.2:8482",
    )
    flags.DEFINE_integer(
        "num_processes", 0, "With --coordinator: how many processes. Example: --num_processes=4"
    )
    flags.DEFINE_integer(
        "process_id",
        -1,
        "With --coordinator: which of them this is, counted from 0. Example: --process_id=0",
    )
    flags.DEFINE_list(
        "device_ids",
        [],
        "Several processes: which of the visible GPUs this one uses, counted from 0; by default "
        "its share of them under Slurm and Open MPI, and otherwise all. Example: --device_ids=0,1",
    )


def device_ids() -> list[int]:
    """The value of --device_ids.

    Raises:
      UserError: not numbers.
    """
    given = flags.FLAGS.device_ids
    if not all(number.isdecimal() for number in given):
        raise UserError(f"--device_ids={','.join(given)} must be numbers, such as --device_ids=0,1")
    return [int(number) for number in given]


def run_folder(arguments: Sequence[str]) -> str:
    """The run of --workdir, for a command without positional arguments.

    Args:
      arguments: the positional arguments.

    Raises:
      UserError: no run, or an argument.
    """
    no_arguments(arguments, "--workdir=RUN")
    if flags.FLAGS.workdir is None:
        raise UserError("give the run: --workdir=RUN")
    return flags.FLAGS.workdir


def run_and_arguments(arguments: Sequence[str], *names: str) -> tuple[str, list[str]]:
    """The run (of --workdir or the first positional argument) and the other positional arguments.

    Args:
      arguments: the positional arguments.
      names: what the others are called in the error message, such as "IMAGES".

    Raises:
      UserError: no run, two runs, or another number of arguments.
    """
    others = list(arguments)
    workdir = flags.FLAGS.workdir
    if workdir is None and len(others) == len(names) + 1:
        workdir = others.pop(0)
    if workdir is None or len(others) != len(names):
        raise UserError(f"give {' '.join(['--workdir=RUN', *names])}, and no other arguments")
    return workdir, others


def no_arguments(arguments: Sequence[str], example: str) -> None:
    """Raise a UserError for positional arguments where a command takes none.

    Args:
      arguments: the positional arguments.
      example: a flag, for the message.
    """
    if arguments:
        raise UserError(f"unknown argument {arguments[0]!r}; flags look like {example}")
