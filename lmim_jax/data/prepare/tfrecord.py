"""TFRecord files -> ArrayRecord files beside them, without TensorFlow. The records are the same bytes.

A TFRecord file is a sequence of: length (8 bytes), its checksum (4), the record, its checksum (4); little-endian; the
checksums are CRC-32C, rotated and shifted ("masked").
"""

import json
import os
import pathlib
import struct

import google_crc32c

from lmim_jax.utils import atomic_io
from lmim_jax.utils.errors import UserError


def _masked(data):
    """TFRecord's checksum of some bytes."""
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def records(path):
    """Iterate over the records of a TFRecord file, bytes.

    Raises:
      UserError: it is truncated, or a checksum is wrong; names the file and the record.
    """
    with pathlib.Path(path).open("rb") as file:
        number = 0
        while header := file.read(12):
            if len(header) < 12 or _masked(header[:8]) != struct.unpack("<I", header[8:])[0]:
                raise UserError(f"{path} is damaged at record {number}: its length cannot be read")
            (length,) = struct.unpack("<Q", header[:8])
            data, checksum = file.read(length), file.read(4)
            if (
                len(data) < length
                or len(checksum) < 4
                or _masked(data) != struct.unpack("<I", checksum)[0]
            ):
                raise UserError(
                    f"{path} is damaged at record {number}: truncated, or its checksum is wrong"
                )
            yield data
            number += 1


def write_array_record(path, examples):
    """Write an ArrayRecord file that can be read at random, complete or not at all; returns the number of records."""
    from array_record.python import array_record_module

    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    writer, count = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1"), 0
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


def sweep(folder):
    """Remove what killed writers have left; to be called when all is written."""
    for path in pathlib.Path(folder).glob(".*.tmp"):
        path.unlink()


def count_records(path):
    """The number of records in an ArrayRecord file. UserError where it is damaged."""
    from array_record.python import array_record_module

    try:
        return array_record_module.ArrayRecordReader(
            str(path), options="readahead_buffer_size:0"
        ).num_records()
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}") from error


def beside(path):
    """The ArrayRecord file that belongs to a TFRecord file (or to itself)."""
    return path.with_name(path.name.replace(".tfrecord-", ".array_record-"))


def convert(path):
    """Write the ArrayRecord file of one TFRecord file, unless it is there; returns (its path, number of records)."""
    out = beside(path)
    return out, count_records(out) if out.exists() else write_array_record(out, records(path))


def shards(folder):
    """The TFRecord files of a prepared dataset and how many records each must hold: {path: count}.

    Raises:
      UserError: this is no folder of a prepared dataset, or files are missing.
    """
    folder = pathlib.Path(folder)
    path = folder / "dataset_info.json"
    if not path.is_file():
        raise UserError(
            f"{folder} is no prepared TFDS dataset: it has no dataset_info.json; give NAME/VERSION"
        )
    info, found = json.loads(path.read_text()), {}
    for split in info["splits"]:
        lengths = [int(length) for length in split.get("shardLengths", [])]
        for i, length in enumerate(lengths):
            name = f"{info['name']}-{split['name']}.tfrecord-{i:05d}-of-{len(lengths):05d}"
            found[folder / name] = length
    missing = [path.name for path in found if not path.is_file()]
    if missing:
        raise UserError(
            f"{folder}: {len(missing)} TFRecord files are missing, such as {missing[0]}"
        )
    return found


def announce(folder):
    """Add to dataset_info.json that there are ArrayRecord files too; TensorFlow goes on using the TFRecord files."""
    sweep(folder)
    path = pathlib.Path(folder, "dataset_info.json")
    info = json.loads(path.read_text())
    formats = info.get("alternativeFileFormats", [])
    if "array_record" not in formats and info["fileFormat"] != "array_record":
        atomic_io.write(
            path,
            json.dumps({**info, "alternativeFileFormats": [*formats, "array_record"]}, indent=2),
        )
