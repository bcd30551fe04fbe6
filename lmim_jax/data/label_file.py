"""Labels of images from a CSV file: classes, several 0/1 labels, or numbers; or only a list.

    image,label                image,cat,dog,outdoor        image,age,weight,split
    a/1.jpg,cat                a/1.jpg,1,0,1                a/1.jpg,3.5,12,train

The column `image` names the image. A column `split` says which split an image belongs to. What the
other columns are is the *kind* of the file:

  classes      one column, `label`: names or numbers of classes
  multilabel   columns of 0 and 1: any number of them may be 1
  regression   columns of numbers
  list         there are none: the images are a selection, and keep the labels that they have
"""

import csv
import dataclasses
import io
import math
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float32, Int, Int32

from lmim_jax.data.shared_array import SharedArray, share
from lmim_jax.utils import buckets
from lmim_jax.utils.errors import UserError

IMAGE = "image"
SPLIT = "split"
LABEL = "label"
CLASSES = "classes"
MULTILABEL = "multilabel"
REGRESSION = "regression"
LIST = "list"
KINDS = (CLASSES, MULTILABEL, REGRESSION, LIST)
AUTO = "auto"
DELIMITERS = (",", ";", "\t")

Row = tuple[int, list[str]]  # line in the file, cells


@dataclasses.dataclass(frozen=True)
class Targets:
    """Labels of images that are no classes.

    Attributes:
      kind: MULTILABEL or REGRESSION.
      names: of the labels.
      flat: float32 [N x T], the labels of image after image.
    """

    kind: str
    names: tuple[str, ...]
    flat: SharedArray

    @property
    def values(self) -> Float32[np.ndarray, "N T"]:
        """The labels of all images."""
        return self.flat.array.reshape(-1, len(self.names))

    def select(self, rows: Int[np.ndarray, " n"]) -> "Targets":
        """The labels of some images."""
        return dataclasses.replace(self, flat=share(self.values[rows].reshape(-1)))


@dataclasses.dataclass(frozen=True)
class LabelFile:
    """The rows of a file, in order.

    Attributes:
      path: of the file.
      kind: one of KINDS.
      images: the column `image`.
      lines: the line of each row in the file, counted from 1; the header is line 1.
      splits: the column `split`; None: there is none.
      names: of the classes, in the order of their numbers (as numbers if all are whole numbers,
        else as text), or of the columns of labels.
      classes: the class of each row; None for the other kinds.
      values: the labels of each row; None for classes and lists.
    """

    path: str
    kind: str
    images: tuple[str, ...]
    lines: tuple[int, ...]
    splits: tuple[str, ...] | None
    names: tuple[str, ...]
    classes: Int32[np.ndarray, " N"] | None
    values: Float32[np.ndarray, "N T"] | None

    def __len__(self) -> int:
        return len(self.images)

    def select(self, rows: Sequence[int]) -> "LabelFile":
        """Some of the rows."""
        chosen = np.asarray(rows, np.int64)
        splits = self.splits
        if splits is not None:
            splits = tuple(splits[i] for i in chosen)
        return dataclasses.replace(
            self,
            images=tuple(self.images[i] for i in chosen),
            lines=tuple(self.lines[i] for i in chosen),
            splits=splits,
            classes=None if self.classes is None else self.classes[chosen],
            values=None if self.values is None else self.values[chosen],
        )

    def where(self, row: int) -> str:
        """The file and the line of a row, for messages."""
        return f"{self.path}, line {self.lines[row]}"

    def describe(self) -> str:
        """What was found, in a few words."""
        count = f"{len(self.names):,}"
        content = {
            LIST: "images, without labels",
            CLASSES: f"{count} classes",
            MULTILABEL: f"{count} x 0 or 1",
            REGRESSION: f"{count} x a number",
        }[self.kind]
        return f"{self.kind}: {len(self):,} rows, {content}"


def read(path: buckets.Pathname, kind: str = AUTO) -> LabelFile:
    """Read a file.

    Args:
      path: of a CSV file (UTF-8) with a header; separated by commas, semicolons or tabs.
      kind: one of KINDS, or AUTO: a column `label` holds classes; other columns are labels of 0
        and 1 if all their values are, and else numbers.

    Raises:
      UserError: it cannot be read, or a row cannot; the message names the file and the line.
    """
    if kind not in (AUTO, *KINDS):
        raise UserError(f"labels_kind={kind!r} must be one of: {' | '.join((AUTO, *KINDS))}")
    header, rows = _read_rows(path)
    columns = [place for place, name in enumerate(header) if name not in (IMAGE, SPLIT)]
    names = tuple(header[place] for place in columns)
    images = tuple(cells[header.index(IMAGE)].removeprefix("./") for _, cells in rows)
    lines = tuple(line for line, _ in rows)
    splits = None
    if SPLIT in header:
        splits = tuple(cells[header.index(SPLIT)] for _, cells in rows)
    _check_unique(path, images, splits, lines)
    if kind == AUTO:
        kind = _guess_kind(path, names, columns, rows)
    classes = None
    values = None
    if kind == CLASSES:
        if len(columns) != 1:
            raise UserError(
                f"{path}: classes need one column beside image and split, not "
                f"{len(columns)} ({', '.join(names)})"
            )
        names, classes = _number_classes([cells[columns[0]] for _, cells in rows])
    elif kind == LIST:
        names = ()
    elif not columns:
        raise UserError(f"{path}: there is no column of labels, only {', '.join(header)}")
    else:
        values = _read_values(path, kind, columns, header, rows)
    return LabelFile(str(path), kind, images, lines, splits, names, classes, values)


def _read_rows(path: buckets.Pathname) -> tuple[list[str], list[Row]]:
    """The header and the rows of a file, of which no cell is empty."""
    try:
        text = buckets.path(path).read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a CSV file ({error})") from error
    first = text.partition("\n")[0]
    delimiter = max(DELIMITERS, key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        _check_header(path, header)
        rows = list(_checked_rows(path, header, reader))
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}") from error
    if not rows:
        raise UserError(f"{path} has a header and no rows")
    return header, rows


def _check_header(path: buckets.Pathname, header: Sequence[str]) -> None:
    if IMAGE not in header:
        raise UserError(
            f"{path}, line 1: the header needs a column named {IMAGE}, as in "
            f"'{IMAGE},{LABEL}'; it is {','.join(header)[:80]!r}"
        )
    for name in header:
        if not name or header.count(name) > 1:
            raise UserError(f"{path}, line 1: two columns are named {name!r}, or one is nameless")


def _checked_rows(
    path: buckets.Pathname, header: Sequence[str], reader: Iterator[list[str]]
) -> Iterator[Row]:
    """Rows with as many cells as the header, none of them empty; empty lines are left out."""
    for cells in reader:
        line = reader.line_num  # type: ignore[attr-defined]
        stripped = [cell.strip() for cell in cells]
        if not any(stripped):
            continue
        if len(stripped) != len(header):
            raise UserError(
                f"{path}, line {line}: {len(stripped)} cells, but the header has {len(header)}"
            )
        if "" in stripped:
            name = header[stripped.index("")]
            raise UserError(f"{path}, line {line}: the cell of column {name} is empty")
        yield line, stripped


def _check_unique(
    path: buckets.Pathname,
    images: Sequence[str],
    splits: Sequence[str] | None,
    lines: Sequence[int],
) -> None:
    first: dict[tuple[str, str], int] = {}
    for place, (image, line) in enumerate(zip(images, lines, strict=True)):
        key = (image, splits[place] if splits else "")
        if key in first:
            raise UserError(f"{path}, line {line}: {image!r} is already in line {first[key]}")
        first[key] = line


def _guess_kind(
    path: buckets.Pathname, names: Sequence[str], columns: Sequence[int], rows: Sequence[Row]
) -> str:
    """The kind that the columns of labels show."""
    if not names:
        return LIST
    if list(names) == [LABEL]:
        return CLASSES
    values = {cells[place] for _, cells in rows for place in columns}
    if values <= {"0", "1"}:
        return MULTILABEL
    if len(columns) == 1 and not any(_is_number(cells[columns[0]]) for _, cells in rows):
        raise UserError(
            f"{path}: the column {names[0]} holds no numbers; name it {LABEL} if these are classes"
        )
    return REGRESSION


def _is_number(cell: str) -> bool:
    try:
        return math.isfinite(float(cell))
    except ValueError:
        return False


def _number_classes(
    cells: Sequence[str],
) -> tuple[tuple[str, ...], Int32[np.ndarray, " N"]]:
    """The names of the classes in order, and the class of each cell."""
    found = sorted(set(cells))
    if all(_is_whole(name) for name in found):
        found.sort(key=int)
    numbers = {name: number for number, name in enumerate(found)}
    return tuple(found), np.array([numbers[cell] for cell in cells], np.int32)


def _is_whole(cell: str) -> bool:
    return cell.removeprefix("-").isdecimal()


def _read_values(
    path: buckets.Pathname,
    kind: str,
    columns: Sequence[int],
    header: Sequence[str],
    rows: Sequence[Row],
) -> Float32[np.ndarray, "N T"]:
    """The labels of all rows."""
    values = np.empty((len(rows), len(columns)), np.float32)
    for row, (line, cells) in enumerate(rows):
        for column, place in enumerate(columns):
            cell = cells[place]
            if not _is_number(cell):
                raise UserError(
                    f"{path}, line {line}: {cell!r} in column {header[place]} is not a number"
                )
            values[row, column] = float(cell)
            if kind == MULTILABEL and float(cell) not in (0, 1):
                raise UserError(
                    f"{path}, line {line}: {cell!r} in column {header[place]} is neither 0 nor 1"
                )
    return values
