"""What a user sees while something takes long: a bar or lines, and never silence."""

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import jax
import tqdm

from lmim_jax.utils.logging import duration

log = logging.getLogger(__name__)

Item = TypeVar("Item")

SILENCE = 5.0  # seconds after which the next line comes

_shown_at = {"batches": 0.0}  # when `show` has shown something last


def show(batches: Iterable[Item], title: str, total: int) -> Iterator[Item]:
    """Yield batches, with their number, speed and ETA in a bar on a terminal, else in the log.

    Args:
      batches: anything that is processed one by one.
      title: what they are.
      total: how many there are.
    """
    on_terminal = sys.stderr.isatty()
    if on_terminal:
        hidden = jax.process_index() > 0
        batches = tqdm.tqdm(batches, title, total, leave=False, unit=" batches", disable=hidden)
    start = time.perf_counter()
    logged = start
    _shown_at["batches"] = start
    for done, batch in enumerate(batches, 1):
        yield batch
        now = time.perf_counter()
        _shown_at["batches"] = now
        if on_terminal:
            continue
        if now - logged > SILENCE and done < total:
            logged = now
            left = duration((now - start) / done * (total - done))
            log.info("        %s: %d of %d batches, ETA %s", title, done, total, left)


def show_split(batches: Iterable[Item], split: str, total: int) -> Iterator[Item]:
    """`show` for the images of a split, as `EvaluationData` takes it.

    Args:
      batches: of images.
      split: whose images they are.
      total: how many batches there are.
    """
    return show(batches, f"images of {split}", total)


@contextlib.contextmanager
def working(title: str) -> Iterator[None]:
    """Log that a long operation goes on: after 5 s, and then in intervals that double.

    Nothing is logged while `show` shows its part of it.

    Args:
      title: what is done, such as "compiling the train step".
    """
    start = time.perf_counter()
    ended = threading.Event()

    def report() -> None:
        wait = SILENCE
        while not ended.wait(wait):
            now = time.perf_counter()
            if now - _shown_at["batches"] < SILENCE:
                wait = SILENCE
                continue
            seconds = now - start
            log.info("        %s: %s so far", title, duration(seconds))
            wait = seconds  # the next line after twice the time

    thread = threading.Thread(target=report, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
