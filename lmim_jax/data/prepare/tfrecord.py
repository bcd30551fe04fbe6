"""TFRecord files -> ArrayRecord files with the same records beside them, without TensorFlow.

A TFRecord file is a sequence of: length (8 bytes), its checksum (4), the record, its checksum (4),
all little-endian. The checksums are CRC-32C, rotated and shifted ("masked").
"""

import json
import os
import pathlib
import struct
from collections.abc import Iterable, Iterator

import google_crc32c

from lmim_jax.utils import atomic_io
from lmim_jax.utils.errors import UserError

HEADER_BYTES = 12
CHECKSUM_BYTES = 4


def _masked_checksum(data: bytes) -> bytes:
    """TFRecord's checksum of some bytes."""
    crc = google_crc32c.value(data)
    masked = (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF
    return struct.pack("<I", masked)


def read_records(path: str | os.PathLike) -> Iterator[bytes]:
    """Iterate over the records of a TFRecord file.

    Raises:
      UserError: it is truncated, or a checksum is wrong; names the file and the record.
    """
    number = 0
    with pathlib.Path(path).open("rb") as file:
        while header := file.read(HEADER_BYTES):
            encoded_length = header[:8]
            if header[8:] != _masked_checksum(encoded_length):
                raise UserError(f"{path} is damaged at record {number}: its length cannot be read")
            (length,) = struct.unpack("<Q", encoded_length)
            data = file.read(length)
            checksum = file.read(CHECKSUM_BYTES)
            if len(data) < length or checksum != _masked_checksum(data):
                raise UserError(
                    f"{path} is damaged at record {number}: truncated, or its checksum is wrong"
                )
            yield data
            number += 1


def write_array_record(path: str | os.PathLike, examples: Iterable[bytes]) -> int:
    """Write an ArrayRecord file for random access, completely or not at all.

    Returns:
      The number of records.
    """
    from array_record.python import array_record_module

    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1")
    count = 0
    try:
        for example in examples:
            writer.write(example)
            count += 1
        writer.close()
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        atomic_io.flush_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
    return count


def remove_temporary_files(folder: str | os.PathLike) -> None:
    """Remove what killed writers have left behind; to be called when everything is written."""
    for path in pathlib.Path(folder).glob(".*.tmp"):
        path.unlink()


def count_records(path: str | os.PathLike) -> int:
    """The number of records in an ArrayRecord file.

    Raises:
      UserError: it is damaged.
    """
    from array_record.python import array_record_module

    try:
        reader = array_record_module.ArrayRecordReader(str(path), options="readahead_buffer_size:0")
        return reader.num_records()
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}") from error


def array_record_path(path: pathlib.Path) -> pathlib.Path:
    """The path of the ArrayRecord file that belongs to a TFRecord file (or to itself)."""
    return path.with_name(path.name.replace(".tfrecord-", ".array_record-"))


def convert_file(path: pathlib.Path) -> tuple[pathlib.Path, int]:
    """Write the ArrayRecord file of one TFRecord file, unless it exists.

    Returns:
      (its path, number of records).
    """
    out = array_record_path(path)
    if out.exists():
        return out, count_records(out)
    return out, write_array_record(out, read_records(path))


def list_shards(folder: str | os.PathLike) -> dict[pathlib.Path, int]:
    """The TFRecord files of a prepared dataset and how many records each must hold.

    Raises:
      UserError: this is not the folder of a prepared dataset, or files are missing.
    """
    folder = pathlib.Path(folder)
    path = folder / "dataset_info.json"
    if not path.is_file():
        raise UserError(
            f"{folder} is not a prepared TFDS dataset: it has no dataset_info.json; "
            "give NAME/VERSION"
        )
    info = json.loads(path.read_text())
    shards = {}
    for split in info["splits"]:
        lengths = split.get("shardLengths", [])
        for i, length in enumerate(lengths):
            name = f"{info['name']}-{split['name']}.tfrecord-{i:05d}-of-{len(lengths):05d}"
            shards[folder / name] = int(length)
    missing = [path.name for path in shards if not path.is_file()]
    if missing:
        raise UserError(
            f"{folder}: {len(missing)} TFRecord files are missing, such as {missing[0]}"
        )
    return shards


def register_array_records(folder: str | os.PathLike) -> None:
    """Add to dataset_info.json that ArrayRecord files exist, too.

    TensorFlow continues to use the TFRecord files.
    """
    remove_temporary_files(folder)
    path = pathlib.Path(folder, "dataset_info.json")
    info = json.loads(path.read_text())
    formats = info.get("alternativeFileFormats", [])
    if "array_record" in formats or info["fileFormat"] == "array_record":
        return
    info["alternativeFileFormats"] = [*formats, "array_record"]
    atomic_io.write(path, json.dumps(info, indent=2))
