"""Images of several modalities in folders, one folder each: files of the same name are a pair.

The names are compared without suffix, with the folders below that of the modality: RGB in
visible/train/010001.jpg belongs to infrared/train/010001.png.
"""

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from lmim_jax.data import folder_listing, records
from lmim_jax.data.folder_source import FolderSource, Listings, first_few, list_once
from lmim_jax.data.label_file import Targets
from lmim_jax.data.shared_array import SharedArray, share
from lmim_jax.utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class PairedSource:
    """Image files of several modalities; see `sources.Source`. A record holds one of each.

    Attributes:
      modalities: their names.
      sources: the files of each, those of an image at the same place.
      missing: {modality: names of files of others that have no partner in it, for messages}.
    """

    modalities: tuple[str, ...]
    sources: tuple[FolderSource, ...]
    missing: dict[str, tuple[str, ...]]

    def __len__(self) -> int:
        return len(self.sources[0])

    @property
    def files(self) -> folder_listing.Names:
        """Names of the images: those of the files of the first modality."""
        return self.sources[0].files

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; empty: unlabeled."""
        return self.sources[0].classes

    @property
    def labels(self) -> SharedArray | None:
        """int32, the class of each image, -1: none; None: unlabeled."""
        return self.sources[0].labels

    @property
    def targets(self) -> Targets | None:
        """Labels that are no classes; None: there are none."""
        return self.sources[0].targets

    def without_labels(self) -> "PairedSource":
        """The same images, of no classes."""
        first, *others = self.sources
        return dataclasses.replace(self, sources=(first.without_labels(), *others))

    def record(self, index: int) -> tuple[bytes, int]:
        """(packed files, class) of an image; OSError if a file cannot be read."""
        files = []
        for source in self.sources:
            data, _ = source.record(index)
            files.append(data)
        label = -1
        if self.labels is not None:
            label = int(self.labels.array[index])
        return records.pack(files), label

    def mask(self, index: int) -> None:
        """None: folders have no masks."""
        return None

    def name(self, index: int) -> str:
        """The full paths of the files of an image."""
        return " + ".join(source.name(index) for source in self.sources)

    def num_bytes(self) -> int:
        """The bytes of all files."""
        return sum(source.num_bytes() for source in self.sources)

    def identity(self) -> dict[str, Any]:
        """The number of images, and a checksum of the names of each modality's files."""
        identity: dict[str, Any] = {"source": "folders", "images": len(self)}
        for name, source in zip(self.modalities, self.sources, strict=True):
            identity[name] = source.identity()["names"]
        if self.sources[0].labels_checksum:
            identity["labels"] = self.sources[0].labels_checksum
        return identity


def pair(
    first: FolderSource, folders: Mapping[str, pathlib.Path], listings: Listings
) -> PairedSource:
    """The images of a source that have a partner in every other modality.

    Args:
      first: the images of the first modality, which are a split of its folder.
      folders: {modality: its folder}, the first one first.
      listings: see `sources.open_folder`.

    Raises:
      UserError: a folder is missing, two of its files have the same name, or no image has partners.
    """
    names = tuple(folders)
    part = pathlib.Path(first.root).relative_to(folders[names[0]])
    stems = [_stem(name) for name in first.files]
    all_first = _by_stem(list_once(pathlib.Path(first.root), listings))
    found: dict[str, dict[str, str]] = {}
    missing: dict[str, tuple[str, ...]] = {}
    alone: set[str] = set()  # files of other modalities without one of the first
    for name in names[1:]:
        root = folders[name] / part
        if not root.is_dir():
            raise UserError(
                f"config.data.modalities.{name}: there is no folder {root}, where the partners of "
                f"the images in {first.root} would be"
            )
        found[name] = _by_stem(list_once(root, listings))
        missing[name] = tuple(
            file for stem, file in zip(stems, first.files, strict=True) if stem not in found[name]
        )
        alone.update(file for stem, file in found[name].items() if stem not in all_first)
    missing[names[0]] = tuple(sorted(alone))
    complete = [
        place
        for place, stem in enumerate(stems)
        if all(stem in partners for partners in found.values())
    ]
    if not complete:
        raise UserError(
            f"no image in {first.root} has a partner of the same name in "
            f"{' and '.join(str(folders[name] / part) for name in names[1:])}; the first images "
            f"are {first_few(first.files[:2])} and {first_few([*alone][:2]) or 'none'}"
        )
    kept = np.array(complete)
    labels = None
    if first.labels is not None:
        labels = share(first.labels.array[kept])
    sources = [dataclasses.replace(first, files=first.files.select(kept), labels=labels)]
    for name in names[1:]:
        partners = [found[name][stems[place]] for place in complete]
        files = folder_listing.share_names(partners)
        sources.append(FolderSource(str(folders[name] / part), files, None, ()))
    missing = {name: files for name, files in missing.items() if files}
    return PairedSource(names, tuple(sources), missing)


def describe_missing(source: PairedSource) -> list[str]:
    """Lines on the files that have no partner, by the modality that lacks it."""
    lines = []
    for name, files in source.missing.items():
        lines.append(f"{len(files):,} images have no partner in {name}: {first_few(files)}")
    return lines


def _stem(name: str) -> str:
    """The path of a file without its suffix."""
    return name.rpartition(".")[0]


def _by_stem(listing: folder_listing.Listing) -> dict[str, str]:
    """{path without suffix: path} of the images of a folder.

    Raises:
      UserError: two of them differ in nothing but the suffix.
    """
    found: dict[str, str] = {}
    for name in listing.images:
        other = found.setdefault(_stem(name), name)
        if other != name:
            raise UserError(
                f"{listing.top}: {other} and {name} have the same name, so that it is not clear "
                "which of them belongs to a pair: remove one"
            )
    return found


def folders_of(path: str, modalities: Mapping[str, str]) -> dict[str, pathlib.Path]:
    """{modality: its folder}.

    Args:
      path: the folder that holds them; "": `modalities` are full paths.
      modalities: {name: folder, relative to `path`}.

    Raises:
      UserError: one of them is missing.
    """
    folders = {}
    for name, folder in modalities.items():
        found = pathlib.Path(path).expanduser() / pathlib.Path(folder).expanduser()
        if not folder or not found.is_dir():
            raise UserError(
                f"config.data.modalities.{name}.path={folder!r}: {found} is not a folder; give the "
                "one that holds the images of this modality, in config.data.path"
            )
        folders[name] = found
    return folders


def parse(texts: Iterable[str]) -> dict[str, str]:
    """{modality: folder} of texts such as "rgb", a folder of that name, and "thermal=infrared".

    Raises:
      UserError: there are fewer than two, one occurs twice, or a name is none of Python's.
    """
    folders: dict[str, str] = {}
    given = list(texts)
    for text in given:
        name, _, folder = text.partition("=")
        if not name.isidentifier() or name in folders:
            raise UserError(
                f"--modalities={','.join(given)}: give different names of letters, digits and "
                "underscores, such as rgb,thermal=infrared (NAME=FOLDER where they differ)"
            )
        folders[name] = folder or name
    if len(folders) < 2:
        raise UserError(f"--modalities={','.join(given)}: give at least two, such as rgb,thermal")
    return folders
