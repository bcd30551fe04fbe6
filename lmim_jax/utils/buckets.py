"""Folders in buckets: paths in Google Cloud Storage beside those of the file system.

`path` turns a string into either. A BucketPath has the part of pathlib's interface that run folders
use, and writes on condition. Objects are read and written by TensorStore, which never caches them;
listings come from gcsfs, without its cache, because TensorStore lists nothing where it is refused.

Credentials are Google's application default credentials. There are no folders: a folder exists
while an object begins with its name, and nothing below it can be renamed.
"""

import base64
import collections
import contextlib
import dataclasses
import errno
import fnmatch
import functools
import importlib.util
import logging
import os
import pathlib
import re
import shutil
import socket
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any, TypeAlias

from lmim_jax.utils.errors import UserError

SUPPORTED = "local folders and gs://BUCKET/FOLDER (Google Cloud Storage)"
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/")
CONNECTIONS = 3  # attempts to reach the storage
CONNECTION_TIMEOUT = 10.0  # seconds
CONNECTION_PAUSE = 2.0  # seconds between two attempts
# What TensorStore's and gcsfs' texts say -> (error number, advice)
REASONS = {
    r"\b404\b|bucket does not exist": (
        errno.ENOENT,
        "the bucket does not exist, or this account may not see it",
    ),
    r"\b401\b|UNAUTHENTICATED|Anonymous caller|Invalid Credentials": (
        errno.EACCES,
        "there are no credentials; run: gcloud auth application-default login",
    ),
    r"\b403\b|PERMISSION_DENIED|[Ff]orbidden": (
        errno.EACCES,
        "this account lacks a permission; runs need the role Storage Object User "
        "(roles/storage.objectUser)",
    ),
}


class BucketError(OSError):
    """A bucket refuses something: the message names it and what is lacking, in one line."""

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}"


class BucketUnreachable(BucketError):
    """The storage cannot be reached: no mistake of the user, and it may be possible again soon."""


@dataclasses.dataclass(frozen=True)
class ObjectFacts:
    """What a bucket says about an object.

    Attributes:
      size: bytes.
      crc32c: checksum of the content (Castagnoli's polynomial, RFC 9260, appendix B).
      generation: of the content; another one after each write.
    """

    size: int
    crc32c: int
    generation: str


class BucketPath:
    """An object or a folder in a bucket, such as gs://bucket/runs/vit_b. Immutable.

    All methods that reach the bucket may raise a BucketError.
    """

    def __init__(self, bucket: str, key: str = "") -> None:
        """A path of parts.

        Args:
          bucket: its name.
          key: the name of an object or a folder, without slashes at its ends.
        """
        self.bucket = bucket
        self.key = key

    def __str__(self) -> str:
        return f"gs://{self.bucket}/{self.key}".rstrip("/")

    def __repr__(self) -> str:
        return f"BucketPath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BucketPath) and str(self) == str(other)

    def __lt__(self, other: "BucketPath") -> bool:
        return str(self) < str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __truediv__(self, other: "str | os.PathLike[str]") -> "BucketPath":
        parts = [part for part in os.fspath(other).split("/") if part not in ("", ".")]
        if ".." in parts or os.fspath(other).startswith("/"):
            raise ValueError(f"{other} is not a path below {self}")
        key = "/".join([self.key, *parts])
        return BucketPath(self.bucket, key.strip("/"))

    @property
    def name(self) -> str:
        """The last part."""
        return self.key.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """The end of the name from its last point on."""
        return pathlib.PurePosixPath(self.name).suffix

    @property
    def stem(self) -> str:
        """The name without its suffix."""
        return pathlib.PurePosixPath(self.name).stem

    @property
    def parent(self) -> "BucketPath":
        """The folder; of a bucket, itself."""
        return BucketPath(self.bucket, self.key.rpartition("/")[0])

    def with_name(self, name: str) -> "BucketPath":
        """The path beside this one with another name."""
        return self.parent / name

    def relative_to(self, folder: "BucketPath") -> pathlib.PurePosixPath:
        """The path from a folder above."""
        return pathlib.PurePosixPath(str(self)).relative_to(str(folder))

    def absolute(self) -> "BucketPath":
        """The path itself."""
        return self

    def expanduser(self) -> "BucketPath":
        """The path itself."""
        return self

    def resolve(self) -> "BucketPath":
        """The path itself."""
        return self

    def mkdir(self, parents: bool = True, exist_ok: bool = True) -> None:
        """Nothing: there are no folders."""

    def exists(self) -> bool:
        """Whether it is an object or a folder."""
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        """Whether it is an object."""
        nothing = slice(0, 0)  # asks whether it exists, and reads nothing
        return self._wait(_store(self.bucket).read(self.key, byte_range=nothing)).state == "value"

    def is_dir(self) -> bool:
        """Whether the names of objects begin with it."""
        return bool(self.files())

    def read_bytes(self) -> bytes:
        """The content of the object.

        Raises:
          FileNotFoundError: there is none.
        """
        content, _ = self.read_version()
        if content is None:
            raise FileNotFoundError(errno.ENOENT, "there is no such object", str(self))
        return content

    def read_chunks(self, size: int, chunk: int) -> Iterator[bytes]:
        """The content of the object in pieces.

        Args:
          size: its bytes, as `files` tells them.
          chunk: bytes of a piece.
        """
        for start in range(0, size, chunk):
            yield self.read_range(start, min(start + chunk, size))

    def read_range(self, start: int, stop: int) -> bytes:
        """The bytes `start` .. `stop` of the object.

        Raises:
          FileNotFoundError: there is no such object.
        """
        part = slice(start, stop)
        found = self._wait(_store(self.bucket).read(self.key, byte_range=part))
        if found.state == "missing":
            raise FileNotFoundError(errno.ENOENT, "there is no such object", str(self))
        return found.value

    def read_text(self, errors: str = "strict") -> str:
        """The content of the object as text."""
        return self.read_bytes().decode(errors=errors)

    def write_bytes(self, content: bytes | memoryview) -> None:
        """Write the object, all of it or nothing."""
        self._wait(_store(self.bucket).write(self.key, bytes(content)))

    def write_text(self, content: str) -> None:
        """Write the object, all of it or nothing."""
        self.write_bytes(content.encode())

    def read_version(self) -> tuple[bytes | None, bytes]:
        """The content of the object, None where there is none, and its generation."""
        found = self._wait(_store(self.bucket).read(self.key))
        content = None if found.state == "missing" else found.value
        return content, found.stamp.generation

    def write_version(self, content: bytes | None, generation: bytes) -> bytes | None:
        """Write or delete the object, if its generation is still the given one.

        Args:
          content: None: delete the object.
          generation: as `read_version` returned it.

        Returns:
          The new generation; None where the object has another one. That may be our own: a write
          is sent again when its answer was lost.
        """
        write = _store(self.bucket).write(self.key, content, if_equal=generation)
        return self._wait(write).generation or None

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete the object."""
        if not missing_ok:
            self.read_bytes()
        self._wait(_store(self.bucket).write(self.key, None))

    def files(self) -> dict[str, int]:
        """{name from this folder on: bytes} of all objects below, sorted."""
        return {name: int(entry["size"]) for name, entry in self._entries().items()}

    def facts(self) -> dict[str, ObjectFacts]:
        """{name from this folder on: facts} of all objects below, sorted."""
        facts = {}
        for name, entry in self._entries().items():
            crc32c = int.from_bytes(base64.b64decode(entry["crc32c"]), "big")
            facts[name] = ObjectFacts(int(entry["size"]), crc32c, str(entry["generation"]))
        return facts

    def _entries(self) -> dict[str, dict[str, Any]]:
        """{name from this folder on: what gcsfs says} of all objects below, sorted."""
        prefix = f"{self.key}/" if self.key else ""
        _check_reachable(self.bucket)
        try:
            found = _file_system().find(f"{self.bucket}/{prefix}", detail=True)
        except FileNotFoundError as error:  # an empty folder is none
            raise _as_bucket_error(OSError("404"), self) from error
        except Exception as error:  # of gcsfs, aiohttp and google.auth
            raise _as_bucket_error(error, self) from error
        entries = {}
        for name, entry in sorted(found.items()):
            relative = name.removeprefix(f"{self.bucket}/{prefix}")
            if relative and not relative.endswith("/"):  # marks a folder in the console
                entries[relative] = entry
        return entries

    def iterdir(self) -> "Iterator[BucketPath]":
        """The objects and folders of this folder, sorted."""
        names = collections.Counter(name.partition("/")[0] for name in self.files())
        for name in sorted(names):
            yield self / name

    def _wait(self, future: Any) -> Any:
        """The result of an operation of TensorStore, with its errors as an OSError."""
        try:
            return future.result()
        except Exception as error:  # a ValueError for most of what may happen
            raise _as_bucket_error(error, self) from error


Path: TypeAlias = pathlib.Path | BucketPath
Pathname: TypeAlias = str | os.PathLike[str] | BucketPath


def path(first: Pathname, *others: str | os.PathLike[str]) -> Path:
    """A path in a bucket or in the file system.

    Args:
      first: such as gs://bucket/run, runs/vit_b or ~/runs/vit_b.
      *others: more parts, below it.

    Raises:
      UserError: another scheme than gs://; it says which ones are supported.
    """
    found = first if isinstance(first, BucketPath) else _parse(os.fspath(first))
    for other in others:
        found = found / os.fspath(other)
    return found


def local_path(text: Pathname) -> pathlib.Path:
    """A path in the file system, for what is read or written only there.

    Args:
      text: such as images or ~/images.

    Raises:
      UserError: it is in a bucket, or of another scheme.
    """
    found = path(text)
    if isinstance(found, BucketPath):
        raise UserError(
            f"{text} is in a bucket, and this must be in the file system; copy from and to buckets "
            "with: gcloud storage cp --recursive FROM TO"
        )
    return found


def _parse(text: str) -> Path:
    scheme = SCHEME.match(text)
    if not scheme:
        return pathlib.Path(text).expanduser()
    if not text.startswith("gs://"):
        raise UserError(f"{text} cannot be used; what is supported: {SUPPORTED}")
    bucket, _, key = text.removeprefix("gs://").partition("/")
    if not bucket:
        raise UserError(f"{text}: give a bucket, as in gs://BUCKET/FOLDER")
    _prepare_libraries(text)
    return BucketPath(bucket) / key.strip("/")


def _prepare_libraries(text: str) -> None:
    """Set up gcsfs, by which Orbax writes too, to ask the bucket each time."""
    if not importlib.util.find_spec("gcsfs"):
        raise UserError(f"{text}: buckets need gcsfs: pip install 'lmim_jax[gcs]'")
    # Parts that are not used, and tracebacks of errors that are raised as well
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    import fsspec
    import gcsfs.core

    for protocol in ("gs", "gcs"):
        # Its default class asks for the type of the bucket by gRPC, for which it needs one more
        # permission, and for some types does not use the interface that is tested here
        fsspec.register_implementation(protocol, gcsfs.core.GCSFileSystem, clobber=True)
        fsspec.config.conf.setdefault(protocol, {})["use_listings_cache"] = False


def matching(folder: Path, pattern: str) -> list[Path]:
    """The files and folders of a folder whose names match a pattern, sorted; [] without it."""
    found: list[Path] = []
    if isinstance(folder, pathlib.Path) and not folder.is_dir():
        return found
    for entry in folder.iterdir():
        if fnmatch.fnmatchcase(entry.name, pattern):
            found.append(entry)
    return sorted(found, key=str)


def file_sizes(folder: Path) -> dict[str, int]:
    """{name from a folder on: bytes} of all files below it; they may disappear meanwhile.

    Raises:
      OSError: a folder cannot be listed.
    """
    if isinstance(folder, BucketPath):
        return folder.files()
    sizes = {}
    for parent, _, names in os.walk(folder, onerror=_unless_gone):
        for name in names:
            file = pathlib.Path(parent, name)
            with contextlib.suppress(FileNotFoundError):
                sizes[file.relative_to(folder).as_posix()] = file.stat().st_size
    return dict(sorted(sizes.items()))


def _unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def remove_tree(folder: Path) -> None:
    """Delete a folder with all that is below it, if there is one.

    Raises:
      OSError: a bucket refuses it. Of a local folder, what can be deleted is deleted.
    """
    if not isinstance(folder, BucketPath):
        shutil.rmtree(folder, ignore_errors=True)
        return
    store = _store(folder.bucket)
    deletions = [store.write(f"{folder.key}/{name}", None) for name in folder.files()]
    for deletion in deletions:
        folder._wait(deletion)


def problem(where: Path) -> str:
    """What is lacking for listing a bucket; "" where nothing is, or where it is a local folder.

    Raises:
      BucketUnreachable: nothing can be said, as there is no network.
    """
    if isinstance(where, BucketPath):
        try:
            where.files()
        except BucketUnreachable:
            raise
        except OSError as error:
            return str(error)
    return ""


@contextlib.contextmanager
def local_file(file: Pathname) -> Iterator[pathlib.Path]:
    """A local file with the content of `file` in a `with` block, for libraries that read files."""
    source = path(file)
    if isinstance(source, pathlib.Path):
        yield source
        return
    with tempfile.TemporaryDirectory(prefix="lmim_jax_") as temporary:
        local = pathlib.Path(temporary, source.name)
        local.write_bytes(source.read_bytes())
        yield local


@contextlib.contextmanager
def local_folder(folder: Pathname) -> Iterator[pathlib.Path]:
    """A local folder to be filled in a `with` block, for libraries that write only files.

    Args:
      folder: if it is in a bucket, a temporary folder is uploaded to it in the end.
    """
    target = path(folder)
    if isinstance(target, pathlib.Path):
        target.mkdir(parents=True, exist_ok=True)
        yield target
        return
    with tempfile.TemporaryDirectory(prefix="lmim_jax_") as temporary:
        local = pathlib.Path(temporary)
        yield local
        for name in file_sizes(local):
            (target / name).write_bytes((local / name).read_bytes())


@functools.cache
def _store(bucket: str) -> Any:
    """TensorStore's key-value store of a bucket.

    Raises:
      BucketUnreachable: see `_check_reachable`.
    """
    import tensorstore

    _check_reachable(bucket)
    return tensorstore.KvStore.open({"driver": "gcs", "bucket": bucket, "path": ""}).result()


@functools.cache  # of a success
def _check_reachable(bucket: str) -> None:
    """Connect to the storage, once: without a network, libraries try for minutes.

    Raises:
      BucketUnreachable: it is not possible.
    """
    if urllib.request.getproxies():  # which connect instead
        return
    url = "https://storage.googleapis.com"
    for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
        url = os.environ.get(name) or url
    parts = urllib.parse.urlsplit(url if "//" in url else f"//{url}")
    port = parts.port or (80 if parts.scheme == "http" else 443)
    for attempt in range(CONNECTIONS):
        try:
            socket.create_connection((parts.hostname, port), CONNECTION_TIMEOUT).close()
        except OSError as error:
            failure = error
            if attempt + 1 < CONNECTIONS:
                time.sleep(CONNECTION_PAUSE)
        else:
            return
    raise BucketUnreachable(
        errno.ENETUNREACH,
        f"{parts.hostname} cannot be reached ({failure.strerror or failure}); is there a network?",
        f"gs://{bucket}",
    )


@functools.cache
def _file_system() -> Any:
    """The file system that Orbax uses too."""
    import fsspec

    return fsspec.filesystem("gs", finalize_on_close=True)


def _as_bucket_error(error: Exception, where: BucketPath) -> BucketError:
    """An error of a library as one that names the bucket and what is lacking."""
    text = " ".join(str(error).split()) or type(error).__name__
    for pattern, (number, advice) in REASONS.items():
        if re.search(pattern, text):
            return BucketError(number, f"bucket {where.bucket}: {advice}", str(where))
    return BucketError(errno.EIO, f"bucket {where.bucket}: {text[:200]}", str(where))
