"""Child processes that end with their parent."""

import multiprocessing
import os
import threading


def exit_with_parent() -> None:
    """In a child process: exit when the parent dies, also if it was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "this is not a child process"

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="watch the parent").start()
