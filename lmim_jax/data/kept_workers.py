"""Worker processes that are kept from one evaluation to the next: starting them takes seconds.

Grain's workers serve one dataset and end with it, which suits training.
"""

import atexit
import collections
import multiprocessing
import multiprocessing.connection
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import grain.multiprocessing

AHEAD = 2  # elements that a worker has been asked for: it decodes one while another is fetched
JOIN_SECONDS = 5.0

Element = dict[str, Any]

_idle: dict[int, list["KeptWorkers"]] = collections.defaultdict(list)  # by number of workers
_all: weakref.WeakSet["KeptWorkers"] = weakref.WeakSet()


class Order(Protocol):
    """Random access to elements; it can be pickled."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Element: ...


class WorkerDied(RuntimeError):
    """A worker process ended."""


class KeptWorkers:
    """Some worker processes; worker i % count computes element i of the order that it is told.

    Args:
      count: number of processes.
      initialize: called in each process first, with its number and `count`.
    """

    def __init__(self, count: int, initialize: Callable[[int, int], None]):
        context = multiprocessing.get_context("spawn")
        self._connections: list[multiprocessing.connection.Connection] = []
        self._processes = []
        self._asked = [0] * count  # elements that a worker has not delivered yet
        for index in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, initialize, index, count), daemon=True
            )
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)
        _all.add(self)

    def iterate(self, order: Order) -> Iterator[Element]:
        """The elements of an order.

        Raises:
          WorkerDied: the other workers are ended, too.
        """
        count = len(self._processes)
        try:
            for worker in range(count):
                while self._asked[worker]:  # of an order that was given up
                    self._next_answer(worker)
                self._connections[worker].send(pickle.dumps(order))
            for i in range(min(AHEAD * count, len(order))):
                self._ask(i)
            for i in range(len(order)):
                element = self._next_answer(i % count)
                if isinstance(element, Exception):
                    raise element
                if i + AHEAD * count < len(order):
                    self._ask(i + AHEAD * count)
                yield element
        except (EOFError, ConnectionError) as error:
            codes = self._exit_codes()
            self.kill()
            raise WorkerDied(f"exit code {codes}") from error

    def _ask(self, i: int) -> None:
        worker = i % len(self._processes)
        self._connections[worker].send(i)
        self._asked[worker] += 1

    def _next_answer(self, worker: int) -> Element | Exception:
        """The next element of a worker, or what computing it has raised.

        Raises:
          EOFError, ConnectionError: the worker ended.
        """
        found = self._connections[worker].recv()
        self._asked[worker] -= 1
        if not isinstance(found, Exception):
            for value in found.values():
                if isinstance(value, grain.multiprocessing.SharedMemoryArray):
                    value.unlink_on_del()
        return found

    def _exit_codes(self) -> str:
        """Exit codes of the processes that have ended."""
        multiprocessing.connection.wait([process.sentinel for process in self._processes], 1.0)
        codes = [process.exitcode for process in self._processes]
        return ", ".join(str(code) for code in codes if code is not None)

    def kill(self) -> None:
        """End all processes at once, also one that hangs."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join(JOIN_SECONDS)


def iterate(order: Order, count: int, initialize: Callable[[int, int], None]) -> Iterator[Element]:
    """The elements of an order, by workers that have nothing else to do, or else by new ones.

    Raises:
      WorkerDied: a worker ended.
    """
    try:
        workers = _idle[count].pop()
    except IndexError:
        workers = KeptWorkers(count, initialize)
    try:
        yield from workers.iterate(order)
    except BaseException as error:
        if isinstance(error, GeneratorExit):  # the rest is not needed
            _idle[count].append(workers)
        else:
            workers.kill()
        raise
    _idle[count].append(workers)


def end_all() -> None:
    """End all kept workers."""
    _idle.clear()
    for workers in list(_all):
        workers.kill()


# Before multiprocessing's own, which would wait for a worker that hangs
atexit.register(end_all)


def _serve(
    connection: multiprocessing.connection.Connection,
    initialize: Callable[[int, int], None],
    index: int,
    count: int,
) -> None:
    """In a worker process: answer with elements, until the parent closes the connection."""
    initialize(index, count)
    order: Any = None
    while True:
        try:
            asked = connection.recv()
        except EOFError:
            return
        if isinstance(asked, bytes):
            order = pickle.loads(asked)
            continue
        try:
            element = order[asked]
        except Exception as error:  # to be raised by the parent
            element = error
        connection.send(element)
