"""What the decoding threads and processes of a loader are doing, as their parent sees it."""

import contextlib
import struct
import threading
import time
import weakref
from multiprocessing import shared_memory
from typing import Any

from lmim_jax.utils import subprocess

# Of a process: when it finished an image (`time.monotonic`, which all processes of a machine
# share), and the image that it has been reading for the longest time, or -1
ROW = struct.Struct("dq")

worker = 0  # number of this process among the data workers


class Activity:
    """When an image was last finished, and which images are being read, by process.

    Worker processes get a copy that writes into the same memory.

    Args:
      workers: number of worker processes; 0: threads of this process.
    """

    def __init__(self, workers: int = 0):
        self._rows = max(1, workers)
        self._memory: shared_memory.SharedMemory | None = None
        self._buffer: Any = bytearray(ROW.size * self._rows)
        if workers:
            subprocess.start_resource_tracker()
            self._memory = shared_memory.SharedMemory(create=True, size=len(self._buffer))
            self._buffer = self._memory.buf
            weakref.finalize(self, _remove, self._memory)
        for row in range(self._rows):
            ROW.pack_into(self._buffer, row * ROW.size, 0.0, -1)
        self._start()

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._reads: dict[int, int] = {}  # image by thread, the oldest read first
        self._finished = 0.0

    def __getstate__(self) -> dict[str, Any]:
        return {"rows": self._rows, "memory": self._memory}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._rows = state["rows"]
        self._memory = state["memory"]
        self._buffer = bytearray(ROW.size * self._rows)
        if self._memory:
            self._buffer = self._memory.buf
        self._start()

    def begin(self, index: int) -> None:
        """This thread begins to read an image."""
        with self._lock:
            self._reads[threading.get_ident()] = index
            self._publish()

    def end(self) -> None:
        """This thread has finished its image, good or bad."""
        with self._lock:
            self._reads.pop(threading.get_ident(), None)
            self._finished = time.monotonic()
            self._publish()

    def _publish(self) -> None:
        oldest = next(iter(self._reads.values()), -1)
        ROW.pack_into(self._buffer, ROW.size * (worker % self._rows), self._finished, oldest)

    def last_finished(self) -> float:
        """When an image was last finished, as `time.monotonic`; 0.0: none was."""
        return max(ROW.unpack_from(self._buffer, row * ROW.size)[0] for row in range(self._rows))

    def being_read(self) -> list[int]:
        """The images that have been read for the longest time: one for each busy process."""
        found = []
        for row in range(self._rows):
            index = ROW.unpack_from(self._buffer, row * ROW.size)[1]
            if index >= 0:
                found.append(index)
        return found


def _remove(memory: shared_memory.SharedMemory) -> None:
    """Free the memory; workers that still write to it keep it until they end."""
    with contextlib.suppress(OSError, BufferError):
        memory.unlink()
        memory.close()
