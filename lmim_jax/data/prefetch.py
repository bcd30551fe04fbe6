"""Work off the main thread: decoding processes and threads, batches ahead of the step, and what to say if they stop."""

import collections
import functools
import os
import queue
import signal
import threading
import weakref
from concurrent import futures

import grain
import jax
import numpy as np
from absl import flags

from lmim_jax.utils import subprocess
from lmim_jax.utils.errors import DataLoaderTimeout

AHEAD = 2  # batches on the devices, waiting for the step
STARTING = 90.0  # seconds more for the first batch: workers import what they need

in_worker = False  # whether this process is a data worker, whose arrays go through shared memory


_free = collections.defaultdict(list)  # memory that nobody uses any more, by size


def recycled(shape, dtype):
    """An array of anything, in memory of an earlier one: fresh pages cost a fifth of the time that decoding takes.

    Memory comes back when the last view of an array is gone, jax's own included.
    """
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    for other in [known for known in list(_free) if known != size]:
        del _free[other]
    memory = _free[size].pop() if _free[size] else np.empty(size, np.uint8)
    array = np.frombuffer(
        memoryview(memory), dtype
    )  # views of views refer to this one, not to the memory
    weakref.finalize(array, _free[size].append, memory)
    return array.reshape(shape)


@functools.cache
def pool(threads):
    """The decoding threads of this process."""
    return futures.ThreadPoolExecutor(threads, thread_name_prefix="decode")


def threads_of(config):
    """How many threads decode in each process, by `config.data`."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    )  # macOS
    return config.threads or max(1, cores // max(1, config.workers))


def parts_of(workers, rows):
    """Into how many parts the rows of a batch go, one per worker."""
    return max(1, min(workers, rows))


def elements(order, start, workers):
    """Iterate over the elements of an order from `start`, made by threads of this process, or by worker processes.

    Element i is made by worker i % workers. Two are in the making per process, so that no thread waits for the last
    image of a batch.
    """
    dataset = grain.MapDataset.source(order)[start:]
    iterator = dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=2))
    if workers:
        if (
            not flags.FLAGS.is_parsed()
        ):  # Grain's workers read absl flags, which nobody has parsed in a notebook
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1)
        iterator = iterator.mp_prefetch(options, worker_init_fn=_begin_worker)
    return iter(iterator)


def _begin_worker(index, count):
    """In a worker: stay off the accelerators, and end with the process that wants the images."""
    global in_worker
    del index, count
    in_worker = True
    jax.config.update("jax_platforms", "cpu")
    subprocess.exit_with_parent()


class Crew:
    """An iterator over batches of an order from batch `start`, and who makes them.

    order: `order[i]` is part i % order.parts of batch i // order.parts: a dict of arrays, and "pid", who made it.
    """

    def __init__(self, order, start, workers):
        self._parts, self._workers = order.parts, min(workers, order.parts)
        self._elements = elements(order, start * order.parts, self._workers)
        self._pids, self._next = {}, 0  # pids by worker; the element that is waited for

    def __iter__(self):
        return self

    def __next__(self):
        parts = []
        for _ in range(self._parts):
            try:
                part = next(self._elements)
            except RuntimeError as error:
                if "terminated unexpectedly" not in str(error):  # Grain's words for a dead process
                    raise
                raise DataLoaderTimeout(
                    f"{self.suspect()} died ({str(error).split('. ')[0]}); was memory short?"
                ) from error
            if self._workers:
                self._pids[self._next % self._workers] = int(part["pid"])
            self._next += 1
            parts.append({name: column for name, column in part.items() if name != "pid"})
        if len(parts) == 1:
            return parts[0]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    @property
    def pids(self):
        """The worker processes that have made something so far."""
        return tuple(self._pids.values())

    def suspect(self):
        """Who was to make the element that does not come, in words."""
        if not self._workers:
            return "a decoding thread"
        worker = self._next % self._workers
        pid = self._pids.get(worker)
        return f"data worker {worker} of {self._workers} ({f'pid {pid}' if pid else 'not started'})"

    def abandon(self):
        """Kill the worker that does not answer, so that nothing waits for it any longer."""
        if pid := self._pids.get(self._next % self._workers) if self._workers else None:
            os.kill(pid, signal.SIGKILL)


def ahead(crew, place, timeout, reading):
    """Run `place` on the batches of a crew in a thread of its own, AHEAD of them before they are asked for.

    Args:
      place: batch -> what to yield. timeout: seconds to wait for a batch. reading: () -> what is being read, in words.

    Raises:
      DataLoaderTimeout: a worker died, or there was no batch for `timeout` seconds.
    """
    ready, stop, end = queue.Queue(AHEAD), threading.Event(), object()

    def put(item):
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.2)
            except queue.Full:
                continue

    def work():
        try:
            for batch in crew:
                put(place(batch))
                if stop.is_set():
                    return
            put(end)
        except BaseException as error:  # to be raised where the batches are used
            put(error)

    thread = threading.Thread(target=work, daemon=True, name="batches")
    thread.start()
    patience = timeout + STARTING
    try:
        while True:
            try:
                item = ready.get(timeout=patience)
            except queue.Empty:
                who = crew.suspect()
                crew.abandon()
                raise DataLoaderTimeout(
                    f"no batch for {patience:g} s: {who} does not answer{reading()}; if this is only slow, raise "
                    "config.data.timeout"
                ) from None
            patience = timeout
            if item is end:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
            del item
    finally:
        stop.set()
        thread.join(timeout=2)
