"""Images inside other files (tar, zip, parquet), or in a list, as a source for `tfds_writer`.

The files are looked through once, for names, places and labels; the images are read from their
places when they are written. Neither unpacks a file to disk or holds it in memory.
"""

import abc
import collections
import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from lmim_jax.data.folder_listing import Names, NamesWriter
from lmim_jax.data.shared_array import SharedArray, share
from lmim_jax.utils import faults
from lmim_jax.utils.checksum import names_checksum

TRAIN = "train"
SPLITS = (TRAIN, "test", "val", "validation")  # their order
NO_LABEL = "none"  # --label of images that have labels, to leave them out
NO_CLASS = -1
UNLABELED = "-1"  # the label of images without a class in many datasets


@dataclasses.dataclass(frozen=True)
class Part:
    """What one file holds.

    Attributes:
      path: of the file.
      names: of the images, in order.
      places: int64, where each image is; what that means is up to the source.
      sizes: int64, bytes of each image; 0: unknown.
      labels: the class of each image as text; None: it has none.
      left_out: {why: how many samples are no images, or are not used}.
    """

    path: str
    names: Sequence[str]
    places: Int[np.ndarray, " n"]
    sizes: Int[np.ndarray, " n"]
    labels: Sequence[str | None]
    left_out: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class PackedSource(abc.ABC):
    """Images inside files; see `sources.Source`. Subclasses read them.

    Attributes:
      paths: the files, in order.
      starts: int64, the number of the first image of each file.
      files: names of the images, which are stored with them.
      labels: int32, the class of each image, -1: none; None: unlabeled.
      classes: names of the classes.
      places: int64, see `Part`.
      sizes: int64, see `Part`.
    """

    paths: tuple[str, ...]
    starts: SharedArray
    files: Names
    labels: SharedArray | None
    classes: tuple[str, ...]
    places: SharedArray
    sizes: SharedArray

    def __len__(self) -> int:
        return len(self.files)

    @abc.abstractmethod
    def read(self, path: str, index: int) -> bytes:
        """The encoded bytes of an image in one of the files.

        Raises:
          BadImage: there are none.
          UserError: the file is damaged.
          OSError: it cannot be read.
        """

    def record(self, index: int) -> tuple[bytes, int]:
        """(encoded bytes, class) of an image; see `read` for what it raises."""
        label = NO_CLASS
        if self.labels is not None:
            label = int(self.labels.array[index])
        path = self._path(index)
        try:
            return self.read(path, index), label
        except (FileNotFoundError, PermissionError) as error:
            faults.check_file_system(error, path, self._others(index))
            raise

    def _others(self, index: int) -> list[str]:
        """The full paths of a few files, far from that of an image."""
        return [str(self._path(place)) for place in {0, len(self) - 1} - {index}]

    def mask(self, index: int) -> None:
        """None: there are no masks."""
        return None

    @property
    def targets(self) -> None:
        """None: there are no labels other than classes."""
        return None

    def name(self, index: int) -> str:
        """The path of the file, and the name of the image in it."""
        return f"{self._path(index)}/{self.files[index]}"

    def num_bytes(self) -> int:
        """The bytes of all images."""
        return int(np.maximum(self.sizes.array, 0).sum())

    def identity(self) -> dict[str, Any]:
        """The number of images, and checksums of their names, places and labels."""
        digest = hashlib.sha256(self.places.array.tobytes() + self.sizes.array.tobytes())
        if self.labels is not None:
            digest.update(self.labels.array.tobytes())
        return {
            "source": type(self).__name__,
            "files": names_checksum(pathlib.Path(path).name for path in self.paths),
            "images": len(self),
            "names": names_checksum(self.files),
            "content": digest.hexdigest(),
            "classes": names_checksum(self.classes),
        }

    def _path(self, index: int) -> str:
        """The file that holds an image."""
        return self.paths[int(np.searchsorted(self.starts.array, index, "right")) - 1]


@dataclasses.dataclass(frozen=True)
class Opened:
    """What is to be prepared.

    Attributes:
      splits: {name: source}, with "train".
      left_out: {why: how many samples are not used}.
    """

    splits: dict[str, PackedSource]
    left_out: dict[str, int]


def open_parts(
    make: Callable[..., PackedSource],
    parts: Mapping[str, Iterable[Part]],
    classes: Sequence[str] | None = None,
) -> Opened:
    """Sources of the parts of each split.

    Args:
      make: the class of the sources; their arguments are those of PackedSource.
      parts: {split: what its files hold, in order}, with "train".
      classes: their names in the order of their numbers; None: the labels of the training images,
        sorted, as numbers if all are; a single one counts as none.
    """
    numbers: dict[str, int] = {}  # of the labels, in the order of their occurrence
    collected = {split: _Collected(found, numbers) for split, found in parts.items()}
    if classes is None:
        used = np.unique(collected[TRAIN].numbers)
        labels = list(numbers)
        classes = sort_labels(labels[number] for number in used if number != NO_CLASS)
        if len(classes) < 2:
            classes = ()
    class_of = {name: number for number, name in enumerate(classes)}
    # The last one is that of NO_CLASS
    final = np.array([class_of.get(label, NO_CLASS) for label in numbers] + [NO_CLASS], np.int32)
    splits = {}
    left_out: collections.Counter[str] = collections.Counter()
    for split, found in collected.items():
        left_out.update(found.left_out)
        if not len(found.names):
            continue
        labels_of_split = None
        if classes:
            labels_of_split = share(final[found.numbers])
        splits[split] = make(
            paths=tuple(found.paths),
            starts=share(np.array(found.starts, np.int64)),
            files=found.names,
            labels=labels_of_split,
            classes=tuple(classes),
            places=share(np.concatenate(found.places)),
            sizes=share(np.concatenate(found.sizes)),
        )
    return Opened(splits, dict(left_out))


class _Collected:
    """The parts of a split, joined."""

    def __init__(self, parts: Iterable[Part], numbers: dict[str, int]) -> None:
        """Join them.

        Args:
          parts: in order.
          numbers: {label: number}; new ones are added.
        """
        self.paths: list[str] = []
        self.starts: list[int] = []
        self.places = [np.zeros(0, np.int64)]
        self.sizes = [np.zeros(0, np.int64)]
        self.left_out: collections.Counter[str] = collections.Counter()
        found = [np.zeros(0, np.int32)]
        writer = NamesWriter()
        count = 0
        for part in parts:
            self.left_out.update(part.left_out)
            if not part.names:
                continue
            self.paths.append(part.path)
            self.starts.append(count)
            self.places.append(part.places)
            self.sizes.append(part.sizes)
            found.append(np.array(list(_number(part.labels, numbers)), np.int32))
            writer.add("", part.names)
            count += len(part.names)
        self.names = writer.finish()
        self.numbers = np.concatenate(found)


def _number(labels: Sequence[str | None], numbers: dict[str, int]) -> Iterator[int]:
    """The numbers of labels; NO_CLASS for None."""
    for label in labels:
        if label is None or label == UNLABELED:
            yield NO_CLASS
        else:
            yield numbers.setdefault(label, len(numbers))


def sort_labels(labels: Iterable[str]) -> tuple[str, ...]:
    """Labels in order: as numbers if all are whole numbers, else as text."""
    found = list(labels)
    if all(label.removeprefix("-").isdecimal() for label in found):
        return tuple(sorted(found, key=int))
    return tuple(sorted(found))


@functools.lru_cache(maxsize=1)
def opened(opener: Callable[..., Any], *arguments: str) -> Any:
    """What `opener` returns; the last one is kept, as images are read in order."""
    return opener(*arguments)
