"""The lock of a run folder: one writer at a time."""

import atexit
import datetime
import json
import logging
import os
import pathlib
import socket
import threading
import time
from typing import Any

import jax

from lmim_jax.utils.errors import UserError

log = logging.getLogger(__name__)

HEARTBEAT = 20.0  # seconds between updates of the lock file's modification time
STALE = 120.0  # seconds without an update after which a writer on another host counts as dead


class Lock:
    """The file workdir/lock, which names the process that writes here. Use it in a `with` block."""

    def __init__(self, workdir: str | os.PathLike[str]) -> None:
        """Acquire the lock; that of a dead process is taken over.

        Raises:
          UserError: another process holds it; the message gives its host, PID and start.
        """
        self._path = pathlib.Path(workdir, "lock")
        self._held = False
        if jax.process_index() != 0:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._owner = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "start": process_start(os.getpid()),
            "since": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        }
        while not self._create():
            holder = self._read_holder()
            if holder and self._is_alive(holder):
                raise UserError(
                    f"{workdir} is being written by another run (host {holder['host']}, pid "
                    f"{holder['pid']}, since {holder['since']}); stop that run, or choose another "
                    "--workdir"
                )
            who = holder or "unreadable"
            log.warning("taking over %s: its process no longer runs (%s)", self._path, who)
            stale = self._path.with_name(f"lock.stale.{os.getpid()}")
            self._path.rename(stale)  # of several processes that take it over, one succeeds
            stale.unlink()
        self._held = True
        self._stop = threading.Event()
        threading.Thread(target=self._update_regularly, daemon=True, name="lock").start()
        atexit.register(self.release)

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Release the lock."""
        if not self._held:
            return
        self._held = False
        self._stop.set()
        if self._read_holder() == self._owner:
            self._path.unlink(missing_ok=True)

    def _create(self) -> bool:
        """Create the complete lock file atomically; False where one exists."""
        draft = self._path.with_name(f"lock.{os.getpid()}")
        draft.write_text(json.dumps(self._owner))
        try:
            os.link(draft, self._path)
        except FileExistsError:
            return False
        finally:
            draft.unlink()
        return True

    def _read_holder(self) -> dict[str, Any]:
        """The contents of the lock file; {} where it is unreadable or missing."""
        try:
            holder = json.loads(self._path.read_text())
            return holder if holder.keys() >= self._owner.keys() else {}
        except (OSError, ValueError, AttributeError):
            return {}

    def _is_alive(self, holder: dict[str, Any]) -> bool:
        """Whether the holder runs: by its process on this host, by the file's age on others."""
        if holder["host"] == self._owner["host"]:
            return holder["start"] is not None and process_start(holder["pid"]) == holder["start"]
        return time.time() - self._path.stat().st_mtime < STALE

    def _update_regularly(self) -> None:
        while not self._stop.wait(HEARTBEAT):
            try:
                os.utime(self._path)
            except OSError:  # the folder may be unavailable for a while
                continue


def process_start(pid: int) -> int | None:
    """When a process of this host started, in kernel ticks since boot.

    Returns:
      None where there is no such process. 0 on systems without /proc (macOS), where only the PID
      can be compared.
    """
    if not pathlib.Path("/proc/self/stat").exists():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return 0
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    is_zombie = fields[0] == "Z"
    return None if is_zombie else int(fields[19])
