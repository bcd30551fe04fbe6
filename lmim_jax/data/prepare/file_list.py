"""A list of image files: a CSV file `image,label`, or a text file with a path in each line."""

import dataclasses
import pathlib
import re
from collections.abc import Sequence

import numpy as np

from lmim_jax.data import label_file
from lmim_jax.data.decode import SUFFIXES
from lmim_jax.data.prepare import folders, packed
from lmim_jax.utils import buckets
from lmim_jax.utils.errors import UserError

TEXT = ".txt"
MISSING = -1  # size of a file that is not there
NUMBERED = re.compile(r"(.*\S)\s+(-?\d+)")  # a path and the number of a class


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The rows of a list.

    Attributes:
      names: paths of the images.
      labels: their classes; None: their folders.
      splits: their splits; None: their topmost folders.
    """

    names: Sequence[str]
    labels: Sequence[str | None] | None
    splits: Sequence[str] | None


def open_splits(path: str, root: str, label: str) -> packed.Opened:
    """Sources of the splits of a list, in its order.

    Args:
      path: of the list. CSV: see data/label_file.py; the column `split` says which split an image
        is of. Without that column and without labels, folders are splits and classes, see
        `folders`. Text: in each line a path, or a path and the number of a class.
      root: the folder that its paths start from; "": that of the list.
      label: "none": no labels.

    Raises:
      UserError: a line cannot be read, labels are no classes, or all files are missing.
    """
    folder = pathlib.Path(root or pathlib.Path(path).parent).expanduser()
    if not folder.is_dir():
        raise UserError(f"--root={root} is not a folder")
    is_text = path.lower().endswith(TEXT)
    rows = _read_lines(path) if is_text else _read_table(path, label)
    names = [name.removeprefix(f"{folder}/") for name in rows.names]
    splits = rows.splits
    prefixes = [""] * len(names)
    if splits is None:
        splits, prefixes = folders.splits_of(names)
    parts: dict[str, list[packed.Part]] = {}
    for split in folders.in_order(splits):
        chosen = [row for row, other in enumerate(splits) if other == split]
        prefix = prefixes[chosen[0]]
        inner = [names[row].removeprefix(prefix) for row in chosen]
        labels: Sequence[str | None] = [None] * len(inner)
        if rows.labels is not None:
            labels = [rows.labels[row] for row in chosen]
        elif label != packed.NO_LABEL:
            labels = folders.labels_of(inner, required=not prefix)
        parts[split] = [_part(folder / prefix, inner, labels)]
    if packed.TRAIN not in parts:
        raise UserError(
            f"{path}: no image is of the split {packed.TRAIN}, but of: {', '.join(parts)}"
        )
    if all((part.sizes == MISSING).all() for (part,) in parts.values()):
        raise UserError(
            f"{path}: none of its {len(names):,} files is there, such as {folder / names[0]}; give "
            "the folder that the paths start from: --root=DIR"
        )
    opened = packed.open_parts(FileSource, parts)
    unused = splits.count("")
    if unused:
        opened.left_out["images that are in no folder of a split"] = unused
    return opened


def _read_lines(path: str) -> _Rows:
    """The rows of a text file.

    Raises:
      UserError: a line names no image, or only some lines have a number.
    """
    try:
        text = buckets.local_path(path).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a list of files ({error})") from error
    names = []
    labels: list[str | None] = []
    for number, line in enumerate(text.splitlines(), 1):
        name = line.strip()
        if not name:
            continue
        label = None
        numbered = NUMBERED.fullmatch(name)
        if numbered and not name.lower().endswith(SUFFIXES):
            name, label = numbered.groups()
        if not name.lower().endswith(SUFFIXES):
            raise UserError(
                f"{path}, line {number}: {name[:80]!r} is no path of an image; a line is a path, "
                "or a path and the number of a class"
            )
        if labels and (label is None) != (labels[0] is None):
            raise UserError(
                f"{path}, line {number}: only some lines end with the number of a class"
            )
        names.append(name.removeprefix("./"))
        labels.append(label)
    if not names:
        raise UserError(f"{path} is empty; each line must be the path of an image")
    return _Rows(names, labels if labels[0] is not None else None, None)


def _read_table(path: str, label: str) -> _Rows:
    """The rows of a CSV file.

    Raises:
      UserError: its labels are no classes.
    """
    kind = label_file.LIST if label == packed.NO_LABEL else label_file.AUTO
    file = label_file.read(path, kind)
    labels = None
    if file.classes is not None:
        labels = [file.names[number] for number in file.classes]
    elif file.kind != label_file.LIST:
        raise UserError(
            f"{path} holds {file.kind} labels, and prepared datasets only classes; prepare the "
            f"images with --label={packed.NO_LABEL}, and train with --config.data.labels={path}"
        )
    return _Rows(file.images, labels, file.splits)


def _part(folder: pathlib.Path, names: Sequence[str], labels: Sequence[str | None]) -> packed.Part:
    sizes = []
    for name in names:
        file = folder / name
        sizes.append(file.stat().st_size if file.is_file() else MISSING)
    places = np.zeros(len(names), np.int64)
    return packed.Part(str(folder), names, places, np.array(sizes, np.int64), labels)


class FileSource(packed.PackedSource):
    """Image files; `paths` are the folders that their names start from."""

    def read(self, path: str, index: int) -> bytes:
        """The content of a file."""
        return pathlib.Path(path, self.files[index]).read_bytes()

    def _others(self, index: int) -> list[str]:
        return [self.name(place) for place in {0, len(self) // 2, len(self) - 1} - {index}]
