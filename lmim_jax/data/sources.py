"""Sources of encoded images: the protocol, image folders, and the choice made by the config."""

import collections
import dataclasses
import logging
import os
import pathlib
from collections.abc import Sequence
from typing import Any, Protocol

from ml_collections import ConfigDict

from lmim_jax.data import tfds_source
from lmim_jax.data.decode import SUFFIXES
from lmim_jax.utils.checksum import names_checksum
from lmim_jax.utils.errors import UserError, did_you_mean

log = logging.getLogger(__name__)

SOURCES = ("shapes", "folder", "tfds")
NO_CLASS = -1  # the label of unlabeled images
LISTED = 5  # names listed in a message


class Source(Protocol):
    """Random access to encoded images, with labels and masks where there are any.

    A source can be pickled: worker processes get a copy.
    """

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; empty: unlabeled."""

    @property
    def ignored(self) -> tuple[str, ...]:
        """Names of files that are not images; they count as bad images."""

    def __len__(self) -> int:
        """Number of images."""

    def record(self, index: int) -> tuple[bytes, int]:
        """(encoded bytes, class) of an image; class -1: unlabeled.

        Raises:
          OSError: the image cannot be read.
        """

    def mask(self, index: int) -> bytes | None:
        """The encoded object mask of an image, or None where there is none."""

    def name(self, index: int) -> str:
        """The name of an image, for messages."""

    def identity(self) -> dict[str, Any]:
        """Plain values that identify these images, stored in config.json."""


def from_config(config: ConfigDict, split: str) -> Source | None:
    """The source of a split of `config.data`.

    Args:
      config: `config.data`, see configs/vit_b.py.
      split: "train" or "test", whatever the dataset calls them.

    Returns:
      A source, or None for a test split that does not exist.

    Raises:
      UserError: unknown source, dataset, split or class; see the functions that open them.
    """
    classes = _read_class_names(config.classes)
    if config.source == "shapes":
        return open_shapes(config.path, split)
    if config.source == "folder":
        return _folder_from_config(config, split, classes)
    if config.source == "tfds":
        return _tfds_from_config(config, split, classes)
    raise UserError(
        f"config.data.source={config.source!r} must be one of: {' | '.join(SOURCES)}"
        f"{did_you_mean(config.source, SOURCES)}"
    )


def _split_name(config: ConfigDict, split: str) -> str:
    """What the dataset calls a split, "train" or "test"."""
    names = {"train": config.train_split, "test": config.test_split}
    return names[split]


def _folder_from_config(
    config: ConfigDict, split: str, classes: tuple[str, ...]
) -> "FolderSource | None":
    name = _split_name(config, split)
    max_per_class = {"train": config.train_per_class, "test": config.test_per_class}
    if split != "train":
        is_folder = bool(name) and pathlib.Path(config.path, name).expanduser().is_dir()
        if not is_folder:
            return None
    return open_folder(config.path, name, max_per_class[split], config.train_split, classes)


def _tfds_from_config(
    config: ConfigDict, split: str, classes: tuple[str, ...]
) -> tfds_source.TfdsSource | None:
    name = _split_name(config, split)
    if not name:
        return None
    source = tfds_source.open_tfds(config.name, config.dir, name)
    if classes:
        return tfds_source.select_classes(source, classes)
    return source


def _read_class_names(path: str) -> tuple[str, ...]:
    """The lines of a file of class names; () for no file."""
    if not path:
        return ()
    try:
        names = tuple(pathlib.Path(path).expanduser().read_text().split())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config.data.classes={path!r} cannot be read ({error})") from error
    if not names or len(set(names)) < len(names):
        raise UserError(
            f"config.data.classes={path!r} must list distinct class names, one per line"
        )
    return names


def open_shapes(path: str, split: str, kind: str | None = None) -> tfds_source.TfdsSource:
    """The embedded dataset `shapes`, drawn on first use.

    Args:
      path: the folder that holds it; "": the user's cache folder.
      split: "train" or "test".
      kind: None, or "several" for the images of several objects, `shapes/several`.
    """
    # TFDS is slow to import, and not needed for folders
    from lmim_jax.data.synthetic import shapes

    builder = shapes.prepare(path or tfds_source.cache_folder(), kind)
    return tfds_source.open_split(builder, split)


@dataclasses.dataclass(frozen=True)
class FolderSource:
    """Image files below a folder; see `Source`.

    Attributes:
      root: the folder.
      files: paths of the images, relative to it.
      labels: a class for each file, -1: none.
      classes: names of the classes.
      ignored: files without an image suffix, which count as bad.
    """

    root: str
    files: tuple[str, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]
    ignored: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)

    def record(self, index: int) -> tuple[bytes, int]:
        """(encoded bytes, class) of an image; OSError if the file cannot be read."""
        path = pathlib.Path(self.root, self.files[index])
        return path.read_bytes(), self.labels[index]

    def mask(self, index: int) -> None:
        """None: folders have no masks."""
        return None

    def name(self, index: int) -> str:
        """The full path of an image."""
        return str(pathlib.Path(self.root, self.files[index]))

    def identity(self) -> dict[str, Any]:
        """The number of images and a checksum of their names."""
        return {
            "source": "folder",
            "images": len(self),
            "names": names_checksum(self.files),
        }


def open_folder(
    path: str | os.PathLike,
    split: str,
    max_per_class: int = 0,
    train: str = "train",
    only: Sequence[str] = (),
) -> FolderSource | None:
    """The images of a folder, at any depth.

    If there is a subfolder `train` (and others), a split is that subfolder, and the folders in it
    are the classes. Otherwise all images below `path` are the training set, unlabeled. Files are
    sorted by path; hidden files are left out.

    Args:
      path: the folder.
      split: name of the split.
      max_per_class: keep the first so many images of each class; 0: all.
      train: name of the training split.
      only: names of the classes to keep, in the order of their numbers; (): all.

    Returns:
      The source, or None for a split that does not exist.

    Raises:
      UserError: the folder is missing or holds no images, or a class does not exist.
    """
    root = pathlib.Path(path).expanduser()
    if not path or not root.is_dir():
        raise UserError(
            f"config.data.path={path!r} is not a folder; give the folder that holds your images"
        )
    divided = (root / train).is_dir()
    if split != train and not (divided and (root / split).is_dir()):
        return None
    top = root
    if divided:
        top = root / split
    files, ignored = list_files(top)
    if not files:
        suffixes = ", ".join(SUFFIXES)
        raise UserError(f"{top}: no images in this folder (searched for {suffixes}, at any depth)")
    if ignored:
        log.warning("%s: %d files are not images: %s", top, len(ignored), _first_few(ignored))
    classes: tuple[str, ...] = ()
    if divided and all("/" in name for name in files):
        classes = _class_folders(list_files(root / train)[0])
    if classes:
        problem = f"{top}: classes that are not in {root / train}"
        _check_known(_class_folders(files), classes, problem)
    _check_known(only, classes, f"{top}: no folder for these of config.data.classes")
    if not classes:
        labels = (NO_CLASS,) * len(files)
        return FolderSource(str(top), tuple(files), labels, (), tuple(ignored))
    chosen = tuple(only) or classes
    kept, labels = _select(files, chosen, max_per_class)
    if not kept:
        raise UserError(f"{top}: no images of the classes in config.data.classes")
    return FolderSource(str(top), kept, labels, chosen, tuple(ignored))


def _select(
    files: Sequence[str], classes: Sequence[str], max_per_class: int
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """(files, labels) of the first `max_per_class` files of each of some classes; 0: all files."""
    numbers = {name: number for number, name in enumerate(classes)}
    counts: collections.Counter[str] = collections.Counter()
    kept = []
    labels = []
    for name in files:
        class_name = name.split("/")[0]
        counts[class_name] += 1
        if class_name not in numbers:
            continue
        if 0 < max_per_class < counts[class_name]:
            continue
        kept.append(name)
        labels.append(numbers[class_name])
    return tuple(kept), tuple(labels)


def list_files(top: str | os.PathLike) -> tuple[list[str], list[str]]:
    """(image files, other files) below a folder, as sorted relative paths with "/"."""
    top = pathlib.Path(top)
    images = []
    others = []
    for parent, folders, names in os.walk(top, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if name.startswith("."):
                continue
            relative = (pathlib.Path(parent) / name).relative_to(top).as_posix()
            if name.lower().endswith(SUFFIXES):
                images.append(relative)
            else:
                others.append(relative)
    return sorted(images), sorted(others)


def _class_folders(files: Sequence[str]) -> tuple[str, ...]:
    """The topmost folders of some files, sorted: the names of the classes."""
    return tuple(sorted({name.split("/")[0] for name in files if "/" in name}))


def _check_known(names: Sequence[str], classes: Sequence[str], problem: str) -> None:
    """Raise a UserError that lists the names that are not classes."""
    unknown = sorted(set(names) - set(classes))
    if unknown:
        raise UserError(f"{problem}: {_first_few(unknown)}")


def _first_few(names: Sequence[str]) -> str:
    """The first few of some names, for a message."""
    listed = ", ".join(names[:LISTED])
    if len(names) > LISTED:
        listed += f" and {len(names) - LISTED} more"
    return listed
