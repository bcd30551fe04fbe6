"""Makes image files slow or unreadable, in every Python process that has this folder in PYTHONPATH.

FAULT_FILE names a file. While it exists, its content decides what happens to images that are
opened: "errno 5" fails with that error, "sleep 0.2" waits so many seconds first.
"""

import builtins
import io
import os
import time

_open = io.open
_suffixes = (".jpg", ".png")


def _faulty_open(file, *arguments, **options):
    if isinstance(file, str | os.PathLike) and os.fspath(file).endswith(_suffixes):
        try:
            with _open(os.environ["FAULT_FILE"]) as fault:
                kind, value = fault.read().split()
        except (FileNotFoundError, ValueError):
            return _open(file, *arguments, **options)
        if kind == "errno":
            raise OSError(int(value), os.strerror(int(value)), os.fspath(file))
        time.sleep(float(value))
    return _open(file, *arguments, **options)


io.open = _faulty_open
builtins.open = _faulty_open
