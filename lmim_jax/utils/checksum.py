"""Checksums that identify data."""

import hashlib
import pathlib
from collections.abc import Iterable


def names_checksum(names: Iterable[str]) -> str:
    """SHA-256 of a list of names, in hexadecimal.

    Names of files may contain bytes that are not valid UTF-8 (as surrogates, see PEP 383).
    """
    return hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()


def file_checksum(path: pathlib.Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
