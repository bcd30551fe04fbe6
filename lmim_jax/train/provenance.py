"""What a run was trained with: versions, devices and command of every start.

They are kept in RUN/environment.json.
"""

import datetime
import json
import logging
import pathlib
import platform
from collections.abc import Sequence
from typing import Any

import jax

from lmim_jax.distributed import multihost
from lmim_jax.utils import atomic_io, buckets, commands

log = logging.getLogger(__name__)

NAME = "environment.json"


def describe() -> dict[str, Any]:
    """This process: {"time", "command", "folder", "system", "devices", "processes", "versions"}.

    For "versions", see `multihost.versions`.
    """
    return {
        "time": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": commands.of_this_process(),
        "folder": str(pathlib.Path.cwd()),
        "system": platform.platform(),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        "versions": multihost.versions(),
    }


def read_starts(workdir: buckets.Pathname) -> list[dict[str, Any]]:
    """The records of all starts of a run, oldest first; empty where there are none.

    Raises:
      OSError: they cannot be read.
    """
    try:
        found = json.loads(buckets.path(workdir, NAME).read_text())
    except (FileNotFoundError, ValueError):
        return []
    return found if isinstance(found, list) else []


def record_start(workdir: buckets.Pathname, images: Sequence[str]) -> None:
    """Add a record of this start; a full disk does not stop the run here.

    Args:
      workdir: of the run.
      images: lines on what was found, see data/inventory.py.
    """
    if jax.process_index() != 0:
        return
    try:
        records = [*read_starts(workdir), {**describe(), "images": list(images)}]
        atomic_io.write(buckets.path(workdir, NAME), json.dumps(records, indent=2) + "\n")
    except OSError as error:
        log.warning("%s was not written: %s", NAME, error)
