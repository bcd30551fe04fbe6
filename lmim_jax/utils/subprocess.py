"""Child processes that do not outlive the one that started them."""

import multiprocessing
import os
import threading


def exit_with_parent():
    """In a child: end when the parent is killed, instead of living on as an orphan."""
    parent = multiprocessing.parent_process()

    def watch():
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="watch the parent").start()
