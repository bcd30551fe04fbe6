"""Records of finished runs: what a table is made of, small enough to keep beside the code.

The records of a run are a folder of text files: command.txt, summary.json, metrics.jsonl,
config.json, environment.json (versions, devices and the command of every start), and its log. They
name no folder of the machine that the run was trained on.
"""

import json
import pathlib
import sys
from collections.abc import Iterable

import lmim_jax
from lmim_jax.utils import atomic_io, buckets

COMMAND_FILE = "command.txt"  # of a run in a study: its command, to notice when the study changes
LOG_FILE = "log.txt"
FILES = (
    *("summary.json", "metrics.jsonl", "config.json", "environment.json"),
    *(LOG_FILE, COMMAND_FILE),  # the command last: with it, they are complete
)
PLACES = {"data.path": "DATA", "data.dir": "DATA", "data.cache": "CACHE"}


def keep(run: buckets.Path, records: buckets.Path, changes: Iterable[str]) -> None:
    """Copy what is small, with the names of folders replaced.

    Args:
      run: the workdir of a finished run.
      records: the folder to write.
      changes: "KEY=VALUE" of its recipe; those of PLACES name folders.
    """
    hidden = {str(run.absolute()): "RUN", str(run): "RUN", f"{sys.prefix}/bin/": ""}
    hidden |= _folders(changes)
    records.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        source = run / name
        if source.exists():
            atomic_io.write(records / name, _without(source.read_text(errors="replace"), hidden))


def hide_folders(text: str, changes: Iterable[str]) -> str:
    """A text with the names of folders replaced, as in records.

    Args:
      text: such as a command.
      changes: as for `keep`.
    """
    return _without(text, _folders(changes))


def _folders(changes: Iterable[str]) -> dict[str, str]:
    """{name: replacement} of the folders that changes name, and of home, sources and this one."""
    hidden = {}
    for change in changes:
        key, _, value = change.partition("=")
        if key in PLACES and value:
            hidden[str(pathlib.Path(value).expanduser().absolute())] = PLACES[key]
            hidden[value] = PLACES[key]
    sources = pathlib.Path(lmim_jax.__file__).parents[1]
    hidden |= {str(pathlib.Path.home()): "~", str(sources): ".", str(pathlib.Path.cwd()): "."}
    return hidden


def _without(text: str, hidden: dict[str, str]) -> str:
    """A text with folders replaced, long names first; not the root, which is in every name."""
    for folder in sorted(hidden, key=len, reverse=True):
        if folder.count("/") > folder.endswith("/"):
            escaped = json.dumps(folder)[1:-1]
            text = text.replace(escaped, hidden[folder]).replace(folder, hidden[folder])
    return text
