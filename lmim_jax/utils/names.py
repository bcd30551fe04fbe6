"""Names of files and classes as text that can be shown: they may have bytes that are no UTF-8."""


def printable(name: str) -> str:
    """A name whose bytes that are no UTF-8 (PEP 383) are spelled out, as stderr shows them."""
    return name.encode("utf-8", "backslashreplace").decode()
