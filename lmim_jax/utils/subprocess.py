"""Child processes that end with their parent, and leave the signals to stop to it."""

import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing import resource_tracker

# What users and schedulers stop a run with; a terminal sends them to all its processes at once
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def ignore_stop_signals() -> None:
    """In a child process: ignore the signals to stop, as the parent acts on them."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def block_stop_signals() -> None:
    """In a thread that starts child processes: they inherit its mask, and are safe from birth.

    Other threads of this process still receive the signals.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def start_resource_tracker() -> None:
    """Start Python's process that removes shared memory in the end, safe from the signals to stop.

    It says nothing of what it removes, which would follow the last words of a run that stops.
    """
    options = list(sys.warnoptions)
    sys.warnoptions.append("ignore:resource_tracker:UserWarning")  # it inherits them
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        resource_tracker.ensure_running()  # it unblocks some of them in this thread
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        sys.warnoptions[:] = options


def exit_with_parent() -> None:
    """In a child process: exit when the parent dies, also if it was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "this is not a child process"

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="watch the parent").start()
