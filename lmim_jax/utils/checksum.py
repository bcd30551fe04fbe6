"""Checksums that identify data."""

import hashlib
import itertools
import pathlib
from collections.abc import Iterable

CHUNK = 65_536  # names that are joined at a time


def names_checksum(names: Iterable[str]) -> str:
    """SHA-256 of a list of names, in hexadecimal.

    Names of files may contain bytes that are not valid UTF-8 (as surrogates, see PEP 383).
    """
    digest = hashlib.sha256()
    separator = ""
    remaining = iter(names)
    while chunk := list(itertools.islice(remaining, CHUNK)):
        text = separator + "\n".join(chunk)
        digest.update(text.encode("utf-8", "surrogateescape"))
        separator = "\n"
    return digest.hexdigest()


def file_checksum(path: pathlib.Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
