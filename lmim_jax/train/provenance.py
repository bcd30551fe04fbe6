"""On what a run is trained: versions, devices and command of every start, kept in RUN/environment.json."""

import datetime
import json
import logging
import pathlib
import platform
import shlex
import sys

import jax

from lmim_jax.distributed import multihost
from lmim_jax.utils import atomic_io

log = logging.getLogger(__name__)

NAME = "environment.json"


def describe():
    """This process: {"time", "command", "system", "devices", "processes", "versions"}, see `distributed.versions`."""
    return {
        "time": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "system": platform.platform(),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        "versions": multihost.versions(),
    }


def starts(workdir):
    """What was noted at every start of a run, oldest first; [] where nothing was."""
    try:
        found = json.loads(pathlib.Path(workdir, NAME).read_text())
    except (OSError, ValueError):
        return []
    return found if isinstance(found, list) else []


def note(workdir):
    """Add this start to the run's; a full disk must not stop a run here."""
    if jax.process_index() == 0:
        try:
            atomic_io.write(
                pathlib.Path(workdir, NAME),
                json.dumps([*starts(workdir), describe()], indent=2) + "\n",
            )
        except OSError as error:
            log.warning("%s was not written: %s", NAME, error)
