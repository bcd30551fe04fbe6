"""Files of prepared datasets in buckets, copied to a local disk once and verified.

DIR/BUCKET/FOLDER/NAME is the copy of gs://BUCKET/FOLDER/NAME. A file has its name only once all its
bytes are there and have the checksum of the object; until then it is .NAME.GENERATION.part, from
whose end the next attempt goes on. The processes of a host share the copies: one makes them.
"""

import contextlib
import fcntl
import functools
import json
import logging
import os
import pathlib
import re
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent import futures

import google_crc32c

from lmim_jax.utils import atomic_io, buckets, faults
from lmim_jax.utils.errors import UserError
from lmim_jax.utils.logging import duration

log = logging.getLogger(__name__)

CHUNK = 16 << 20  # bytes of a request
COPIERS = 8  # files that are copied at a time
REPORT_SECONDS = 10.0  # between two lines on the progress
SHARD = re.compile(r"-\d{5,}-of-\d{5,}$")  # the end of the name of a file that holds records

# Names in the folder of the copies
LOCK = ".lock"
VERIFIED = ".verified.json"


class _Stopped(Exception):
    """Another file could not be copied."""


def stage(
    dataset: buckets.BucketPath, shards: Iterable[str], disk: buckets.Pathname
) -> pathlib.Path:
    """Copy files of a dataset to a local disk, unless they are there.

    A file that was verified before is read again only if it has been written to since.

    Args:
      dataset: its folder, with dataset_info.json.
      shards: names of the files with records that are needed; all others are copied.
      disk: the local folder for the copies of all datasets, DIR above.

    Returns:
      The folder of the copies.

    Raises:
      UserError: an object is missing, there is not enough space, a file cannot be read or written,
        or an object arrives with wrong bytes twice in a row.
      ReadFailed: the bucket could not be reached for minutes.
    """
    root = buckets.path(disk)
    if isinstance(root, buckets.BucketPath):
        raise UserError(f"config.data.stage={disk} must be a folder on a local disk")
    target = root / dataset.bucket / dataset.key
    try:
        needed = _select(dataset, set(shards))
        target.mkdir(parents=True, exist_ok=True)
        with _locked(target):
            _Copies(dataset, needed, target).make()
    except OSError as error:
        raise UserError(f"config.data.stage={disk}: {error}") from error
    return target


def _select(dataset: buckets.BucketPath, shards: set[str]) -> dict[str, buckets.ObjectFacts]:
    """{name: facts} of some shards, and of the other objects of a folder."""
    found = dataset.facts()
    missing = sorted(shards - found.keys())
    if missing:
        raise UserError(f"{dataset} lacks {len(missing)} files, such as {missing[0]}")
    needed = {}
    for name, facts in found.items():
        if name in shards or not ("/" in name or SHARD.search(name)):
            needed[name] = facts
    return needed


@contextlib.contextmanager
def _locked(target: pathlib.Path) -> Iterator[None]:
    """Hold the lock of a folder in a `with` block; it ends with the process."""
    with (target / LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for another process of this host, which copies to %s", target)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class _Copies:
    """The copies of a dataset, to be made by the process that holds the lock."""

    def __init__(
        self,
        dataset: buckets.BucketPath,
        needed: dict[str, buckets.ObjectFacts],
        target: pathlib.Path,
    ) -> None:
        """Copies that may exist in part; for the arguments, see `stage` and `_select`."""
        self.dataset = dataset
        self.needed = needed
        self.target = target
        self.verified = self._read_verified()
        self.num_done = 0  # bytes that were copied or read again
        self.mutex = threading.Lock()
        self.stopped = threading.Event()

    def make(self) -> None:
        """Copy what is missing, and read again what has not been verified."""
        names = []
        for name, facts in self.needed.items():
            if self.verified.get(name) != _mark(self.target / name, facts):
                names.append(name)
        if not names:
            log.info("%s: its %d files are in %s", self.dataset, len(self.needed), self.target)
            return
        self._check_space(names)
        began = time.monotonic()
        total = sum(self.needed[name].size for name in names)
        log.info(
            "copying %d files of %s to %s: %s", len(names), self.dataset, self.target, _size(total)
        )
        pool = futures.ThreadPoolExecutor(COPIERS)
        try:
            waiting = {pool.submit(self._bring, name) for name in names}
            while waiting:
                finished, waiting = futures.wait(waiting, REPORT_SECONDS, futures.FIRST_EXCEPTION)
                for future in finished:
                    future.result()
                if waiting:
                    self._report(total, time.monotonic() - began)
        finally:
            self.stopped.set()
            pool.shutdown(cancel_futures=True)
            atomic_io.write(self.target / VERIFIED, json.dumps(self.verified, indent=1))
        log.info("copied and verified in %s", duration(time.monotonic() - began))

    def _check_space(self, names: Iterable[str]) -> None:
        """Raise a UserError if the disk has less space than the missing bytes need."""
        missing = 0
        for name in names:
            there = _bytes_of(self.target / name) + _bytes_of(self._part(name))
            missing += max(0, self.needed[name].size - there)
        free = shutil.disk_usage(self.target).free
        if missing > free:
            raise UserError(
                f"config.data.stage: {self.dataset} needs {_size(missing)} more in {self.target}, "
                f"where {_size(free)} are free; give a folder on a larger disk, or leave it empty "
                "to read in place"
            )

    def _report(self, total: int, seconds: float) -> None:
        """Log the progress."""
        with self.mutex:
            done = self.num_done
        left = "unknown"
        if done:
            left = duration(seconds / done * (total - done))
        log.info(
            "  %s of %s (%.0f %%), %s/s, ETA %s",
            _size(done),
            _size(total),
            100 * done / max(total, 1),
            _size(done / seconds),
            left,
        )

    def _bring(self, name: str) -> None:
        """Verify a file, or copy it."""
        file = self.target / name
        facts = self.needed[name]
        if file.is_file():
            if _bytes_of(file) == facts.size and self._read(file) == facts.crc32c:
                self._note(name)
                return
            log.warning("%s does not have the bytes of the object: it is copied again", file)
            file.unlink()
        part = self._part(name)
        for other in self.target.glob(f".{name}.*.part"):
            if other != part:  # of an object that was replaced
                other.unlink()
        for _ in range(2):
            if self._fetch(name, part) == facts.crc32c:
                part.replace(file)
                atomic_io.flush_folder(self.target)
                self._note(name)
                return
            part.unlink()
            log.warning("%s: wrong bytes arrived: it is copied again", self.dataset / name)
        raise UserError(
            f"{self.dataset / name}: twice in a row, the bytes that arrived do not have its "
            "checksum (crc32c); if it was replaced meanwhile, start again"
        )

    def _fetch(self, name: str, part: pathlib.Path) -> int:
        """Append to a partial file what it lacks; the checksum of all its bytes."""
        source = self.dataset / name
        size = self.needed[name].size
        checksum = 0
        if part.exists():
            checksum = self._read(part)
        with part.open("ab") as file:
            while file.tell() < size:
                start = file.tell()
                stop = min(start + CHUNK, size)
                read = functools.partial(source.read_range, start, stop)
                data = faults.retry(read, source.__str__, faults.RETRY_SECONDS)
                if len(data) < stop - start:
                    break  # a shorter object has replaced it
                file.write(data)
                checksum = google_crc32c.extend(checksum, data)
                self._add(len(data))
            file.flush()
            os.fsync(file.fileno())
        return checksum

    def _read(self, file: pathlib.Path) -> int:
        """The checksum of a file."""
        checksum = 0
        with file.open("rb") as content:
            while data := content.read(CHUNK):
                checksum = google_crc32c.extend(checksum, data)
                self._add(len(data))
        return checksum

    def _add(self, num_bytes: int) -> None:
        """Count bytes; _Stopped if another thread has failed."""
        if self.stopped.is_set():
            raise _Stopped
        with self.mutex:
            self.num_done += num_bytes

    def _part(self, name: str) -> pathlib.Path:
        """The partial file."""
        return self.target / f".{name}.{self.needed[name].generation}.part"

    def _read_verified(self) -> dict[str, list[int]]:
        """{name: mark} of the files that were verified, as they were then."""
        try:
            return json.loads((self.target / VERIFIED).read_text())
        except (FileNotFoundError, ValueError):
            return {}

    def _note(self, name: str) -> None:
        """Remember that a file, as it is now, was verified."""
        with self.mutex:
            self.verified[name] = _mark(self.target / name, self.needed[name])


def _mark(file: pathlib.Path, facts: buckets.ObjectFacts) -> list[int]:
    """What changes when a file or its object is written to; [] without the file."""
    try:
        status = file.stat()
    except FileNotFoundError:
        return []
    return [facts.crc32c, status.st_size, status.st_ctime_ns]


def _bytes_of(file: pathlib.Path) -> int:
    """The size of a file, 0 if there is none."""
    return file.stat().st_size if file.is_file() else 0


def _size(num_bytes: float) -> str:
    """A size such as 1.2 GB."""
    for unit in ("bytes", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.1f} GB"
