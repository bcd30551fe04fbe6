"""The lock of a run folder: one writer at a time.

The lock names its holder in its first line and counts heartbeats in its second. No clock is
compared: where the processes of the holder's machine cannot be seen from here, it lives if its
count changes while we look. A lock changes hands only from the content that was judged dead, so of
several processes that take it over one succeeds; a holder that was wrongly given up finds out at
its next heartbeat, and stops.
"""

import atexit
import contextlib
import datetime
import errno
import hashlib
import json
import logging
import os
import pathlib
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from lmim_jax.distributed import multihost
from lmim_jax.utils import atomic_io, buckets
from lmim_jax.utils.errors import UserError

log = logging.getLogger(__name__)

HEARTBEAT = 10.0  # seconds between two heartbeats
LOOK = 1.0  # seconds between two looks at the lock of another machine
LOOKS = 120  # without a change, after which its holder counts as dead
PASSING = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE}
BOOT_ID = "/proc/sys/kernel/random/boot_id"


class LockLost(RuntimeError):
    """Another run has taken the folder over: this one may write nothing more, and stops."""


class LockUnavailable(RuntimeError):
    """The folder cannot be written at the moment, as its disk is full or fails: try again later."""


class Lock:
    """The file or object workdir/lock, held by process 0 of a run. Use it in a `with` block."""

    def __init__(self, workdir: buckets.Pathname) -> None:
        """Acquire the lock; that of a dead run is taken over. All processes must call it.

        Raises:
          UserError: another run holds it; the message gives its host, PID and start. Or the folder
            cannot be written.
          LockUnavailable: the folder cannot be written at the moment.
        """
        self._workdir = workdir
        self._file = _open(buckets.path(workdir, "lock"))
        self._count = 0
        self._content = b""  # as last written
        self._held = False
        self._lost = False
        self._mutex = threading.Lock()
        self._stop = threading.Event()
        self._owner = {
            "host": socket.gethostname(),
            "machine": _machine(),
            "pid": os.getpid(),
            "start": process_start(os.getpid()),
            "since": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "token": secrets.token_hex(8),
        }
        multihost.decide(self._acquire)
        if self._held:
            threading.Thread(target=self._beat_regularly, daemon=True, name="lock").start()
            atexit.register(self.release)

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def raise_if_lost(self) -> None:
        """Raise LockLost if a heartbeat has found the lock in other hands."""
        if self._lost:
            raise LockLost(
                f"{self._workdir} was taken over by another run while this one did not answer; "
                "this one stops and writes nothing more there"
            )

    def confirm(self) -> None:
        """Check now that the lock is still ours, by a heartbeat; before anything is committed.

        Raises:
          LockLost: it is not.
          OSError: the folder cannot be read or written at the moment.
        """
        if self._held:
            self._beat()
            self.raise_if_lost()

    def release(self) -> None:
        """Release the lock."""
        self._stop.set()
        with self._mutex:
            if self._held and not self._lost:
                with contextlib.suppress(OSError):  # a dead lock is taken over later
                    self._file.remove(self._content)
            self._held = False

    def _acquire(self) -> None:
        try:
            self._wait_until_acquired()
            # In a bucket, it takes one more permission than the first time
            self._lost = not self._file.renew(self._next_content())
        except OSError as error:
            message = f"{self._workdir} cannot be written: {error}"
            if error.errno in PASSING:
                raise LockUnavailable(message) from error
            raise UserError(message) from error
        self._held = True

    def _wait_until_acquired(self) -> None:
        """Create the lock, or take it over once its holder is known to be dead."""
        watched = b""
        looks = 0  # at the same content
        while not self._file.create(self._next_content()):
            seen = self._file.read()
            if seen is None:  # released just now
                continue
            owner = _owner_of(seen)
            alive = _process_is_alive(owner)
            if seen != watched:
                if looks and owner and owner == _owner_of(watched):
                    alive = True
                watched = seen
                looks = 0
            looks += 1
            if alive:
                raise UserError(
                    f"{self._workdir} is being written by another run ({_describe(seen)}); stop "
                    "that run, or choose another --workdir"
                )
            if looks == 2 and alive is None:
                log.info(
                    "%s is locked by a run that cannot be seen from here (%s): waiting up to "
                    "%.0f s for a sign of life",
                    self._workdir,
                    _describe(seen),
                    LOOK * LOOKS,
                )
            is_dead = alive is False or looks > LOOKS
            if is_dead and self._file.take_over(seen, self._next_content(), looks > 2 * LOOKS):
                log.warning("taking over %s: its run is dead (%s)", self._workdir, _describe(seen))
                return
            time.sleep(LOOK)

    def _next_content(self) -> bytes:
        """The content of the next heartbeat; all have the same length."""
        self._count += 1
        self._content = f"{json.dumps(self._owner)}\n{self._count:012d}\n".encode()
        return self._content

    def _beat(self) -> None:
        """Change the mark, unless the lock is no longer ours.

        Raises:
          OSError: the folder is unavailable.
        """
        with self._mutex:
            if self._lost or not self._held:
                return
            self._lost = not self._file.renew(self._next_content())

    def _beat_regularly(self) -> None:
        while not self._stop.wait(HEARTBEAT):
            with contextlib.suppress(OSError):  # the folder may be unavailable for a while
                self._beat()


def _open(path: buckets.Path) -> "_LockFile | _LockObject":
    if isinstance(path, buckets.BucketPath):
        return _LockObject(path)
    return _LockFile(path)


class _LockFile:
    """A lock as a file. Only creation must be atomic: hard links are not needed."""

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path

    def read(self) -> bytes | None:
        """The content; None: there is no lock."""
        try:
            return self._path.read_bytes()
        except FileNotFoundError:
            return None

    def create(self, content: bytes) -> bool:
        """Create the lock; False where there is one."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = self._path.open("xb")
        except FileExistsError:
            return False
        try:
            with file:
                _flush(file, content)
        except OSError:
            self._path.unlink()
            raise
        return True

    def renew(self, content: bytes) -> bool:
        """Write a heartbeat; False where the lock has another holder than `content`.

        It is written in place: into the file that was read, even if another run replaces it now.
        """
        try:
            with self._path.open("r+b") as file:
                if _first_line(file.read()) != _first_line(content):
                    return False
                file.seek(0)
                _flush(file, content)
        except FileNotFoundError:
            if self._path.parent.is_dir():
                return False
            raise  # the whole folder is unavailable
        return True

    def take_over(self, dead: bytes, content: bytes, impatient: bool) -> bool:
        """Replace the lock of a dead run; False where it has changed, or another one takes it.

        Args:
          dead: its content.
          content: the new one.
          impatient: ignore that another one takes it: it must have died over it.
        """
        if impatient:
            self._claim_path(dead).unlink(missing_ok=True)
        with self._claim(dead) as claimed:
            if not claimed or self.read() != dead:
                return False
            atomic_io.write(self._path, content)
            return True

    def remove(self, content: bytes) -> None:
        """Remove the lock, unless it has another holder than `content`."""
        with self._claim(content) as claimed:
            if claimed and _first_line(self.read() or b"") == _first_line(content):
                self._path.unlink()

    @contextlib.contextmanager
    def _claim(self, content: bytes) -> Iterator[bool]:
        """Claim the right to replace or remove the lock of a run; False: another one has it."""
        path = self._claim_path(content)
        try:
            path.open("xb").close()
        except FileExistsError:
            yield False
            return
        try:
            yield True
        finally:
            path.unlink(missing_ok=True)

    def _claim_path(self, content: bytes) -> pathlib.Path:
        digest = hashlib.sha256(_first_line(content)).hexdigest()
        return self._path.with_name(f"lock.{digest[:16]}")


class _LockObject:
    """A lock as an object in a bucket, with the methods of _LockFile.

    Every write is bound to the generation of the object that was read or written before.
    """

    def __init__(self, path: buckets.BucketPath) -> None:
        self._path = path
        self._generation = b""  # of what was written last

    def read(self) -> bytes | None:
        content, _ = self._path.read_version()
        return content

    def create(self, content: bytes) -> bool:
        existing, generation = self._path.read_version()
        return existing is None and self._write(content, generation)

    def renew(self, content: bytes) -> bool:
        if self._write(content, self._generation):
            return True
        # An earlier heartbeat may have arrived though it was reported as failed
        existing, generation = self._path.read_version()
        is_ours = existing is not None and _first_line(existing) == _first_line(content)
        return is_ours and self._write(content, generation)

    def take_over(self, dead: bytes, content: bytes, impatient: bool) -> bool:
        del impatient
        existing, generation = self._path.read_version()
        return existing == dead and self._write(content, generation)

    def remove(self, content: bytes) -> None:
        del content
        self._path.write_version(None, self._generation)

    def _write(self, content: bytes, generation: bytes) -> bool:
        written = self._path.write_version(content, generation)
        if written is None:  # changed by others, or by this write, if its answer was lost
            existing, written = self._path.read_version()
            if existing != content:
                return False
        self._generation = written
        return True


def _flush(file: Any, content: bytes) -> None:
    """Write to a file and flush it to the disk or server."""
    file.write(content)
    file.flush()
    os.fsync(file.fileno())


def _first_line(content: bytes) -> bytes:
    """The holder, without the count."""
    return content.partition(b"\n")[0]


def _owner_of(content: bytes) -> dict[str, Any]:
    """The holder that a lock names; {} where it is cut off or not a lock."""
    try:
        owner = json.loads(_first_line(content))
        return owner if owner.keys() >= {"host", "pid", "start", "since"} else {}
    except (ValueError, AttributeError):
        return {}


def _describe(content: bytes) -> str:
    """The holder of a lock, for messages."""
    owner = _owner_of(content)
    if not owner:
        return "it does not name its holder"
    return f"host {owner['host']}, pid {owner['pid']}, since {owner['since']}"


def _machine() -> str | None:
    """What identifies the processes visible here: boot of the kernel and PID namespace.

    Returns:
      None where it is not known, or where /proc shows those of another PID namespace.
    """
    try:
        if str(pathlib.Path("/proc/self").readlink()) != str(os.getpid()):
            return None
        boot = pathlib.Path(BOOT_ID).read_text().strip()
        return f"{boot} {pathlib.Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return None


def _process_is_alive(owner: dict[str, Any]) -> bool | None:
    """Whether the process of a holder runs; None: it cannot be seen from here."""
    machine = _machine()
    if machine is None or owner.get("machine") != machine:
        return None
    return process_start(owner["pid"]) == owner["start"]


def process_start(pid: int) -> int | None:
    """When a process of this PID namespace started, in kernel ticks since boot.

    Returns:
      None where there is no such process, or no /proc.
    """
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    is_zombie = fields[0] == "Z"
    return None if is_zombie else int(fields[19])
