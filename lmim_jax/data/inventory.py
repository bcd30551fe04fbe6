"""What I found: a few lines on the images of a run, at its start; kept with the run.

They say what is used, and what looks as if it should be used but is not: other splits, files that
are not images, images without a class.
"""

import bisect
import collections
import dataclasses
import os
import pathlib
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict

from lmim_jax.data import label_file, labeled_folder, records, sources
from lmim_jax.data.eval.eval_data import known_labels
from lmim_jax.data.folder_listing import SPLIT, Listing, Names
from lmim_jax.data.label_file import Targets
from lmim_jax.data.paired_source import PairedSource, describe_missing
from lmim_jax.data.samples import Header, read_header
from lmim_jax.data.sources import FolderSource, Listings

SAMPLED = 32  # images whose headers are read
WIDTH = 91  # columns of a line; the log adds the time
LINES = 12  # at most, with the heading
TITLE_WIDTH = 12
LISTED = 3  # names in a line
LAST_NAME = "\U0010ffff"  # sorts after every name

Line = tuple[str, str]  # title, text


@dataclasses.dataclass(frozen=True)
class Places:
    """Where images come from, and the names of the options that change it.

    Attributes:
      path: the folder that was given; "": not a folder.
      train: name of the training split below it.
      test: name of the test split; "": none.
      flag: what precedes the names of options, such as "--config.data."; "": there are none.
      canvas: larger images are shrunk to this long side when they are decoded; 0: they are not.
      labels: lines on the file that labels and splits come from; (): there is none.
    """

    path: str
    train: str
    test: str
    flag: str
    canvas: int
    labels: tuple[Line, ...] = ()


def describe_config(
    config: ConfigDict, splits: Mapping[str, Any], listings: Listings, flag: str
) -> list[str]:
    """`describe` for `config.data`.

    Args:
      config: see configs/vit_b.py.
      splits: its sources.
      listings: see `describe`.
      flag: the flag that holds these options, such as "--config.data".
    """
    path = config.path if sources.kind(config) == "folder" else ""
    labels: list[Line] = []
    if config.labels:
        labels = _describe_labels(config, listings, f"{flag}.")
    places = Places(
        path, config.train_split, config.test_split, f"{flag}.", config.canvas, tuple(labels)
    )
    return describe(splits, listings, places)


def _describe_labels(config: ConfigDict, listings: Listings, flag: str) -> list[Line]:
    """The file of labels: its kind, rows without images, images without rows."""
    file = label_file.read(config.labels, config.labels_kind)
    reason = f"{flag}labels_kind={config.labels_kind}"
    if config.labels_kind == label_file.AUTO:
        others = [kind for kind in label_file.KINDS if kind != file.kind]
        reason = f"another kind: {flag}labels_kind={'|'.join(others)}"
    lines = [("labels", f"{file.path}, {file.describe()}; {reason}")]
    if sources.kind(config) != "folder":
        return lines
    matched = labeled_folder.match(config, listings)
    if matched.missing:
        listed = _first_few(matched.missing, len(matched.missing), 1)
        lines.append(("CAUTION", f"{len(matched.missing):,} rows without an image: {listed}"))
    unlisted = matched.unlisted
    if unlisted:
        listed = _first_few(unlisted, len(unlisted))
        lines.append(("no row", f"{len(unlisted):,} images are not in the file: {listed}"))
    for name, count in matched.other_splits.items():
        text = f"{count:,} rows of split {name}"
        if config.test_split and not matched.is_test.any():
            text += f"; {flag}test_split={name} would test on them"
        lines.append(("not used", text))
    return lines


def _describe_targets(targets: Targets) -> str:
    """The range of each number, or how many images have each label."""
    parts = []
    for name, column in zip(targets.names, targets.values.T, strict=True):
        if targets.kind == label_file.MULTILABEL:
            parts.append(f"{name} {100 * column.mean():.3g} %")
        else:
            parts.append(f"{name} {column.min():.4g} .. {column.max():.4g}")
    return f"{len(parts)} labels: {_first_few(parts, len(parts))}"


def describe(
    splits: Mapping[str, Any], listings: Listings, places: Places, others: Sequence[Line] = ()
) -> list[str]:
    """Lines on the images of a run or a tool, at most LINES of WIDTH columns.

    Args:
      splits: {name: source, or None where there is none}.
      listings: of the folders that were listed to open them.
      places: where they come from.
      others: lines on what the listings do not tell.
    """
    counts = []
    lines: list[Line] = []
    for split, source in splits.items():
        count = len(source) if source else 0
        counts.append(f"{count:,} {'training' if split == 'train' else split}")
        if source:
            lines += _describe_split(split, source, splits["train"], listings)
    where = f" in {places.path}" if places.path else ""
    heading = f"What I found{where}: {' and '.join(counts)} images"
    lines += places.labels
    if not places.labels:
        lines += _describe_places(splits, listings, places)
    lines += describe_files([listings[top] for top in sorted(listings)])
    lines += others
    train = splits["train"]
    names = getattr(train, "modalities", ())
    for place, name in enumerate(names or ("sizes",)):
        lines.append((name, _describe_headers(train, places.canvas, place)))
    return _layout(heading, lines)


def describe_folder(listing: Listing, read: Callable[[str], bytes]) -> list[str]:
    """Lines on the images of a folder without splits.

    Args:
      listing: of the folder.
      read: the content of a file, given its name.
    """
    heading = f"What I found in {listing.top}: {len(listing.images):,} images"
    sampled = [listing.images[index] for index in _sample(len(listing.images))]
    lines = describe_files([listing])
    lines.append(("sizes", _summarize(_read_headers(sampled, read), len(sampled), 0)))
    return _layout(heading, lines)


def describe_files(listings: Iterable[Listing]) -> list[Line]:
    """Lines on what was left out: other files, links, folders that cannot be listed."""
    suffixes: collections.Counter[str] = collections.Counter()
    examples: list[str] = []
    links = []
    closed: list[str] = []
    for listing in listings:
        suffixes.update(listing.suffixes)
        name = _last(listing.top)
        examples += [f"{name}/{other}" for other in listing.others[:1]]
        links += [f"{name}/{link} -> {target}" for link, target in listing.skipped_links]
        closed += [f"{name}/{folder}" for folder in listing.unreadable]
    lines = []
    if suffixes:
        parts = []
        for suffix, count in suffixes.most_common(2 * LISTED):
            parts.append(f"{count:,} {suffix or 'without suffix'}")
        if len(suffixes) > 2 * LISTED:
            parts.append("...")
        example = examples[0]
        if suffixes.total() > 1:
            example += ", ..."
        lines.append(("other files", f"{', '.join(parts)}: left out ({example})"))
    if links:
        listed = _first_few(links, len(links), 1)
        lines.append(("links", f"{listed}: left out, each real folder is used once"))
    if closed:
        lines.append(("closed", f"{_first_few(closed, len(closed))}: may not be listed, left out"))
    return lines


def _describe_split(split: str, source: Any, train: Any, listings: Listings) -> list[Line]:
    """Images and classes of a split, and its images without a class."""
    labels, complete = known_labels(source)
    known = labels[labels >= 0]
    title = split
    if isinstance(source, PairedSource):
        text = f"{len(source):,} images, each in {' and '.join(source.modalities)}"
        of_classes = _describe_classes(source.classes, known) if len(known) else "without classes"
        missing: list[Line] = [("no partner", line) for line in describe_missing(source)]
        return [(title, f"{text}, {of_classes}"), *missing]
    text = _describe_count(source, listings)
    if getattr(source, "targets", None):
        return [(title, f"{text}, {_describe_targets(source.targets)}")]
    if isinstance(source, FolderSource):
        title = _split_title(split, source, train)
        if not len(known):
            listing = listings[source.root]
            return [(title, _describe_without_classes(source, train, listing, text))]
    if not len(known):
        return [(title, f"{text} without classes")]
    classes = source.classes
    if not complete:
        text += f", {len(classes):,} classes"
        if len(known) < len(labels):
            text += f"; of {len(labels)} that were read, {len(labels) - len(known)} have no class"
        return [(title, text)]
    lines = [(title, f"{text}, {_describe_classes(classes, known)}")]
    if len(known) < len(labels):
        lines.append(_describe_unlabeled(title, source, labels))
    folded = collections.Counter(name.casefold() for name in classes)
    twins = [name for name in classes if folded[name.casefold()] > 1]
    if twins and split == "train":
        lines.append(("class names", f"differ only in case: {_first_few(twins, len(twins), 4)}"))
    return lines


def _describe_count(source: Any, listings: Listings) -> str:
    """How many images a split has, and of how many of its folder."""
    text = f"{len(source):,} images"
    if isinstance(source, FolderSource) and len(source) < len(listings[source.root].images):
        text = f"{len(source):,} of {len(listings[source.root].images):,} images"
    return text


def _split_title(split: str, source: FolderSource, train: FolderSource) -> str:
    """What a split of a folder is called: its subfolder, if it is one."""
    if source.labels_checksum:
        return split
    if split != "train" and source.root == train.root:
        return "held out"
    return _last(source.root) + "/"


def _describe_classes(classes: Sequence[str], labels: Int[np.ndarray, " n"]) -> str:
    """The number and sizes of the classes, and the share of the largest one."""
    counts = np.bincount(labels, minlength=len(classes))
    present = counts[counts > 0]
    text = f"{len(classes):,} classes"
    if len(present) < len(classes):
        text = f"{len(present):,} of {len(classes):,} classes"
    if present.min() == present.max():
        return f"{text}, {present[0]:,} images each"
    share = 100 * present.max() / len(labels)
    largest = classes[int(counts.argmax())]
    return f"{text}, {present.min():,} to {present.max():,} images each ({largest}: {share:.0f} %)"


def _describe_without_classes(
    source: FolderSource, train: FolderSource, listing: Listing, text: str
) -> str:
    """A folder without classes, `text`, and what would give it some."""
    if len(source) < len(listing.images):
        text = f"the first {text}"
    text += " without classes"
    if source is not train and train.classes:
        return f"{text}; in {_last(source.root)}/CLASS/, accuracies could be measured"
    if len(listing.classes) == 1 and not listing.loose and not listing.split_like:
        return f"{text}: {listing.classes[0]}/ is the only folder, which says nothing"
    return text


def _describe_unlabeled(title: str, source: FolderSource, labels: Int[np.ndarray, " N"]) -> Line:
    """The images of a labeled split that have no class."""
    without = np.flatnonzero(labels < 0)
    prefix = title if title.endswith("/") else ""
    names = [prefix + source.files[int(index)] for index in without[:LISTED]]
    listed = _first_few(names, len(without), 2)
    text = f"{len(without):,} of the images in {title}, unlabeled: {listed}"
    if title not in ("train/", "train") and "/" in source.files[int(without[0])]:
        text += " (not in train/)"
    return ("no class", text)


def _describe_places(splits: Mapping[str, Any], listings: Listings, places: Places) -> list[Line]:
    """Folders that look like splits: those that are not used, and those that are by mistake."""
    train = splits["train"]
    if not places.path or not isinstance(train, FolderSource):
        return []
    root = pathlib.Path(places.path).expanduser()
    listing = listings[train.root]
    lines = _describe_inner_splits(listing, train, root, places)
    if pathlib.Path(train.root) == root:
        return lines
    used = {_last(source.root) for source in splits.values() if source} | {places.test}
    others = sorted(
        entry.name
        for entry in os.scandir(root)
        if entry.is_dir() and not entry.name.startswith(".") and entry.name not in used
    )
    alike = [name for name in others if SPLIT.fullmatch(name)]
    if alike:
        listed = _first_few([f"{name}/" for name in alike], len(alike))
        text = listed
        if places.flag:
            text += f"; {places.flag}test_split={alike[0]} would test on it"
        lines.append(("not used", text))
    elif others:
        listed = _first_few([f"{name}/" for name in others], len(others))
        lines.append(("not used", listed))
    if places.test and "test" in splits and splits["test"] is None and not alike:
        lines.append(("test images", f"none in {places.test}/"))
    return lines


def _describe_inner_splits(
    listing: Listing, train: FolderSource, root: pathlib.Path, places: Places
) -> list[Line]:
    """Folders among the training images that look like splits."""
    lines = []
    where = ""
    if pathlib.Path(listing.top) != root:
        where = f"{_last(listing.top)}/"
    tests = [path for path in listing.split_like if not _is_train(path)]
    for path in tests[:2]:
        count = _count_below(train.files, f"{path}/")
        if count:
            text = f"{count:,} of the training images are in {where}{path}/, as if for tests"
            lines.append(("CAUTION", text))
            way_out = _way_out(listing, path, root, places)
            if way_out:
                lines.append(("", f"to test on it, give {way_out}"))
    return lines


def _way_out(listing: Listing, path: str, root: pathlib.Path, places: Places) -> str:
    """How a folder among the training images would become a split; "" if that is not clear."""
    parent = _parent(path)
    siblings = [p for p in listing.split_like if _parent(p) == parent]
    trains = [_last(p) for p in siblings if _is_train(p)]
    if not places.flag or not trains or pathlib.Path(listing.top) != root:
        return ""
    options = []
    if parent:
        options.append(f"the folder {parent}/ as {places.flag}path")
    if trains[0] != places.train:
        options.append(f"{places.flag}train_split={trains[0]}")
    if _last(path) != places.test:
        options.append(f"{places.flag}test_split={_last(path)}")
    return ", ".join(options)


def _is_train(path: str) -> bool:
    """Whether a folder that looks like a split is for training, by its name."""
    return _last(path).lower().startswith("train")


def _last(path: str) -> str:
    """The last part of a path with "/"."""
    return path.rstrip("/").rpartition("/")[2]


def _parent(path: str) -> str:
    """The path without its last part."""
    return path.rpartition("/")[0]


def _count_below(names: Names, prefix: str) -> int:
    """How many of some sorted names begin with a prefix."""
    first = bisect.bisect_left(names, prefix)
    return bisect.bisect_left(names, prefix + LAST_NAME) - first


def _sample(count: int) -> list[int]:
    """Some of `count` indices, evenly spaced."""
    return np.unique(np.linspace(0, count - 1, min(SAMPLED, count)).astype(int)).tolist()


def _describe_headers(source: Any, canvas: int, place: int) -> str:
    """Sizes and modes of a sample of images, in the modality of this place."""
    indices = _sample(len(source))

    def read(index: int) -> bytes:
        return records.unpack(source.record(index)[0])[place]

    return _summarize(_read_headers(indices, read), len(indices), canvas)


def _read_headers(keys: Iterable[Any], read: Callable[[Any], bytes]) -> list[Header]:
    """The headers of images; those that cannot be read are reported when they are decoded."""
    headers = []
    for key in keys:
        try:
            headers.append(read_header(read(key)))
        except Exception:  # decoders raise errors of any type on damaged data
            continue
    return headers


def _summarize(headers: Sequence[Header], sampled: int, canvas: int) -> str:
    """The sizes, modes and formats of images in a line."""
    if not headers:
        return f"none of {sampled} images can be read"
    smallest = min(headers, key=_pixels)
    largest = max(headers, key=_pixels)
    text = f"{smallest.width} x {smallest.height}"
    if _pixels(smallest) != _pixels(largest):
        text += f" to {largest.width} x {largest.height}"
    modes = collections.Counter(header.mode for header in headers)
    formats = collections.Counter(header.format for header in headers)
    text += f" pixels, {_shares(modes)}, {_shares(formats)} ({sampled} read"
    if len(headers) < sampled:
        text += f", {sampled - len(headers)} damaged"
    text += ")"
    if canvas and max(max(header.width, header.height) for header in headers) > canvas:
        text += f"; shrunk to {canvas}"
    return text


def _pixels(header: Header) -> int:
    return header.width * header.height


def _shares(counts: collections.Counter[str]) -> str:
    """Values with their numbers, if there are several: "RGB" or "RGB 30 + L 2"."""
    if len(counts) == 1:
        return next(iter(counts))
    return " + ".join(f"{value} {count}" for value, count in counts.most_common())


def _first_few(names: Sequence[str], count: int, limit: int = LISTED) -> str:
    """The first few of `count` names."""
    listed = ", ".join(names[:limit])
    if count > limit:
        listed += f" and {count - limit} more"
    return listed


def _layout(heading: str, lines: Sequence[Line]) -> list[str]:
    """The heading and the lines, none wider or more than allowed."""
    block = [_clip(heading)]
    for title, text in lines:
        line = _printable(f"  {title:<{TITLE_WIDTH}} {text}")
        indent = " " * (TITLE_WIDTH + 3)
        wrapped = textwrap.wrap(
            line, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        )
        block += [_clip(part) for part in wrapped]
    if len(block) > LINES:
        left_out = len(block) - LINES + 1
        block = [*block[: LINES - 1], f"  ... and {left_out} lines more"]
    return block


def _printable(line: str) -> str:
    """A line without line breaks and other characters of names that a terminal cannot show."""
    return re.sub(r"[^ -~\u00a1-\ud7ff\uf900-\U0010ffff]", "?", line)


def _clip(line: str) -> str:
    """A line with its middle left out if it is too wide."""
    line = _printable(line)
    if len(line) <= WIDTH:
        return line
    head = WIDTH // 2
    return f"{line[:head]} ... {line[len(line) - (WIDTH - head - 5) :]}"
