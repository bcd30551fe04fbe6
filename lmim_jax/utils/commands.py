"""Commands that are printed for users: they run as they are, from where they are printed."""

import os
import pathlib
import shlex
import shutil
import sys
import sysconfig

# PATH of the shell that started a launcher, where that has activated an environment of its own
CALLER_PATH = "LMIM_CALLER_PATH"
PACKAGE = "lmim_jax.cli"


def line(*arguments: object) -> str:
    """A command of this package, such as "lmim report --workdir='my run'".

    Args:
      arguments: the command, its flags, and its positional arguments; none of them is quoted.
    """
    return shlex.join([*_program(), *map(str, arguments)])


def of_this_process() -> str:
    """The command that started this process.

    Of `python main.py` it is that of `lmim train`, which is the same.
    """
    name = pathlib.Path(sys.argv[0]).name
    arguments = sys.argv[1:]
    if name in ("lmim", "__main__.py"):  # the latter of python -m lmim_jax.cli
        return line(*arguments)
    if name == "main.py":
        return line("train", *arguments)
    return shlex.join([python(), *sys.argv])


def in_folder(folder: str, command: str) -> str:
    """The command, run in a folder; wherever it is typed."""
    return f"cd {shlex.quote(folder)} && {command}"


def python() -> str:
    """How the shell calls the interpreter of this process."""
    return called(pathlib.Path(sys.executable))


def called(program: pathlib.Path) -> str:
    """How the shell calls a program, which may not exist yet: by its name, or by its path."""
    path = os.environ.get(CALLER_PATH) or os.environ.get("PATH", os.defpath)
    found = shutil.which(program.name, path=path)
    if found is None and str(program.parent) in path.split(os.pathsep):
        return program.name
    if found is not None and pathlib.Path(found) == program:
        return program.name
    return str(program)


def _program() -> list[str]:
    """The words that call `lmim`; without it, this package by the interpreter."""
    script = pathlib.Path(sys.argv[0])
    if script.name != "lmim":
        script = pathlib.Path(sys.executable).with_name("lmim")
    if script.is_file():
        return [called(script.absolute())]
    words = [python(), "-m", PACKAGE]
    root = pathlib.Path(__file__).parents[2]
    if root != pathlib.Path(sysconfig.get_path("purelib")):  # a checkout
        words = ["env", f"PYTHONPATH={root}", *words]
    return words
