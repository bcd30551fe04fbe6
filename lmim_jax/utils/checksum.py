"""Checksums that identify data."""

import hashlib
from collections.abc import Iterable


def names_checksum(names: Iterable[str]) -> str:
    """SHA-256 of a list of names, in hexadecimal.

    Names of files may contain bytes that are not valid UTF-8 (as surrogates, see PEP 383).
    """
    return hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()
