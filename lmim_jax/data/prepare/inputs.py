"""What `lmim prepare` was given: which kind of input, which files, and their splits."""

import dataclasses
import itertools
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lmim_jax.data import folder_listing
from lmim_jax.data.prepare import file_list, packed, parquet, webdataset, zip_archive
from lmim_jax.utils import buckets
from lmim_jax.utils.errors import UserError

FOLDER = "folder"
WEBDATASET = "webdataset"
PARQUET = "parquet"
ZIP = "zip"
LIST = "list"
KINDS = (FOLDER, WEBDATASET, PARQUET, ZIP, LIST)
SUFFIXES = {
    WEBDATASET: webdataset.ARCHIVES,
    PARQUET: (".parquet",),
    ZIP: (".zip",),
    LIST: (".csv", ".tsv", file_list.TEXT),
}
SHARDED = (WEBDATASET, PARQUET)  # kinds that consist of several files
# Words in the names of files and folders -> the split
SPLIT_WORDS = {
    "train": packed.TRAIN,
    "training": packed.TRAIN,
    "test": "test",
    "testing": "test",
    "val": "val",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
}
BRACES = re.compile(r"\{([^{}]*)\}")
NUMBERS = re.compile(r"(\d+)\.\.(\d+)")  # as in {000..127}
LISTED = 3

# (function of a path, paths) -> its results, in order
Run = Callable[[Callable[[str], Any], Sequence[str]], Iterable[Any]]


@dataclasses.dataclass(frozen=True)
class Given:
    """An input.

    Attributes:
      kind: one of KINDS.
      paths: the files; of FOLDER, the folder.
      roots: for each path, the folder that was given, or its own.
    """

    kind: str
    paths: tuple[str, ...]
    roots: tuple[str, ...]

    def describe(self) -> str:
        """The path, or that of the folder and the number of files."""
        if len(self.paths) == 1:
            return self.paths[0]
        return f"{self.roots[0]} ({len(self.paths):,} files)"


def recognize(arguments: Sequence[str], kind: str = "") -> Given:
    """Find out what the arguments are.

    Args:
      arguments: a folder, a file, several files, or patterns such as train-{000..127}.tar.
      kind: one of KINDS; "": by the suffixes of the files.

    Raises:
      UserError: something does not exist, or several kinds are possible.
    """
    paths: list[str] = []
    roots: list[str] = []
    kinds: dict[str, str] = {}  # of all paths, with an example
    for argument in itertools.chain.from_iterable(map(expand, arguments)):
        path = buckets.local_path(argument)
        if path.is_dir():
            found_kind, found = _look_into(path, kind)
            roots += [str(path)] * len(found)
        elif path.is_file():
            found_kind = kind or _kind_of_file(path)
            found = [str(path)]
            roots.append(str(path.parent))
        else:
            raise UserError(f"{argument}: there is no such file or folder")
        kinds.setdefault(found_kind, argument)
        paths += found
    if len(kinds) > 1:
        (first, example), (second, other) = list(kinds.items())[:2]
        raise UserError(
            f"{example} is {first} and {other} is {second}: prepare them as two datasets"
        )
    (found_kind,) = kinds
    if len(paths) > 1 and found_kind not in SHARDED:
        raise UserError(f"{' and '.join(paths[:LISTED])}: give one {found_kind} at a time")
    return Given(found_kind, tuple(paths), tuple(roots))


def expand(pattern: str) -> list[str]:
    """The names that a pattern with braces stands for: {000..127}, {cat,dog}.

    Raises:
      UserError: it stands for none.
    """
    found = BRACES.search(pattern)
    if not found:
        return [pattern]
    choices = found[1].split(",")
    numbers = NUMBERS.fullmatch(found[1])
    if numbers:
        first, last = numbers.groups()
        width = len(first)
        choices = [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
        if not choices:
            raise UserError(f"{pattern}: {found[0]} counts down, from {first} to {last}")
    elif len(choices) < 2:
        return [pattern]
    expanded = []
    for choice in choices:
        expanded += expand(pattern[: found.start()] + choice + pattern[found.end() :])
    return expanded


def _kind_of_file(path: pathlib.Path) -> str:
    for kind, suffixes in SUFFIXES.items():
        if path.name.lower().endswith(suffixes):
            return kind
    known = ", ".join(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)
    raise UserError(f"{path}: what is this? Known are {known}; say it with --kind")


def _look_into(folder: pathlib.Path, kind: str) -> tuple[str, list[str]]:
    """What a folder holds: its kind, and the folder itself or the files of that kind, sorted."""
    if kind == FOLDER:
        return kind, [str(folder)]
    if kind and kind not in SHARDED:
        raise UserError(f"{folder} is a folder; give the file, as {kind} is one")
    images, found = _count(folder)
    if kind and kind not in found:
        raise UserError(f"{folder} holds no {' or '.join(SUFFIXES[kind])} files")
    if kind:
        return kind, found[kind]
    if len(found) + bool(images) > 1:
        listed = [f"{images:,} images (--kind={FOLDER})"] if images else []
        for sharded, files in found.items():
            listed.append(f"{len(files):,} {SUFFIXES[sharded][0]} files (--kind={sharded})")
        raise UserError(f"{folder} holds {' and '.join(listed)}: say which to use")
    for sharded, files in found.items():
        return sharded, files
    return FOLDER, [str(folder)]  # without images, an error when it is opened


def _count(folder: pathlib.Path) -> tuple[int, dict[str, list[str]]]:
    """The number of images in a folder, and {kind: files, sorted} of shards."""
    listing = folder_listing.list_folder(folder)
    found: dict[str, list[str]] = {}
    for name in listing.others:
        for sharded in SHARDED:
            if name.lower().endswith(SUFFIXES[sharded]):
                found.setdefault(sharded, []).append(f"{folder}/{name}")
    return len(listing.images), found


def check_options(kind: str, image: str, label: str, root: str) -> None:
    """Check that a kind of input has the options that were given.

    Args:
      kind: one of KINDS.
      image: --image.
      label: --label; "none" is for all kinds.
      root: --root.

    Raises:
      UserError: it has not.
    """
    if image and kind not in SHARDED:
        raise UserError(f"--image={image}: there is no such option for a {kind}")
    if label not in ("", packed.NO_LABEL) and kind not in SHARDED:
        raise UserError(f"--label={label}: for a {kind} only --label={packed.NO_LABEL}")
    if root and kind != LIST:
        raise UserError(f"--root={root} is for lists of files, and this is a {kind}")


def open_splits(given: Given, image: str, label: str, root: str, run: Run) -> packed.Opened:
    """Sources of the splits of an input, other than a folder of images.

    Args:
      given: the input.
      image: which entry or column holds the images; "": the only one that does.
      label: which one holds the classes; "": by its name or type; "none": no classes.
      root: for lists, the folder that paths start from; "": that of the list.
      run: applies a function to many files, in parallel.

    Raises:
      UserError: see the functions of each kind; or there are no images.
    """
    if given.kind == ZIP:
        return zip_archive.open_splits(given.paths[0], label)
    if given.kind == LIST:
        return file_list.open_splits(given.paths[0], root, label)
    paths = split_files(given)
    if given.kind == PARQUET:
        opened = parquet.open_files(paths, image, label)
    else:
        index = webdataset.ShardIndex(image, label)
        parts = {split: list(run(index, files)) for split, files in paths.items()}
        opened = packed.open_parts(webdataset.TarSource, parts)
        found = itertools.chain.from_iterable(part.labels for part in parts[packed.TRAIN])
        if label not in ("", packed.NO_LABEL) and all(text is None for text in found):
            raise UserError(f"{given.describe()}: --label={label} is in no sample")
    if packed.TRAIN not in opened.splits:
        why = ", ".join(f"{count:,} {what}" for what, count in opened.left_out.items())
        raise UserError(f"{given.describe()}: there are no training images; {why or 'it is empty'}")
    return opened


def split_files(given: Given) -> dict[str, list[str]]:
    """{split: files, in the order given}, by the names of the files or else of their folders.

    Files whose names tell no split, or all the same one, are for training.

    Raises:
      UserError: only some names tell a split, or there are several without training images.
    """
    splits: dict[str, list[str]] = {}
    for path, root in zip(given.paths, given.roots, strict=True):
        splits.setdefault(split_of(path, root), []).append(path)
    if len(splits) == 1:
        return {packed.TRAIN: list(given.paths)}
    known = [split for split in splits if split]
    if "" in splits:
        raise UserError(
            f"{splits[''][0]} tells no split, but {splits[known[0]][0]} is of {known[0]}, by its "
            "name; rename it, or give the files to use"
        )
    if packed.TRAIN not in splits:
        raise UserError(f"there are files of the splits {' and '.join(known)}, none for training")
    order = sorted(known, key=packed.SPLITS.index)
    return {split: splits[split] for split in order}


def split_of(path: str, root: str) -> str:
    """The split that the name of a file, or of the folders between it and `root`, tells; or ""."""
    parts = pathlib.PurePath(path).relative_to(root).parts
    for part in reversed(parts):
        words = re.findall("[a-z]+", part.lower())
        found = {SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS}
        if len(found) == 1:
            return found.pop()
    return ""
