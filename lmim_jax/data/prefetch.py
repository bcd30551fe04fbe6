"""Background data loading: decoding threads, worker processes and prefetching.

Batches come from an order (see `BatchOrder`), a random-access sequence of parts of batches.
`WorkerPool` decodes the parts in threads or worker processes and assembles the batches;
`Prefetcher` places them on the devices from a background thread, and raises a `DataLoaderTimeout`
error that names the worker where no image is decoded any more.
"""

import collections
import dataclasses
import functools
import logging
import os
import pathlib
import queue
import shutil
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any, Protocol

import grain
import jax
import numpy as np
from absl import flags
from jaxtyping import Shaped
from ml_collections import ConfigDict
from numpy.typing import DTypeLike

from lmim_jax.data import activity as activities
from lmim_jax.data import kept_workers
from lmim_jax.data.activity import Activity
from lmim_jax.utils import cores, descriptors, subprocess
from lmim_jax.utils.errors import DataLoaderTimeout, UserError
from lmim_jax.utils.faults import ReadFailed

log = logging.getLogger(__name__)

PREFETCH_BATCHES = 2  # batches on the devices that wait for the step
SHARED_MEMORY = pathlib.Path("/dev/shm")  # through which worker processes pass on arrays
STARTUP_SECONDS = 90.0  # added to the times of the first batch: workers import their libraries
WARNING_SECONDS = 30.0  # without an image, after which the files being read are logged
POLL_SECONDS = 0.5  # between two looks at what the decoding processes are doing

FEWEST_CORES = 8  # of a host where worker processes are the default
MOST_WORKERS = 16  # by default

in_worker = False  # whether this process is a data worker, whose arrays go through shared memory

_free_memory: dict[int, list[np.ndarray]] = collections.defaultdict(list)  # unused, by bytes

Batch = dict[str, np.ndarray]


def no_check() -> None:
    """The default of `check`: never interrupt a wait for a batch."""


class BatchOrder(Protocol):
    """A stream of batches in parts: element i is part i % parts of batch i // parts.

    An element is a dict of arrays with a leading batch axis, and "pid", the process that decoded
    it.
    """

    @property
    def parts(self) -> int:
        """Number of parts per batch."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> dict[str, Any]: ...


def recycled_array(shape: tuple[int, ...], dtype: DTypeLike) -> Shaped[np.ndarray, "..."]:
    """An uninitialized array in the memory of an earlier one.

    Fresh memory pages would add a fifth to the decoding time. Memory is reused once the last view
    of its array is gone, including views held by jax.
    """
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    for other in list(_free_memory):
        if other != size:
            _free_memory.pop(other, None)
    free = _free_memory[size]
    try:
        memory = free.pop()
    except IndexError:
        memory = np.empty(size, np.uint8)
    # Views of views refer to this array, not to the memory below it
    array = np.frombuffer(memory.data, dtype)
    weakref.finalize(array, free.append, memory)
    return array.reshape(shape)


@functools.cache
def thread_pool(threads: int) -> futures.ThreadPoolExecutor:
    """The decoding threads of this process."""
    return futures.ThreadPoolExecutor(threads, thread_name_prefix="decode")


def num_workers(config: ConfigDict, batch_bytes: int, evaluation_bytes: int = 0) -> int:
    """Number of decoding processes: `config.data.workers`, or -1: as cores and memory allow.

    The threads of one process hinder each other on many cores: see docs/results/gpu.md.

    Args:
      config: `config.data`.
      batch_bytes: see `check_shared_memory`.
      evaluation_bytes: likewise.
    """
    if config.workers >= 0:
        return config.workers
    usable = len(cores.available())
    if jax.default_backend() == "cpu" or usable < FEWEST_CORES or not SHARED_MEMORY.is_dir():
        return 0
    needed = _shared_memory(batch_bytes, evaluation_bytes)
    free = shutil.disk_usage(SHARED_MEMORY).free
    if free < needed:
        log.warning(
            "images are decoded in threads, which is slower than in processes: %s has %d MiB free, "
            "these need %d (docker run --shm-size=8g)",
            SHARED_MEMORY,
            free >> 20,
            -(-needed >> 20),
        )
        return 0
    return min(usable // 2, MOST_WORKERS)


def num_threads(config: ConfigDict, workers: int) -> int:
    """Number of decoding threads per process: `config.data.threads`, or as the cores allow."""
    return config.threads or max(1, len(cores.available()) // max(1, workers))


def _shared_memory(batch_bytes: int, evaluation_bytes: int) -> int:
    """Bytes of shared memory for the batches that are decoded and those that wait."""
    return 2 * (batch_bytes + evaluation_bytes)


def check_shared_memory(batch_bytes: int, workers: int, evaluation_bytes: int = 0) -> None:
    """Check that worker processes can pass on their batches, in files in /dev/shm.

    Args:
      batch_bytes: of a batch of this host.
      workers: number of worker processes; 0: threads, which need none.
      evaluation_bytes: of a batch of evaluations on this host, during which the workers of
        training keep theirs; 0: there are none.

    Raises:
      UserError: it is too small for the batches that are decoded and those that wait.
    """
    if not workers or not SHARED_MEMORY.is_dir():
        return
    usage = shutil.disk_usage(SHARED_MEMORY)
    needed = _shared_memory(batch_bytes, evaluation_bytes)
    if usage.free >= needed:
        return
    use = "two batches"
    if evaluation_bytes:
        use = "two batches of training and two of evaluations"
    raise UserError(
        f"{SHARED_MEMORY} has {usage.total >> 20} MiB, of which {usage.free >> 20} are free; "
        f"config.data.workers={workers} needs {-(-needed >> 20)} MiB there, for {use}: give the "
        "container more (docker run --shm-size=8g), or use --config.data.workers=0 (threads)"
    )


def num_parts(workers: int, rows: int) -> int:
    """Number of parts of a batch of this many rows: one per worker process."""
    return max(1, min(workers, rows))


@dataclasses.dataclass(frozen=True)
class _FailuresAsElements:
    """An order whose read failures are elements {"failure": message}.

    Grain would pass on an exception only after it has stopped all workers, which takes a while.
    """

    order: BatchOrder

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, i: int) -> dict[str, Any]:
        try:
            return self.order[i]
        except ReadFailed as error:
            return {"failure": str(error)}


def _iterate_elements(order: BatchOrder, start: int, workers: int) -> Iterator[dict[str, Any]]:
    """Iterate over the elements of an order from `start`, in threads or worker processes.

    Worker i % workers decodes element i. Each process decodes two elements at a time, so that no
    thread idles while the last image of a batch is decoded.
    """
    dataset = grain.MapDataset.source(_FailuresAsElements(order))[start:]
    iterator = dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=2))
    if workers:
        # Grain's workers read absl flags, which are not parsed in a notebook
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1)
        iterator = iterator.mp_prefetch(options, worker_init_fn=_initialize_worker)
    return iter(iterator)


def _initialize_worker(index: int, count: int) -> None:
    """In a worker process: use no accelerators, and end with the parent, which gets the signals."""
    global in_worker
    del count
    in_worker = True
    activities.worker = index
    subprocess.ignore_stop_signals()
    descriptors.raise_limit()
    jax.config.update("jax_platforms", "cpu")
    subprocess.exit_with_parent()


class WorkerPool:
    """Iterates over the batches of an order, decoded in threads or worker processes.

    Args:
      order: the stream, in parts.
      start: the first batch.
      workers: number of worker processes, at most one per part; 0: threads of this process.
      keep: the worker processes are used again by the next pool that keeps them; `start` is 0.
    """

    def __init__(self, order: BatchOrder, start: int, workers: int, keep: bool = False):
        self._num_parts = order.parts
        self._num_workers = min(workers, order.parts)
        if keep and self._num_workers:
            self._elements = kept_workers.iterate(
                _FailuresAsElements(order), self._num_workers, _initialize_worker
            )
        else:
            self._elements = _iterate_elements(order, start * order.parts, self._num_workers)
        self._pid_of_worker: dict[int, int] = {}
        self._next_element = 0

    def __iter__(self) -> "WorkerPool":
        return self

    def __next__(self) -> Batch:
        parts = []
        for _ in range(self._num_parts):
            parts.append(self._next_part())
        if len(parts) == 1:
            return parts[0]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _next_part(self) -> Batch:
        """The next element of the order, without its "pid".

        Raises:
          DataLoaderTimeout: a worker died.
          ReadFailed: an image could not be read for a long time.
        """
        try:
            part = dict(next(self._elements))
        except RuntimeError as error:
            # Grain's wording for a worker process that ended
            is_worker = "terminated unexpectedly" in str(error)
            if not is_worker and not isinstance(error, kept_workers.WorkerDied):
                raise
            cause = str(error).split(". ")[0]
            raise DataLoaderTimeout(
                f"{self.describe_pending_worker()} died ({cause}); was it out of memory?"
            ) from error
        if "failure" in part:
            raise ReadFailed(part["failure"])
        pid = int(part.pop("pid"))
        if self._num_workers:
            self._pid_of_worker[self._pending_worker] = pid
        self._next_element += 1
        return part

    @property
    def pids(self) -> tuple[int, ...]:
        """IDs of the worker processes that have delivered an element so far."""
        return tuple(self._pid_of_worker.values())

    @property
    def _pending_worker(self) -> int:
        """The worker that decodes the next element."""
        return self._next_element % self._num_workers

    def describe_pending_worker(self) -> str:
        """Names the worker that decodes the next element, for an error message."""
        if not self._num_workers:
            return "a decoding thread"
        pid = self._pid_of_worker.get(self._pending_worker)
        process = f"pid {pid}" if pid else "not started"
        return f"data worker {self._pending_worker} of {self._num_workers} ({process})"

    def kill_pending_worker(self) -> None:
        """Kill the worker process that decodes the next element, so that nothing waits for it."""
        if not self._num_workers:
            return
        pid = self._pid_of_worker.get(self._pending_worker)
        if pid:
            os.kill(pid, signal.SIGKILL)


@dataclasses.dataclass
class _Failure:
    """An exception of the background thread, to be raised where the batches are used."""

    error: BaseException


_END = object()  # marks the end of the batches in the queue


class Prefetcher:
    """Iterates over `place(batch)` for the batches of a pool, PREFETCH_BATCHES ahead of their use.

    A background thread computes them. It starts with the first request for a batch and
    ends with the iterator.

    Args:
      pool: the batches.
      place: batch -> what is yielded.
      timeout: seconds without a decoded image after which a wait is given up.
      activity: of the decoding threads or processes.
      describe_reads: () -> what is being read, for the message about a stall; "": nothing.
      check: called now and then while a batch is waited for; it may raise.

    Raises:
      DataLoaderTimeout: while iterating, if a worker died, or if no image was decoded for `timeout`
        seconds.
    """

    def __init__(
        self,
        pool: WorkerPool,
        place: Callable[[Batch], Any],
        timeout: float,
        activity: Activity,
        describe_reads: Callable[[], str],
        check: Callable[[], None] = no_check,
    ):
        self._pool = pool
        self._place = place
        self._timeout = timeout
        self._activity = activity
        self._describe_reads = describe_reads
        self._check = check
        self._ready: queue.Queue[Any] = queue.Queue(PREFETCH_BATCHES)
        self._stop = threading.Event()

    def __iter__(self) -> Iterator[Any]:
        thread = threading.Thread(target=self._produce, daemon=True, name="batches")
        thread.start()
        startup = STARTUP_SECONDS
        try:
            while True:
                item = self._wait_for_item(startup)
                startup = 0.0
                if item is _END:
                    return
                if isinstance(item, _Failure):
                    raise item.error
                yield item
                del item  # its memory is free while the next one is waited for
        finally:
            self._stop.set()
            thread.join(timeout=2)

    def _produce(self) -> None:
        """Fill the queue, in the background thread, which also starts the workers."""
        subprocess.block_stop_signals()
        try:
            for batch in self._pool:
                self._put(self._place(batch))
                if self._stop.is_set():
                    return
            self._put(_END)
        except BaseException as error:
            self._put(_Failure(error))

    def _put(self, item: Any) -> None:
        """Add an item to the queue as soon as there is room, unless the iteration has ended."""
        while not self._stop.is_set():
            try:
                self._ready.put(item, timeout=0.2)
                return
            except queue.Full:
                continue

    def _wait_for_item(self, startup: float) -> Any:
        """The next item of the queue.

        Args:
          startup: seconds by which the first image may be later than others.

        Raises:
          DataLoaderTimeout: no image is decoded any more; the pending worker is killed.
        """
        began = time.monotonic() + startup
        warned = 0.0  # the progress after which the last warning came
        while True:
            try:
                item = self._ready.get(timeout=POLL_SECONDS)
            except queue.Empty:
                pass
            else:
                if warned:
                    log.warning("images are decoded again")
                return item
            self._check()
            progress = max(began, self._activity.last_finished())
            idle = time.monotonic() - progress
            if idle > self._timeout:
                worker = self._pool.describe_pending_worker()
                self._pool.kill_pending_worker()
                raise DataLoaderTimeout(
                    f"no image decoded for {self._timeout:g} s: {worker} does not respond"
                    f"{self._reads(', at ')}; if reading one image may take longer, raise "
                    "config.data.timeout"
                )
            if idle > WARNING_SECONDS and warned != progress:
                warned = progress
                log.warning(
                    "no image decoded for %.0f s%s; giving up after %g s without one",
                    idle,
                    self._reads(", being read: "),
                    self._timeout,
                )

    def _reads(self, introduction: str) -> str:
        """What is being read, after an introduction; "": nothing."""
        reads = self._describe_reads()
        return f"{introduction}{reads}" if reads else ""
