"""Several encoded files, one of each modality, as the bytes of one record; a single file is itself.

Sources thus return bytes, and workers pass them on, whatever an image consists of.
"""

import struct
from collections.abc import Sequence

MAGIC = b"LMIM files\0"  # of no image format
COUNT = struct.Struct("<I")
LENGTH = struct.Struct("<Q")


def pack(files: Sequence[bytes]) -> bytes:
    """One byte string that holds some files; of a single one, the file."""
    if len(files) == 1:
        return files[0]
    parts = [MAGIC, COUNT.pack(len(files))]
    for file in files:
        parts += [LENGTH.pack(len(file)), file]
    return b"".join(parts)


def unpack(data: bytes) -> list[bytes]:
    """The files that `pack` was given."""
    if not data.startswith(MAGIC):
        return [data]
    place = len(MAGIC)
    (count,) = COUNT.unpack_from(data, place)
    place += COUNT.size
    files = []
    for _ in range(count):
        (length,) = LENGTH.unpack_from(data, place)
        place += LENGTH.size
        files.append(data[place : place + length])
        place += length
    return files
