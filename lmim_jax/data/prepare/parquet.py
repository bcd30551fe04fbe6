"""Parquet files of Hugging Face datasets: a column of images, and perhaps one of classes.

Images are struct<bytes, path>, or plain bytes. Names, labels and sizes are read column by column;
the images row group after row group, a few rows at a time.
"""

import dataclasses
import functools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from lmim_jax.data.image_options import BadImage
from lmim_jax.data.prepare import packed
from lmim_jax.utils import faults
from lmim_jax.utils.errors import UserError

LABEL = "label"
ROWS = 16  # that are read at a time
BYTES = "bytes"  # fields of an image
PATH = "path"


@dataclasses.dataclass(frozen=True)
class Columns:
    """Which columns of a file are used.

    Attributes:
      image: name of the column.
      is_struct: whether it has the fields bytes and path; False: it is the bytes.
      has_path: whether there are paths.
      label: name of the column; "": unlabeled.
      classes: names of the classes that the file tells; None: the labels name themselves.
    """

    image: str
    is_struct: bool
    has_path: bool
    label: str
    classes: tuple[str, ...] | None

    @property
    def image_bytes(self) -> str:
        """The path of the encoded bytes in the schema."""
        return f"{self.image}.{BYTES}" if self.is_struct else self.image


def open_files(paths: dict[str, list[str]], image: str, label: str) -> packed.Opened:
    """Sources of the files of each split.

    Args:
      paths: {split: files in order}.
      image: name of the column; "": found by its type.
      label: name of the column of classes; "": the only ClassLabel, or `label`; "none": no labels.

    Raises:
      UserError: a file is damaged, columns are missing or unclear, files differ in them, or there
        are only paths of images.
    """
    first = ""
    chosen: Columns | None = None
    for files in paths.values():
        for path in files:
            columns = find_columns(path, image, label)
            if chosen is None:
                first = path
                chosen = columns
            elif columns != chosen:
                raise UserError(
                    f"{path} and {first} differ in their columns of images or classes: "
                    f"{_describe(columns)}, and {_describe(chosen)}; prepare them as two datasets, "
                    "or name the columns with --image and --label"
                )
    assert chosen is not None
    _check_bytes(first, chosen)
    parts = {}
    for split, files in paths.items():
        parts[split] = [read_index(path, chosen) for path in files]
    make = functools.partial(ParquetSource, column=chosen.image_bytes)
    return packed.open_parts(make, parts, chosen.classes)


def _describe(columns: Columns) -> str:
    text = f"{columns.image}, {columns.label or 'no label'}"
    if columns.classes:
        text += f" of {len(columns.classes)} classes"
    return text


def open_parquet(path: str) -> Any:
    """A file, whose footer is read.

    Raises:
      UserError: it is no parquet file, or truncated.
    """
    import pyarrow as pa
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
    except (pa.ArrowException, OSError) as error:
        if faults.is_environment_fault(error):
            raise
        reason = faults.first_line(error)
        raise UserError(f"{path} is no whole parquet file ({reason}); fetch it again") from error


def find_columns(path: str, image: str, label: str) -> Columns:
    """Which columns of a file are used; see `open_files` for the arguments."""
    schema = open_parquet(path).schema_arrow
    features = _features(schema)
    image = image or _find_image(path, schema, features)
    image_type = _type_of(path, schema, image, "--image")
    fields: list[str] = []
    if _is_struct(image_type):
        fields = [image_type.field(i).name for i in range(image_type.num_fields)]
    elif not _is_bytes(image_type):
        raise UserError(f"{path}: the column {image} is {image_type}, and holds no images")
    if label == packed.NO_LABEL:
        return Columns(image, bool(fields), PATH in fields, "", None)
    label = label or _find_label(path, schema, features)
    names = None
    if label:
        _check_label(path, label, _type_of(path, schema, label, "--label"))
        names = features.get(label, {}).get("names")
    return Columns(image, bool(fields), PATH in fields, label, tuple(names) if names else None)


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """{column: what the library `datasets` has noted about it}."""
    metadata = (schema.metadata or {}).get(b"huggingface")
    if not metadata:
        return {}
    noted = json.loads(metadata).get("info", {}).get("features") or {}
    features = {}
    for name, value in noted.items():
        if name in schema.names and isinstance(value, dict):
            features[name] = value
    return features


def _of_kind(features: dict[str, dict[str, Any]], kind: str) -> list[str]:
    return [name for name, value in features.items() if value.get("_type") == kind]


def _find_image(path: str, schema: Any, features: dict[str, dict[str, Any]]) -> str:
    """The column of images, by what is noted, else by its type."""
    candidates = _of_kind(features, "Image")
    if not candidates:
        candidates = [field.name for field in schema if _is_struct(field.type)]
    if not candidates:
        candidates = [field.name for field in schema if _is_bytes(field.type)]
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        raise UserError(
            f"{path} has several columns of images ({', '.join(candidates)}); say which to use, as "
            f"in --image={candidates[0]}"
        )
    raise UserError(f"{path} has no column of images (struct<bytes, path>): {_list(schema)}")


def _find_label(path: str, schema: Any, features: dict[str, dict[str, Any]]) -> str:
    """The column of classes; "": there is none."""
    candidates = _of_kind(features, "ClassLabel")
    if len(candidates) > 1 and LABEL not in candidates:
        raise UserError(
            f"{path} has several columns of classes ({', '.join(candidates)}); say which to use, "
            f"as in --label={candidates[0]}, or --label={packed.NO_LABEL}"
        )
    if len(candidates) == 1:
        return candidates[0]
    return LABEL if LABEL in schema.names else ""


def _type_of(path: str, schema: Any, name: str, flag: str) -> Any:
    if name not in schema.names:
        raise UserError(f"{flag}={name}: {path} has no such column; it has {_list(schema)}")
    return schema.field(name).type


def _list(schema: Any) -> str:
    return ", ".join(f"{field.name} ({str(field.type)[:40]})" for field in schema)


def _is_bytes(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_struct(kind: Any) -> bool:
    import pyarrow as pa

    if not pa.types.is_struct(kind):
        return False
    place = kind.get_field_index(BYTES)
    return place >= 0 and _is_bytes(kind.field(place).type)


def _check_label(path: str, name: str, kind: Any) -> None:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (
        pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)
    ):
        raise UserError(
            f"{path}: the column {name} is {kind}, and holds no classes, which are whole numbers "
            f"or texts; give another one, or --label={packed.NO_LABEL}"
        )


def _check_bytes(path: str, columns: Columns) -> None:
    """Raise a UserError if the first images are only paths."""
    reader = Rows(path, columns.image_bytes)
    count = min(ROWS, reader.file.metadata.num_rows)
    if count and all(reader.read(row) is None for row in range(count)):
        raise UserError(
            f"{path}: the column {columns.image} holds paths of images, but not the images; save "
            "the dataset with them (datasets.Dataset.push_to_hub embeds them), or prepare the "
            "folder of the images"
        )


def read_index(path: str, columns: Columns) -> packed.Part:
    """What a file holds, without the images.

    Raises:
      UserError: it is damaged, or a label is none of the classes.
    """
    file = open_parquet(path)
    metadata = file.metadata
    names: list[str] = []
    labels: list[str | None] = []
    sizes = []
    stem = path.rpartition("/")[2].removesuffix(".parquet")
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        paths = [None] * rows
        if columns.has_path:
            paths = _read_column(path, file, group, f"{columns.image}.{PATH}")
        for place, name in enumerate(paths, len(names)):
            names.append(name or f"{stem}[{place}]")
        values: Sequence[Any] = [None] * rows
        if columns.label:
            values = _read_column(path, file, group, columns.label)
        labels += [_label(path, value, columns) for value in values]
        sizes.append(_spread(_image_bytes(metadata.row_group(group), columns), rows))
    places = np.arange(len(names))
    return packed.Part(path, names, places, np.concatenate([np.zeros(0, np.int64), *sizes]), labels)


def _read_column(path: str, file: Any, group: int, column: str) -> list[Any]:
    """The values of a column, or of a field of one, in a row group."""
    import pyarrow as pa

    try:
        table = file.read_row_group(group, columns=[column])
    except (pa.ArrowException, OSError) as error:
        raise _damage(path, group, error) from error
    values = table.column(0).combine_chunks()
    if pa.types.is_struct(values.type):
        values = values.field(0)
    return values.to_pylist()


def _damage(path: str, group: int, error: Exception) -> Exception:
    """The error to be raised for one of pyarrow."""
    if faults.is_environment_fault(error):
        return error
    reason = faults.first_line(error)
    return UserError(f"{path} is damaged in row group {group} ({reason}); fetch it again")


def _label(path: str, value: Any, columns: Columns) -> str | None:
    """The name of a class; None: no class."""
    if value is None or value == "":
        return None
    if columns.classes is None:
        return str(value)
    if isinstance(value, int):
        if value == -1:
            return None
        if 0 <= value < len(columns.classes):
            return columns.classes[value]
        raise UserError(f"{path}: the label {value} is none of {len(columns.classes)} classes")
    return value


def _image_bytes(group: Any, columns: Columns) -> int:
    """The bytes of the images of a row group."""
    for place in range(group.num_columns):
        column = group.column(place)
        if column.path_in_schema == columns.image_bytes:
            return column.total_uncompressed_size
    return 0


def _spread(total: int, rows: int) -> np.ndarray:
    """About the size of each of the images of a row group, whose own sizes are not known."""
    return np.full(rows, total // max(rows, 1), np.int64)


class Rows:
    """The encoded images of a file by row; fast in ascending order, and of little memory.

    Attributes:
      file: of pyarrow.
    """

    def __init__(self, path: str, column: str) -> None:
        """Open a file.

        Args:
          path: of it.
          column: of the bytes.
        """
        self.file = open_parquet(path)
        self._path = path
        self._column = column
        metadata = self.file.metadata
        counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._ends = np.cumsum(counts)
        self._group = -1
        self._batches: Any = None
        self._first = 0  # row of the values
        self._values: list[bytes | None] = []

    def read(self, row: int) -> bytes | None:
        """The encoded bytes of an image; None: there are none.

        Raises:
          UserError: the file is damaged.
        """
        import pyarrow as pa

        group = int(np.searchsorted(self._ends, row, "right"))
        if group != self._group or row < self._first:
            self._start(group)
        while row >= self._first + len(self._values):
            self._first += len(self._values)
            try:
                values = next(self._batches).column(0)
            except (pa.ArrowException, OSError) as error:
                self._group = -1
                raise _damage(self._path, group, error) from error
            if pa.types.is_struct(values.type):
                values = values.field(0)
            self._values = values.to_pylist()
        return self._values[row - self._first]

    def _start(self, group: int) -> None:
        self._group = group
        self._first = int(self._ends[group - 1]) if group else 0
        self._values = []
        self._batches = self.file.iter_batches(ROWS, [group], [self._column])


@dataclasses.dataclass(frozen=True)
class ParquetSource(packed.PackedSource):
    """Images in parquet files; `places` are their rows.

    Attributes:
      column: of the encoded bytes.
    """

    column: str = ""

    def read(self, path: str, index: int) -> bytes:
        """The encoded bytes of an image."""
        rows = packed.opened(Rows, path, self.column)
        data = rows.read(int(self.places.array[index]))
        if data is None:
            raise BadImage("there are no bytes, only a path")
        return data
