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

import jax

from lmim_jax.utils.errors import UserError

log = logging.getLogger(__name__)


HEARTBEAT = 20.0  # seconds between signs of life in the lock


STALE = 120.0  # seconds without one after which a writer on another host counts as dead


class Lock:
    """workdir/lock: who writes here, and a sign of life of it. To be used in a `with` block."""

    def __init__(self, workdir):
        """Take the lock.

        Raises:
          UserError: another process holds it; named with host, pid and since when. A dead one's lock is taken over.
        """
        self._path, self._held = pathlib.Path(workdir, "lock"), False
        if jax.process_index():
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._mine = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "start": _start_of(os.getpid()),
        }
        self._mine["since"] = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        while not self._take():
            holder = self._holder()
            if holder and self._alive(holder):
                raise UserError(
                    f"{workdir} is being written by another run (host {holder['host']}, pid {holder['pid']}, since "
                    f"{holder['since']}); stop that one, or choose another --workdir"
                )
            log.warning(
                "taking over %s: its holder is gone (%s)", self._path, holder or "unreadable"
            )
            self._path.rename(
                self._path.with_name(f"lock.stale.{os.getpid()}")
            )  # one of several takers wins
            self._path.with_name(f"lock.stale.{os.getpid()}").unlink()
        self._held = True
        self._stop = threading.Event()
        threading.Thread(target=self._beat, daemon=True, name="lock").start()
        atexit.register(self.release)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.release()

    def release(self):
        """Give the lock back."""
        if self._held:
            self._held = False
            self._stop.set()
            if self._holder() == self._mine:
                self._path.unlink(missing_ok=True)

    def _take(self):
        """Create the lock file, complete at once; False where there is one."""
        draft = self._path.with_name(f"lock.{os.getpid()}")
        draft.write_text(json.dumps(self._mine))
        try:
            os.link(draft, self._path)
        except FileExistsError:
            return False
        finally:
            draft.unlink()
        return True

    def _holder(self):
        """What the lock file says; {} where it is unreadable or gone."""
        try:
            holder = json.loads(self._path.read_text())
            return holder if holder.keys() >= self._mine.keys() else {}
        except (OSError, ValueError, AttributeError):
            return {}

    def _alive(self, holder):
        """Whether the holder still runs: by its process on this host, by its signs of life on others."""
        if holder["host"] == self._mine["host"]:
            return holder["start"] is not None and _start_of(holder["pid"]) == holder["start"]
        return time.time() - self._path.stat().st_mtime < STALE

    def _beat(self):
        while not self._stop.wait(HEARTBEAT):
            try:
                os.utime(self._path)
            except OSError:  # the folder may be gone for a while
                continue


def _start_of(pid):
    """When a process of this host started, in the kernel's ticks since boot; None where there is no such process."""
    if not pathlib.Path("/proc/self/stat").exists():  # macOS: the number alone must do
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
    return None if fields[0] == "Z" else int(fields[19])
