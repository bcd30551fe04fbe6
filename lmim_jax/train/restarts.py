"""Restarts by launchers: counted in the run, and given up when they lead nowhere.

Launchers (launch/restart.py, launch/tpu_pod.sh, the JobSets of GKE) start a run again after an
error or a crash. They tell it so in two variables of the environment:

LMIM_RESTART    the number of the restart, from 1 on since the user's command; 0 or absent: none
LMIM_RESTARTS   how many restarts in a row may find the run at the same step

launch/restart.py counts the starts that end before they come here: LMIM_RESTART_MARK is the file by
which it knows of the others.

Every restart is a line in RUN/restarts.jsonl, written before anything that could fail: what has
made no progress counts although it never came to train.
"""

import contextlib
import datetime
import json
import logging
import pathlib
from collections.abc import Mapping
from typing import Any

from lmim_jax.train import checkpoint_manifest
from lmim_jax.utils import atomic_io, buckets
from lmim_jax.utils.errors import UserError

log = logging.getLogger(__name__)

NAME = "restarts.jsonl"
NUMBER = "LMIM_RESTART"
LIMIT = "LMIM_RESTARTS"
REASON = "LMIM_RESTART_REASON"  # how the start before has ended, if the launcher knows it
MARK = "LMIM_RESTART_MARK"


def check(workdir: buckets.Pathname, environment: Mapping[str, str], process: int) -> str:
    """Decide whether a restart by a launcher may go on, and record it.

    All processes find the same, each for itself: they may not be able to talk yet.

    Args:
      workdir: of the run.
      environment: such as os.environ.
      process: the number of this process; 0 writes the record.

    Returns:
      A line for the log; "" where the user has started the run.

    Raises:
      UserError: as many restarts as are allowed have started at the step where the run still is.
    """
    if environment.get(MARK):
        with contextlib.suppress(OSError):  # of another host, or not in this container
            pathlib.Path(environment[MARK]).touch()
    number = _number(environment, NUMBER)
    if not number:
        return ""
    step = checkpoint_manifest.newest_committed_step(workdir) or 0
    limit = _number(environment, LIMIT)
    idle = _without_progress(read(workdir), number, step)
    if limit and idle >= limit:
        raise UserError(
            f"{workdir} has no checkpoint after step {step}, after {idle} restart(s) in a row; the "
            "log says how they ended. Mend that, and run the same command again"
        )
    reason = environment.get(REASON, "")
    if process == 0:
        time = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        _append(workdir, {"time": time, "restart": number, "reason": reason, "step": step})
    line = f"restart {number} by the launcher at step {step}"
    if limit:
        line += f", {idle + 1} of {limit} without progress"
    if reason:
        line += f"; the start before {reason}"
    return line


def read(workdir: buckets.Pathname) -> list[dict[str, Any]]:
    """The records {"time", "restart", "reason", "step"} of all restarts of a run, oldest first."""
    path = buckets.path(workdir, NAME)
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:  # cut off
            log.warning("%s: a line cannot be read", path)
    return records


def _append(workdir: buckets.Pathname, record: dict[str, Any]) -> None:
    """Add a record; a full disk does not stop the run here."""
    path = buckets.path(workdir, NAME)
    try:
        lines = path.read_text().splitlines() if path.exists() else []
        lines.append(json.dumps(record))
        atomic_io.write(path, "\n".join(lines) + "\n")
    except OSError as error:
        log.warning("%s was not written: %s", path, error)


def _without_progress(records: list[dict[str, Any]], number: int, step: int) -> int:
    """How many restarts in a row before `number`, since the user's command, began at `step`.

    Those whose records could not be written count too.
    """
    following = number
    for record in reversed(records):
        if record["restart"] == following == number:
            continue  # this one, which process 0 has recorded already
        if record["restart"] >= following:
            break  # of a command before
        following = record["restart"]
        if record["step"] != step:
            return number - 1 - following
    return number - 1


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name) or "0"
    if not text.isdecimal():
        raise UserError(f"{name}={text} must be a number")
    return int(text)
