"""The image files below a folder, listed in one walk and kept in little memory.

A name takes its own bytes, one more, and 4 bytes for its start (8 above 4 GiB of names), in memory
that worker processes share. Millions of files are the normal case.
"""

import array
import collections
import dataclasses
import itertools
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Int
from numpy.typing import DTypeLike

from lmim_jax.data import shared_array
from lmim_jax.data.decode import NPY_SUFFIX, SUFFIXES
from lmim_jax.utils.faults import ReadFailed

# Names of splits in public datasets: Train, testing, validation, val2017, test_images
SPLIT = re.compile(
    r"(train(ing)?|test(ing)?|val(id|idation)?|dev|eval(uation)?)([-_ ]?(\d+|set|data|images?))?",
    re.IGNORECASE,
)
CHUNK = 65_536  # names that are decoded at a time
END = b"\0"  # after each name; no file name contains it
ENCODING = ("utf-8", "surrogateescape")  # names may be no valid UTF-8, see PEP 383


class Names(Sequence[str]):
    """A read-only sequence of names; pickled as a reference.

    Args:
      text: uint8, the names, each with a 0 at its end.
      starts: uint32 or uint64 [N], where each name starts in `text`.
    """

    def __init__(self, text: shared_array.SharedArray, starts: shared_array.SharedArray):
        self._text = text
        self._starts = starts

    def __len__(self) -> int:
        return len(self._starts.array)

    def __getitem__(self, index):
        """A name, or a list of names for a slice."""
        if isinstance(index, slice):
            return [self._name(start) for start in self._starts.array[index].tolist()]
        return self._name(int(self._starts.array[index]))

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), CHUNK):
            yield from self[first : first + CHUNK]

    def _name(self, start: int) -> str:
        return self._text.bytes_until(END, start).decode(*ENCODING)

    def select(self, indices: Int[np.ndarray, " n"]) -> "Names":
        """Some of the names, in the order of `indices`."""
        return Names(self._text, shared_array.share(self._starts.array[indices]))


class NamesWriter:
    """Collects names for `Names`."""

    def __init__(self) -> None:
        self._text = shared_array.new_file()
        self._size = 0  # bytes of text so far
        self._starts = array.array("Q")

    def add(self, prefix: str, names: Sequence[str]) -> None:
        """Add names, each with a prefix."""
        if not names:
            return
        separator = END.decode() + prefix
        text = (prefix + separator.join(names)).encode(*ENCODING) + END
        ends = np.flatnonzero(np.frombuffer(text, np.uint8) == 0)
        starts = np.concatenate([[0], ends[:-1] + 1]) + self._size
        self._starts.frombytes(starts.astype(np.uint64).tobytes())
        self._text.write(text)
        self._size += len(text)

    def finish(self) -> Names:
        """All names; the writer ends."""
        dtype: DTypeLike = np.uint64
        if self._size < 2**32:
            dtype = np.uint32
        starts = np.frombuffer(self._starts, np.uint64).astype(dtype)
        with self._text:
            text = shared_array.SharedArray(self._text, np.uint8)
        return Names(text, shared_array.share(starts))


def share_names(names: Iterable[str]) -> Names:
    """Names, in the order given."""
    writer = NamesWriter()
    remaining = iter(names)
    while chunk := list(itertools.islice(remaining, CHUNK)):
        writer.add("", chunk)
    return writer.finish()


@dataclasses.dataclass(frozen=True)
class Listing:
    """What is below a folder; hidden files and folders are left out.

    Attributes:
      top: the folder.
      images: paths of the images, relative to it, with "/", sorted.
      others: paths of all other files, likewise.
      suffixes: {suffix in lower case, with its dot, or "": number of such files} of the others, the
        most frequent first.
      runs: (topmost folder, number of images) of the images in their order; the folder is "" for
        images directly in `top`. A folder with images occurs once, "" as often as they are
        interrupted.
      folders: names of all topmost folders, sorted.
      skipped_links: (path, target) of links to folders that are part of the listing already, or
        that contain the link.
      unreadable: paths of folders that this user may not list.
      split_like: paths of folders whose names are those of splits, such as Test or validation.
    """

    top: str
    images: Names
    others: Names
    suffixes: dict[str, int]
    runs: tuple[tuple[str, int], ...]
    folders: tuple[str, ...]
    skipped_links: tuple[tuple[str, str], ...]
    unreadable: tuple[str, ...]
    split_like: tuple[str, ...]

    @property
    def loose(self) -> int:
        """Number of images directly in the folder."""
        return sum(count for name, count in self.runs if not name)

    @property
    def classes(self) -> tuple[str, ...]:
        """The topmost folders that hold images, sorted."""
        return tuple(sorted(name for name, _ in self.runs if name))


def list_folder(top: str | os.PathLike) -> Listing:
    """List the files below a folder, at any depth.

    Links are followed. Each real folder is listed once, so that loops end: a link is skipped if it
    leads to a folder that contains it, that is listed by its own path, or that an earlier link led
    to.

    Raises:
      ReadFailed: a folder cannot be read, other than for lack of permission.
    """
    return _Walk(os.fspath(top)).run()


class _Walk:
    """The state of `list_folder`."""

    def __init__(self, top: str):
        self._top = top
        self._real_top = os.path.realpath(top)
        self._images = NamesWriter()
        self._others = NamesWriter()
        self._suffixes: collections.Counter[str] = collections.Counter()
        self._runs: list[tuple[str, int]] = []
        self._seen: set[tuple[int, int]] = set()  # device and inode of listed folders
        self._skipped: list[tuple[str, str]] = []
        self._unreadable: list[str] = []
        self._split_like: list[str] = []

    def run(self) -> Listing:
        """Visit the folders depth first, in the order of the sorted paths."""
        pending: list[tuple[str, list[str]]] = []  # what is to be visited, in reverse order
        pending += reversed(self._scan(""))
        folders = sorted(prefix[:-1] for prefix, names in pending if not names)
        while pending:
            prefix, names = pending.pop()
            if names:
                self._add(prefix, names)
                continue
            if SPLIT.fullmatch(prefix[:-1].rpartition("/")[2]):
                self._split_like.append(prefix[:-1])
            pending += reversed(self._scan(prefix))
        return Listing(
            top=self._top,
            images=self._images.finish(),
            others=self._others.finish(),
            suffixes=dict(self._suffixes.most_common()),
            runs=tuple(self._runs),
            folders=tuple(folders),
            skipped_links=tuple(self._skipped),
            unreadable=tuple(self._unreadable),
            split_like=tuple(self._split_like),
        )

    def _scan(self, prefix: str) -> list[tuple[str, list[str]]]:
        """What a folder holds, in order: (prefix, names of files) or (prefix of a folder, [])."""
        path = f"{self._top}/{prefix}"
        keys = []
        try:
            status = pathlib.Path(path).stat()
            if (status.st_dev, status.st_ino) in self._seen:  # a mount, or a link out of `top`
                self._skipped.append((prefix[:-1], os.path.realpath(path)))
                return []
            self._seen.add((status.st_dev, status.st_ino))
            with os.scandir(path) as entries:
                for entry in entries:
                    name = entry.name
                    if name[0] == ".":
                        continue
                    if not _is_folder(entry):
                        keys.append(name)
                    elif not entry.is_symlink() or self._is_new_target(prefix + name):
                        keys.append(f"{name}/")  # sorts like the paths below it
        except PermissionError:
            self._unreadable.append(prefix[:-1] or self._top)
            return []
        except OSError as error:
            raise ReadFailed(f"{path}: this folder cannot be listed ({error.strerror})") from error
        keys.sort()
        parts: list[tuple[str, list[str]]] = []
        for is_folder, group in itertools.groupby(keys, key=_ends_with_slash):
            if is_folder:
                parts += [(prefix + key, []) for key in group]
            else:
                parts.append((prefix, list(group)))
        return parts

    def _is_new_target(self, link: str) -> bool:
        """Whether a link to a folder is to be followed; if not, it is noted."""
        target = os.path.realpath(f"{self._top}/{link}")
        contains_top = os.path.commonpath([target, self._real_top]) == target
        # Neither outside ("..") nor hidden
        relative = os.path.relpath(target, self._real_top)
        listed = not any(part.startswith(".") for part in relative.split("/"))
        if contains_top or listed:
            self._skipped.append((link, target))
            return False
        return True

    def _add(self, prefix: str, names: list[str]) -> None:
        """Add the files of a folder: arrays are images only where there are no others."""
        images = [name for name in names if name.lower().endswith(SUFFIXES)]
        if not all(name.lower().endswith(NPY_SUFFIX) for name in images):
            images = [name for name in images if not name.lower().endswith(NPY_SUFFIX)]
        self._images.add(prefix, images)
        if images:
            self._count(prefix.partition("/")[0], len(images))
        if len(images) == len(names):
            return
        taken = set(images)
        others = [name for name in names if name not in taken]
        self._others.add(prefix, others)
        self._suffixes.update(_suffix(name) for name in others)

    def _count(self, folder: str, count: int) -> None:
        """Add images to the last run, or begin a new one."""
        if self._runs and self._runs[-1][0] == folder:
            count += self._runs.pop()[1]
        self._runs.append((folder, count))


def _is_folder(entry: os.DirEntry) -> bool:
    """Whether an entry is a folder or a link to one; False for links that lead nowhere."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _suffix(name: str) -> str:
    """The suffix of a name in lower case, with its dot; "": none."""
    _, dot, end = name.rpartition(".")
    if not dot:
        return ""
    return f".{end.lower()}"


def _ends_with_slash(key: str) -> bool:
    return key.endswith("/")
