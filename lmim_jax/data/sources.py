"""Sources of encoded images: the protocol, image folders, and the choice made by the config."""

import collections
import dataclasses
import logging
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict

from lmim_jax.data import (
    folder_listing,
    labeled_folder,
    labeled_records,
    paired_source,
    shared_array,
    tfds_source,
)
from lmim_jax.data.decode import SUFFIXES
from lmim_jax.data.folder_source import (
    NO_CLASS,
    FolderSource,
    Listings,
    check_known,
    first_few,
    list_once,
    smallest_checksums,
)
from lmim_jax.data.shared_array import share
from lmim_jax.utils import buckets
from lmim_jax.utils.errors import UserError, did_you_mean

log = logging.getLogger(__name__)

SOURCES = ("shapes", "folder", "tfds")


class Source(Protocol):
    """Random access to encoded images, with labels and masks where there are any.

    A source can be pickled: worker processes get a copy. With labels that are no classes, it also
    has `targets`, see data/label_file.py.
    """

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; empty: unlabeled."""

    def __len__(self) -> int:
        """Number of images."""

    def record(self, index: int) -> tuple[bytes, int]:
        """(encoded bytes, class) of an image; class -1: unlabeled.

        Raises:
          BadImage: it is damaged.
          OSError: it cannot be read; see utils/faults.py for what follows from which error.
        """

    def mask(self, index: int) -> bytes | None:
        """The encoded object mask of an image, or None where there is none."""

    def name(self, index: int) -> str:
        """The name of an image, for messages."""

    def identity(self) -> dict[str, Any]:
        """Plain values that identify these images, stored in config.json."""


def open_splits(config: ConfigDict, listings: Listings | None = None) -> dict[str, Any]:
    """{"train": a source, "test": a source, or None where there is none} of `config.data`.

    Args:
      config: see configs/vit_b.py.
      listings: see `open_folder`.

    Raises:
      UserError: see `from_config`.
    """
    if listings is None:
        listings = {}
    splits = ("train", "test")
    return {split: from_config(config, split, listings, splits) for split in splits}


def from_config(
    config: ConfigDict,
    split: str,
    listings: Listings | None = None,
    together: Sequence[str] = (),
) -> Source | None:
    """The source of a split of `config.data`.

    Args:
      config: `config.data`, see configs/vit_b.py.
      split: "train" or "test", whatever the dataset calls them.
      listings: see `open_folder`.
      together: splits that will be opened too: they are staged at once.

    Returns:
      A source, or None for a test split that does not exist.

    Raises:
      UserError: unknown source, dataset, split or class; see the functions that open them.
    """
    classes = _read_class_names(config.classes)
    source = kind(config)
    _check_limits(config, source)
    _check_modalities(config, source)
    if source == "shapes":
        former_cache = config.path  # before version 0.2, see `kind`
        return open_shapes(config.cache or former_cache, split)
    if source == "folder" and config.modalities:
        return _pairs_from_config(config, split, classes, listings)
    if source == "folder":
        return _folder_from_config(config, split, classes, listings)
    if source == "tfds":
        return _tfds_from_config(config, split, classes, together)
    raise UserError(
        f"config.data.source={config.source!r} must be one of: {' | '.join(SOURCES)}"
        f"{did_you_mean(config.source, SOURCES)}"
    )


def kind(config: ConfigDict) -> str:
    """The source of `config.data`: `source`, but a folder if `path` is set for drawn images.

    Drawn images have no path: whoever gives one means their own. Before version 0.2, it was the
    cache of drawn images. A path in a bucket is that of a prepared dataset, and so is a local one
    if there is one, see `tfds_source.find_version`.
    """
    if isinstance(buckets.path(config.path), buckets.BucketPath):
        return "tfds"
    if config.source not in ("shapes", "folder") or not config.path:
        return config.source
    drawn = pathlib.Path(config.path).expanduser().glob("shapes/*/dataset_info.json")
    if config.source == "shapes" and any(drawn):
        return "shapes"
    if tfds_source.find_version(config.path):
        return "tfds"
    return "folder"


def _check_limits(config: ConfigDict, source: str) -> None:
    """Raise a UserError for a number of images per class that has no meaning."""
    for key in ("train_per_class", "test_per_class"):
        limit = config[key]
        if limit < 0:
            raise UserError(f"config.data.{key}={limit} must be at least 0; 0 keeps all images")
        if limit and source == "tfds":
            raise UserError(
                f"config.data.{key}={limit} is for folders; of a TFDS dataset, take a slice, such "
                "as config.data.train_split=train[:10%]"
            )


def _check_modalities(config: ConfigDict, source: str) -> None:
    """Raise a UserError for several modalities where there cannot be any."""
    if not config.modalities:
        return
    if source == "shapes":
        raise UserError(
            "config.data.source=shapes: drawn images have one modality; give the folder that holds "
            "one folder of images for each of config.data.modalities as config.data.path"
        )
    if config.labels:
        raise UserError(
            "config.data.labels is not supported with config.data.modalities; use folders as "
            "classes"
        )


def _pairs_from_config(
    config: ConfigDict,
    split: str,
    classes: tuple[str, ...],
    listings: Listings | None,
) -> paired_source.PairedSource | None:
    """The images of several modalities in folders; those of the first are opened as usual."""
    if listings is None:
        listings = {}
    paths = {name: options.path for name, options in config.modalities.items()}
    folders = paired_source.folders_of(config.path, paths)
    first = config.copy_and_resolve_references()
    first.path = str(next(iter(folders.values())))
    source = _folder_from_config(first, split, classes, listings)
    if source is None:
        return None
    return paired_source.pair(source, folders, listings)


def open_pairs(
    path: str | os.PathLike, modalities: Mapping[str, str], split: str, listings: Listings
) -> paired_source.PairedSource | None:
    """The images of several modalities in folders.

    Args:
      path: the folder that holds one folder for each modality.
      modalities: {name: folder}.
      split: see `open_folder`.
      listings: see `open_folder`.

    Raises:
      UserError: see `open_folder` and `paired_source.pair`.
    """
    folders = paired_source.folders_of(str(path), modalities)
    first = open_folder(next(iter(folders.values())), split, listings=listings)
    if first is None:
        return None
    return paired_source.pair(first, folders, listings)


def _split_name(config: ConfigDict, split: str) -> str:
    """What the dataset calls a split, "train" or "test"."""
    names = {"train": config.train_split, "test": config.test_split}
    return names[split]


def _folder_from_config(
    config: ConfigDict,
    split: str,
    classes: tuple[str, ...],
    listings: Listings | None,
) -> "FolderSource | None":
    name = _split_name(config, split)
    limits = {"train": config.train_per_class, "test": config.test_per_class}
    share = config.held_out
    if not 0 <= share < 1:
        raise UserError(f"config.data.held_out={share} must be a share in 0 .. 1, such as 0.1")
    if config.labels:
        known = {} if listings is None else listings
        return labeled_folder.open_split(config, split, classes, known)
    root = pathlib.Path(config.path).expanduser()
    has_test = bool(config.test_split) and (root / config.test_split).is_dir()
    has_test = has_test and (root / config.train_split).is_dir()
    if not has_test and share:
        return open_held_out(
            config.path, split, share, limits[split], config.train_split, classes, listings
        )
    if split != "train" and not has_test:
        return None
    return open_folder(config.path, name, limits[split], config.train_split, classes, listings)


def _tfds_from_config(
    config: ConfigDict, split: str, classes: tuple[str, ...], together: Sequence[str]
) -> tfds_source.TfdsSource | None:
    name = _split_name(config, split)
    if not name:
        return None
    title = config.name
    folder = config.dir
    if isinstance(buckets.path(config.path), buckets.BucketPath):
        folder = config.path
    elif config.path and (dataset := tfds_source.find_version(config.path)):
        title = ""
        folder = str(dataset)
        if split == "test" and not tfds_source.has_split(dataset, name):
            return None  # as of a folder
    others = [_split_name(config, other) for other in together]
    images = tuple(options.path for options in config.modalities.values())
    source = tfds_source.open_tfds(
        title, folder, name, config.stage, list(filter(None, others)), images
    )
    if config.labels:
        if classes:
            raise UserError(
                "config.data.classes is not supported with config.data.labels for prepared "
                "datasets; leave the rows of other classes out of the file"
            )
        return labeled_records.open_split(source, config, split)
    if classes:
        return tfds_source.select_classes(source, classes)
    return source


def _read_class_names(path: str) -> tuple[str, ...]:
    """The lines of a file of class names; () for no file."""
    if not path:
        return ()
    try:
        lines = buckets.path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config.data.classes={path!r} cannot be read ({error})") from error
    names = tuple(line.strip() for line in lines if line.strip())
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


def _given_folder(path: str | os.PathLike) -> pathlib.Path:
    """The folder of images, or a UserError if there is none."""
    if not path:
        raise UserError("there is no folder of images; give --config.data.path=FOLDER")
    folder = pathlib.Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"config.data.path={path!r} is not a folder; give the folder that holds your images"
        )
    return folder


def open_folder(
    path: str | os.PathLike,
    split: str,
    max_per_class: int = 0,
    train: str = "train",
    only: Sequence[str] = (),
    listings: Listings | None = None,
) -> FolderSource | None:
    """The images of a folder, at any depth.

    If there is a subfolder `train` (and others), a split is that subfolder, and the folders in it
    are the classes, of which a single one counts as none. Images directly in the split, and test
    images in folders that are no class of the training split, have no class. Without the subfolder
    `train`, all images below `path` are the training set, unlabeled. Files are sorted by path;
    hidden files are left out.

    Args:
      path: the folder.
      split: name of the split.
      max_per_class: keep the first so many images of each class, of those without a class together;
        0: all.
      train: name of the training split.
      only: names of the classes to keep, in the order of their numbers; (): all, and images without
        a class.
      listings: what is below the folders listed so far, by folder; new ones are added.

    Returns:
      The source, or None for a test split that does not exist or holds no images.

    Raises:
      UserError: the folder is missing, cannot be read or holds no images, or a class does not
        exist.
    """
    if listings is None:
        listings = {}
    root = _given_folder(path)
    divided = (root / train).is_dir()
    if split != train and not (divided and (root / split).is_dir()):
        return None
    top = root
    if divided:
        top = root / split
    found = list_once(top, listings)
    if not found.images and split != train:
        return None
    if not found.images:
        raise UserError(_no_images(found))
    classes: tuple[str, ...] = ()
    if divided:
        classes = list_once(root / train, listings).classes
    check_known(only, classes, f"{top}: no folder for these of config.data.classes")
    chosen = tuple(only) or classes
    files, labels = _select(found, chosen, max_per_class, keep_others=not only)
    if not files:
        raise UserError(f"{top}: no images of the classes in config.data.classes")
    if len(chosen) < 2 or (labels == NO_CLASS).all():
        return FolderSource(str(top), files, None, ())
    return FolderSource(str(top), files, share(labels), chosen)


def open_held_out(
    path: str | os.PathLike,
    split: str,
    share: float,
    max_per_class: int = 0,
    train: str = "train",
    only: Sequence[str] = (),
    listings: Listings | None = None,
) -> FolderSource | None:
    """One of two parts of class folders without a test split: the same files in it every time.

    The class folders are those of the subfolder `train`, or else those directly in `path`, if every
    image is in one of at least two. Of each class, the files whose names have the smallest
    checksums are held out, but not all of them.

    Args:
      path: see `open_folder`; also for the other arguments.
      split: "train", or "test": what is held out.
      share: of the images of each class that is held out, 0 .. 1.
      max_per_class: of this part.
      train: name of the training split.
      only: names of classes.
      listings: of folders.

    Returns:
      The source; images without classes are all for training, and the part held out is None.

    Raises:
      UserError: see `open_folder`.
    """
    if listings is None:
        listings = {}
    whole = open_folder(path, train, 0, train, only, listings)
    assert whole is not None  # there always is a training split
    if whole.labels is None:
        found = list_once(pathlib.Path(whole.root), listings)
        divided = (pathlib.Path(path).expanduser() / train).is_dir()
        if divided or found.loose or len(found.classes) < 2:
            return whole if split == "train" else None
        classes = tuple(only) or found.classes
        check_known(only, found.classes, f"{path}: no folder for these of config.data.classes")
        files, labels = _select(found, classes, 0, keep_others=not only)
        whole = dataclasses.replace(
            whole, files=files, labels=shared_array.share(labels), classes=classes
        )
    assert whole.labels is not None
    without_class = np.flatnonzero(whole.labels.array == NO_CLASS)
    if split == "test":
        without_class = without_class[:0]
    chosen = [without_class[: max_per_class or None]]
    for number in range(len(whole.classes)):
        members = np.flatnonzero(whole.labels.array == number)
        held = smallest_checksums([whole.files[i] for i in members], share)
        part = members[held] if split == "test" else np.delete(members, held)
        chosen.append(np.sort(part)[: max_per_class or None])
    kept = np.sort(np.concatenate(chosen))
    if not len(kept):  # one image of each class
        return None
    return dataclasses.replace(
        whole, files=whole.files.select(kept), labels=shared_array.share(whole.labels.array[kept])
    )


def _no_images(found: folder_listing.Listing) -> str:
    """The error for a folder without images: what was searched for, and what there is instead."""
    message = f"{found.top}: no images in this folder (searched for {', '.join(SUFFIXES)})"
    datasets = [name for name in found.others if name.endswith(f"/{tfds_source.INFO}")]
    if datasets:
        folders = [f"{found.top}/{name.removesuffix(f'/{tfds_source.INFO}')}" for name in datasets]
        return f"{message}, but of a prepared dataset: give {first_few(folders)}"
    if found.suffixes:
        counts = [f"{n:,} {suffix or 'without suffix'}" for suffix, n in found.suffixes.items()]
        message += f", but other files: {first_few(counts)}"
    return message


def _select(
    found: folder_listing.Listing, classes: Sequence[str], max_per_class: int, *, keep_others: bool
) -> tuple[folder_listing.Names, Int[np.ndarray, " N"]]:
    """(files, labels) of some classes.

    Args:
      found: all files.
      classes: to keep; one alone counts as none.
      max_per_class: the first so many files of each class, of those without one together; 0: all.
      keep_others: also keep files without a class.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    labels = np.full(len(found.images), NO_CLASS, np.int32)
    is_kept = np.zeros(len(found.images), bool)
    counts: collections.Counter[int] = collections.Counter()
    start = 0
    for name, count in found.runs:
        label = numbers.get(name, NO_CLASS)
        taken = count
        if max_per_class:
            taken = min(count, max_per_class - counts[label])
        if label != NO_CLASS or keep_others:
            labels[start : start + taken] = label
            is_kept[start : start + taken] = True
            counts[label] += taken
        start += count
    if is_kept.all():
        return found.images, labels
    kept = np.flatnonzero(is_kept)
    return found.images.select(kept), labels[kept]
