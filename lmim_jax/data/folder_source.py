"""Image files below a folder as a source, and what modules that open folders share."""

import contextlib
import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from lmim_jax.data import folder_listing
from lmim_jax.data.label_file import Targets
from lmim_jax.data.shared_array import SharedArray
from lmim_jax.utils import faults
from lmim_jax.utils.checksum import names_checksum
from lmim_jax.utils.errors import UserError

Listings = dict[str, folder_listing.Listing]  # of folders

NO_CLASS = -1  # the label of unlabeled images
LISTED = 5  # names listed in a message


@dataclasses.dataclass(frozen=True)
class FolderSource:
    """Image files below a folder; see `Source`.

    Attributes:
      root: the folder.
      files: paths of the images, relative to it.
      labels: int32, a class for each file, -1: none; None: unlabeled.
      classes: names of the classes.
      targets: labels that are no classes; None: there are none.
      labels_checksum: of labels that do not follow from the names of the files; "": they do.
    """

    root: str
    files: folder_listing.Names
    labels: SharedArray | None
    classes: tuple[str, ...]
    targets: Targets | None = None
    labels_checksum: str = ""

    def __len__(self) -> int:
        return len(self.files)

    def without_labels(self) -> "FolderSource":
        """The same images, of no classes."""
        return dataclasses.replace(self, labels=None, classes=(), labels_checksum="none")

    def record(self, index: int) -> tuple[bytes, int]:
        """(encoded bytes, class) of an image; OSError if the file cannot be read."""
        try:
            data = pathlib.Path(self.root, self.files[index]).read_bytes()
        except (FileNotFoundError, PermissionError) as error:
            faults.check_file_system(error, self.root, self._others(index))
            raise
        if self.labels is None:
            return data, NO_CLASS
        return data, int(self.labels.array[index])

    def _others(self, index: int) -> list[str]:
        """The full paths of a few files, far from a given one."""
        count = len(self)
        return [self.name((index + part * count // 4) % count) for part in (1, 2, 3)]

    def mask(self, index: int) -> None:
        """None: folders have no masks."""
        return None

    def name(self, index: int) -> str:
        """The full path of an image."""
        return str(pathlib.Path(self.root, self.files[index]))

    def num_bytes(self) -> int:
        """The bytes of all files that are there: links may lead nowhere."""
        size = 0
        for file in self.files:
            with contextlib.suppress(FileNotFoundError):
                size += pathlib.Path(self.root, file).stat().st_size
        return size

    def identity(self) -> dict[str, Any]:
        """The number of images and a checksum of their names, and of labels from a file."""
        identity = {"source": "folder", "images": len(self), "names": self._checksum}
        if self.labels_checksum:
            identity["labels"] = self.labels_checksum
        return identity

    @functools.cached_property
    def _checksum(self) -> str:
        return names_checksum(self.files)


def list_once(top: pathlib.Path, listings: Listings) -> folder_listing.Listing:
    """What is below a folder; data/inventory.py says what is odd."""
    if str(top) not in listings:
        listings[str(top)] = folder_listing.list_folder(top)
    return listings[str(top)]


def smallest_checksums(names: Sequence[str], share: float) -> Int[np.ndarray, " n"]:
    """The places of a share of some names: those with the smallest checksums, but not all."""
    checksums = []
    for name in names:
        checksums.append(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest())
    order = sorted(range(len(names)), key=checksums.__getitem__)
    count = min(max(1, round(share * len(names))), len(names) - 1)
    return np.array(order[:count], np.int64)


def check_known(names: Sequence[str], classes: Sequence[str], problem: str) -> None:
    """Raise a UserError that lists the names that are not classes."""
    unknown = sorted(set(names) - set(classes))
    if unknown:
        raise UserError(f"{problem}: {first_few(unknown)}")


def first_few(names: Sequence[str]) -> str:
    """The first few of some names, for a message."""
    listed = ", ".join(names[:LISTED])
    if len(names) > LISTED:
        listed += f" and {len(names) - LISTED} more"
    return listed
