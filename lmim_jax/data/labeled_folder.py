"""A folder of images whose labels, or whose selection, are in a CSV file; see label_file.py.

The column `image` holds paths relative to the folder. Which split a row belongs to says the column
`split`, or else the subfolder (train/..., test/...). Without both, all rows are for training, of
which `held_out` may hold out a share.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict

from lmim_jax.data import folder_listing, folder_source, label_file
from lmim_jax.data.folder_source import NO_CLASS, FolderSource, Listings
from lmim_jax.data.label_file import LabelFile, Targets
from lmim_jax.data.shared_array import share
from lmim_jax.utils.errors import UserError

LISTED = 3  # rows or images listed in a message
TRAIN = "train"
TEST = "test"


@dataclasses.dataclass(frozen=True)
class Matched:
    """The rows of a file and the images of a folder.

    Attributes:
      file: the rows that have an image and belong to a split, in the order of the images.
      listing: all files of the folder.
      places: the image of each row, as its place in `listing.images`.
      is_test: whether a row belongs to the test split.
      missing: the places in the file, and the names, of images that are not there.
      other_splits: {split: rows} of splits that are not used.
    """

    file: LabelFile
    listing: folder_listing.Listing
    places: Int[np.ndarray, " N"]
    is_test: np.ndarray
    missing: tuple[str, ...]
    other_splits: dict[str, int]

    @property
    def unlisted(self) -> list[str]:
        """Images of the folder that are in no row, where no row was left out."""
        if self.other_splits:
            return []
        absent = np.ones(len(self.listing.images), bool)
        absent[self.places] = False
        return [self.listing.images[int(place)] for place in np.flatnonzero(absent)]


def match(config: ConfigDict, listings: Listings) -> Matched:
    """Find the image of each row of `config.labels`.

    Args:
      config: `config.data`.
      listings: see `sources.open_folder`.

    Raises:
      UserError: a row cannot be read or belongs to no split, two rows are of the same image, or
        more than `config.max_bad_fraction` of the rows have no image.
    """
    root = pathlib.Path(config.path).expanduser()
    if not config.path or not root.is_dir():
        raise UserError(
            f"config.data.path={config.path!r} is not a folder; give the one that the images in "
            f"{config.labels} are in"
        )
    file = label_file.read(config.labels, config.labels_kind)
    splits, other_splits = _splits_of_rows(file, config, root)
    listing = folder_source.list_once(root, listings)
    rows: dict[str, int] = {}
    for row, image in enumerate(file.images):
        if splits[row]:
            name = image.removeprefix(f"{root}/")
            if name in rows:
                raise UserError(
                    f"{file.where(row)}: {name!r} is already in {file.where(rows[name])}, of the "
                    f"split {splits[rows[name]]}: an image can be used once"
                )
            rows[name] = row
    places = []
    chosen = []
    for place, name in enumerate(listing.images):
        if name in rows:
            places.append(place)
            chosen.append(rows.pop(name))
    missing = []
    for image, row in rows.items():
        missing.append(f"{file.where(row)}: {image}")
    if len(missing) > config.max_bad_fraction * len(file) or not chosen:
        first = next(iter(rows))
        raise UserError(
            f"{file.where(rows[first])}: there is no image {first!r} in {root}"
            f"{_hint(first, listing)}; {len(missing):,} of {len(file):,} rows have no image, more "
            f"than config.data.max_bad_fraction={config.max_bad_fraction:g}"
        )
    is_test = np.array([splits[row] == TEST for row in chosen], bool)
    return Matched(
        file.select(chosen),
        listing,
        np.array(places, np.int64),
        is_test,
        tuple(missing),
        other_splits,
    )


def _splits_of_rows(
    file: LabelFile, config: ConfigDict, root: pathlib.Path
) -> tuple[list[str], dict[str, int]]:
    """TRAIN, TEST or "" (not used) for each row, and the numbers of rows of other splits."""
    known = {config.train_split: TRAIN}
    if config.test_split:
        known[config.test_split] = TEST
    named = file.splits
    if named is None:
        if not (root / config.train_split).is_dir():
            return [TRAIN] * len(file), {}
        named = tuple(image.partition("/")[0] for image in file.images)
        for row, name in enumerate(named):
            if not (root / name).is_dir():
                raise UserError(
                    f"{file.where(row)}: {file.images[row]!r} is not in a subfolder of {root}, "
                    f"such as {config.train_split}/: give paths relative to {root}, or a column "
                    "split"
                )
    others: dict[str, int] = {}
    for name in named:
        if name not in known:
            others[name] = others.get(name, 0) + 1
    if config.train_split not in named:
        raise UserError(
            f"{file.path}: no row is of the split config.data.train_split="
            f"{config.train_split!r}; the file has: {', '.join(sorted(others)[:LISTED])}"
        )
    return [known.get(name, "") for name in named], others


def _hint(image: str, listing: folder_listing.Listing) -> str:
    """What a name that is not there may stand for."""
    for name in listing.images:
        if name.endswith(f"/{image}") or pathlib.PurePosixPath(name).with_suffix("") == (
            pathlib.PurePosixPath(image)
        ):
            return f" (is {name!r} meant?)"
    return ""


def open_split(
    config: ConfigDict, split: str, only: Sequence[str], listings: Listings
) -> FolderSource | None:
    """The images of a split, with their labels.

    Args:
      config: `config.data`.
      split: TRAIN or TEST.
      only: names of the classes to keep, in the order of their numbers; (): all.
      listings: see `sources.open_folder`.

    Returns:
      The source, or None for a test split without rows.

    Raises:
      UserError: see `match`.
    """
    matched = match(config, listings)
    file = matched.file
    if only and file.values is not None:
        raise UserError(
            f"config.data.classes chooses among classes, but {file.path} holds {file.kind} labels"
        )
    names, numbers = _classes(matched)
    is_test = matched.is_test
    if not is_test.any() and config.held_out and (names or file.values is not None):
        is_test = _hold_out(matched, numbers, config.held_out)
    present = np.unique(numbers[~is_test])
    classes = tuple(only) or tuple(names[number] for number in present if number != NO_CLASS)
    folder_source.check_known(only, names, f"{file.path}: no rows for these of config.data.classes")
    labels = np.full(len(file), NO_CLASS, np.int32)
    for label, name in enumerate(classes):
        labels[numbers == names.index(name)] = label
    is_kept = is_test == (split == TEST)
    if only:
        is_kept = is_kept & (labels != NO_CLASS)
    limit = {TRAIN: config.train_per_class, TEST: config.test_per_class}[split]
    rows = _first_of_each(labels, np.flatnonzero(is_kept), limit)
    if not len(rows):
        if split == TEST:
            return None
        raise UserError(f"{file.path}: no image is left to train on")
    return _source(matched, rows, labels[rows], classes)


def _source(
    matched: Matched,
    rows: Int[np.ndarray, " n"],
    labels: Int[np.ndarray, " n"],
    classes: tuple[str, ...],
) -> FolderSource:
    """The images of some rows."""
    file = matched.file
    listing = matched.listing
    files = listing.images.select(matched.places[rows])
    targets = None
    if file.values is not None:
        values = np.ascontiguousarray(file.values[rows])
        targets = Targets(file.kind, file.names, share(values.reshape(-1)))
        checksum = hashlib.sha256(values.tobytes() + "\n".join(file.names).encode())
        return FolderSource(listing.top, files, None, (), targets, checksum.hexdigest())
    checksum = hashlib.sha256(labels.tobytes() + "\n".join(classes).encode())
    if len(classes) < 2 or (labels == NO_CLASS).all():
        return FolderSource(listing.top, files, None, (), None, checksum.hexdigest())
    return FolderSource(listing.top, files, share(labels), classes, None, checksum.hexdigest())


def _classes(matched: Matched) -> tuple[tuple[str, ...], Int[np.ndarray, " N"]]:
    """The names of all classes and the class of each row; for a list, those of its folders."""
    file = matched.file
    if file.classes is not None:
        return file.names, file.classes
    nothing = np.full(len(file), NO_CLASS, np.int32)
    if file.values is not None:
        return (), nothing
    paths = [matched.listing.images[int(place)].split("/") for place in matched.places]
    if all(path[0] in matched.listing.split_like for path in paths):
        paths = [path[1:] for path in paths]  # train/CLASS/..., not CLASS/...
    folders = [path[0] if len(path) > 1 else "" for path in paths]
    names = tuple(sorted(set(folders) - {""}))
    numbers = {name: number for number, name in enumerate(names)}
    return names, np.array([numbers.get(folder, NO_CLASS) for folder in folders], np.int32)


def _hold_out(matched: Matched, numbers: Int[np.ndarray, " N"], share_out: float) -> np.ndarray:
    """Which rows are held out: of each class, the names with the smallest checksums."""
    is_test = np.zeros(len(numbers), bool)
    for number in np.unique(numbers):
        if number == NO_CLASS and matched.file.values is None:
            continue
        members = np.flatnonzero(numbers == number)
        names = [matched.listing.images[int(place)] for place in matched.places[members]]
        is_test[members[folder_source.smallest_checksums(names, share_out)]] = True
    return is_test


def _first_of_each(
    labels: Int[np.ndarray, " N"], rows: Int[np.ndarray, " n"], limit: int
) -> Int[np.ndarray, " m"]:
    """The first so many rows of each class; 0: all."""
    if not limit:
        return rows
    chosen = []
    for label in np.unique(labels[rows]):
        chosen.append(rows[labels[rows] == label][:limit])
    return np.sort(np.concatenate(chosen)) if chosen else rows
