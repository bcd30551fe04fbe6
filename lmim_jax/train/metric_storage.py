"""Where a run's metrics are stored: lines of metrics.jsonl, TensorBoard's files.

In a local folder lines are appended. In a bucket nothing can be appended: the object is written
anew, in the background, at most every few seconds and whenever the state is saved.
"""

import atexit
import json
import logging
import math
import os
import pathlib
import shutil
import tempfile
import threading
import time

from lmim_jax.utils import atomic_io, buckets

log = logging.getLogger(__name__)

NAME = "metrics.jsonl"
BOARD_FOLDER = "tensorboard"
PAUSE = 5.0  # seconds between two uploads to a bucket, at least
SHARE = 0.05  # of the time that uploads may take
EXIT_TIMEOUT = 30.0  # seconds that a process waits at its end for the last upload


class LocalStorage:
    """Metrics in a local folder."""

    def __init__(self, workdir: pathlib.Path) -> None:
        """Open the storage of a run; nothing is written yet."""
        self._path = workdir / NAME
        self.board_folder = workdir / BOARD_FOLDER

    def keep_lines(self, last_step: int) -> list[str]:
        """Drop the lines of steps after `last_step`; return the others."""
        return _keep_lines(self._path, last_step)

    def append(self, lines: bytes) -> None:
        """Append all lines, or none of them.

        Raises:
          OSError: the disk is full, or another failure.
        """
        with self._path.open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                atomic_io.write_all(file, lines)
            except OSError:
                file.truncate(end)
                raise

    def flush(self) -> None:
        """Wait until the lines are on the disk, as those of a saved state have to be.

        Raises:
          OSError: they are not.
        """
        if self._path.exists():
            with self._path.open("rb") as file:
                os.fsync(file.fileno())

    def close(self) -> None:
        """Nothing: all is written."""


class BucketStorage:
    """Metrics in a bucket; the methods and attributes are those of LocalStorage."""

    def __init__(self, workdir: buckets.BucketPath) -> None:
        """Open the storage of a run; nothing is written yet."""
        self._path = workdir / NAME
        self._target = workdir / BOARD_FOLDER
        self._content = b""
        self._generation = b""  # of the object as this process wrote it
        self._uploaded = b""
        self._board_sizes: dict[str, int] = {}  # of what is uploaded
        self._failing = False
        self._mutex = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.board_folder = pathlib.Path(tempfile.mkdtemp(prefix="lmim_jax_board_"))
        atexit.register(self._flush_at_exit)

    def keep_lines(self, last_step: int) -> list[str]:
        """Drop the lines of steps after `last_step`; return the others."""
        lines = _keep_lines(self._path, last_step)
        content, self._generation = self._path.read_version()
        self._content = self._uploaded = content or b""
        return lines

    def append(self, lines: bytes) -> None:
        """Add lines to what is uploaded soon, or with the next `flush`."""
        self._content += lines
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._upload_regularly, daemon=True, name="metrics"
            )
            self._thread.start()

    def flush(self) -> None:
        """Upload all that is new.

        Raises:
          OSError: the bucket does not take it; or another run has written there.
        """
        with self._mutex:
            content = self._content
            if content != self._uploaded:
                self._write(content)
                self._uploaded = content
            for path in self.board_folder.iterdir():
                size = path.stat().st_size
                if self._board_sizes.get(path.name) != size:
                    (self._target / path.name).write_bytes(path.read_bytes())
                    self._board_sizes[path.name] = size

    def close(self) -> None:
        """Upload all that is new, and end; see `flush`."""
        self._stop.set()
        atexit.unregister(self._flush_at_exit)
        self.flush()
        shutil.rmtree(self.board_folder, ignore_errors=True)

    def _write(self, content: bytes) -> None:
        written = self._path.write_version(content, self._generation)
        if written is None:  # changed by others, or by this write, if its answer was lost
            existing, written = self._path.read_version()
            if existing != content:
                raise OSError(f"{self._path} was changed by another run")
        self._generation = written

    def _upload_regularly(self) -> None:
        pause = PAUSE
        stopping = False
        while not stopping:
            stopping = self._stop.wait(pause)
            start = time.monotonic()
            try:
                self.flush()
                self._failing = False
            except OSError as error:
                if not self._failing:
                    log.error("metrics are kept in memory, and written later: %s", error)
                self._failing = True
            pause = max(PAUSE, (time.monotonic() - start) / SHARE)

    def _flush_at_exit(self) -> None:
        """Upload the last lines of a run that has failed, if that is possible."""
        self._stop.set()
        if self._thread:
            self._thread.join(EXIT_TIMEOUT)
        shutil.rmtree(self.board_folder, ignore_errors=True)


def open_storage(workdir: buckets.Pathname) -> LocalStorage | BucketStorage:
    """The storage of a run's metrics."""
    path = buckets.path(workdir)
    if isinstance(path, buckets.BucketPath):
        return BucketStorage(path)
    return LocalStorage(path)


def _keep_lines(path: buckets.Path, last_step: int) -> list[str]:
    """Drop the lines of steps after `last_step`; return the others."""
    if not path.is_file():
        return []
    before = path.read_text()
    lines = [line for line in before.splitlines() if _step_of(line) <= last_step]
    after = "".join(line + "\n" for line in lines)
    if isinstance(path, pathlib.Path) and before.startswith(after):
        with path.open("r+b") as file:  # needs no space: the disk may be full
            file.truncate(len(after.encode()))
            os.fsync(file.fileno())
    elif after != before:
        atomic_io.write(path, after)
    return lines


def _step_of(line: str) -> float:
    """The step of a metrics line; infinite for a line cut off by a kill, so that it is dropped."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
