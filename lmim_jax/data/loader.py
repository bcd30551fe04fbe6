"""From a source to batches on the devices: order, decoding in the background, bad images, prefetch.

The order is a pure function of (seed, epoch, index), and the position in it of the step alone: any number of workers
gives the same stream, and resuming is starting at a step.
"""

import collections
import dataclasses
import functools
import itertools
import logging
import multiprocessing
import os
import threading

import grain
import jax
import numpy as np
from absl import flags

from lmim_jax import sharding
from lmim_jax.data import decode
from lmim_jax.errors import UserError

log = logging.getLogger(__name__)


@functools.lru_cache(maxsize=2)  # an epoch, and the next one while prefetching
def epoch_order(seed, epoch, length):
    """The permutation of range(length) in which epoch `epoch` visits the images, int64."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(length)


@dataclasses.dataclass(frozen=True)
class Decoded:
    """Images of a source as dicts of arrays; what cannot be decoded is marked, and replaced for training.

    canvas: K; channels: C; replace: a bad image gives the next good one (training) instead of a blank (evaluation).
    """

    source: object
    canvas: int
    channels: int
    replace: bool

    def item(self, index):
        """image [K, K, C] uint8, size [2], label, index of the image taken, bad: index of the one asked for, or -1."""
        bad = -1
        for offset in range(len(self.source) if self.replace else 1):
            taken = (index + offset) % len(self.source)
            try:
                image, size = decode.decode(self.source.read(taken), self.canvas, self.channels)
            except (decode.BadImage, OSError):
                bad = index
            else:
                return self._row(image, size, self.source.label(taken), taken, bad)
        return self._row(*self._blank(), -1, index, bad)

    def why(self, index):
        """Name of a bad image and what is wrong with it."""
        try:
            decode.decode(self.source.read(index), self.canvas, self.channels)
        except (decode.BadImage, OSError) as error:
            return f"{self.source.name(index)} ({error})"
        return f"{self.source.name(index)} (readable now)"

    def padding(self):
        """A row that fills up the last batch: blank, index -1."""
        return self._row(*self._blank(), -1, -1, -1)

    def _blank(self):
        size = np.full(2, self.canvas, np.int32)
        return np.zeros((self.canvas, self.canvas, self.channels), np.uint8), size

    def _row(self, image, size, label, index, bad):
        number = np.int32
        return {"image": image, "size": size, "label": number(label), "index": number(index), "bad": number(bad)}


@dataclasses.dataclass(frozen=True)
class TrainingOrder:
    """Random-access rows of this process for all steps of a run: row i belongs to step i // rows.

    Each epoch is floor(N / batch_size) steps over its own permutation; the remainder is dropped.
    """

    images: Decoded
    seed: int
    batch_size: int
    steps: int
    first_row: int
    rows: int

    def __len__(self):
        return self.steps * self.rows

    def __getitem__(self, i):
        step, row = divmod(int(i), self.rows)
        length = len(self.images.source)
        epoch, step = divmod(step, length // self.batch_size)
        place = step * self.batch_size + self.first_row + row
        return self.images.item(int(epoch_order(self.seed, epoch, length)[place]))


class BadImages:
    """Counts bad images as they turn up, names each once, and stops the run above a share of the source."""

    def __init__(self, images, max_fraction):
        self._images, self._max_fraction = images, max_fraction
        self._found = {}
        self.check()

    def see(self, indices):
        """Take note of a batch's `bad` column [B]."""
        new = sorted({int(i) for i in indices if i >= 0} - self._found.keys())
        for index in new:
            self._found[index] = self._images.why(index)
            log.warning("bad image %d: %s", len(self._found), self._found[index])
        if new:
            self.check()

    def check(self):
        """Raise a UserError with the list where too many are bad."""
        ignored = self._images.source.ignored
        bad, total = len(self._found) + len(ignored), len(self._images.source) + len(ignored)
        if bad > self._max_fraction * total:
            listed = "; ".join(itertools.islice(itertools.chain(self._found.values(), ignored), 10))
            raise UserError(
                f"{bad} of {total} files are no usable images, more than "
                f"config.data.max_bad_fraction={self._max_fraction:g}; mend or remove them: {listed}"
                + (" ..." if bad > 10 else "")
            )


def steps_per_epoch(source, batch_size):
    """floor(N / batch_size): the remainder of an epoch is dropped. UserError where not even one batch is there."""
    if len(source) < batch_size:
        raise UserError(f"config.batch_size={batch_size} is more than the {len(source)} training images there are")
    return len(source) // batch_size


def rows_of_process(batch_size):
    """(first row, number of rows) of this process in a global batch: equal, contiguous parts in process order."""
    rows = batch_size // jax.process_count()
    return jax.process_index() * rows, rows


def read(order, rows, start, workers, threads):
    """Iterate over batches of an order from batch `start`, made in the background by threads or worker processes."""
    dataset = grain.MapDataset.source(order)[start * rows :].batch(rows)
    # Memory is bounded by two batches of canvases per thread (and per worker, which has its own threads).
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * max(threads, 1))
    iterator = dataset.to_iter_dataset(options)
    if workers:
        if not flags.FLAGS.is_parsed():  # Grain's workers read absl flags, which nobody has parsed in a notebook
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        iterator = iterator.mp_prefetch(options, worker_init_fn=_end_with_parent)
    return iter(iterator)


def _end_with_parent(index, count):
    """In a worker: end when the process that wants the images is killed, instead of living on as an orphan."""
    del index, count
    parent = multiprocessing.parent_process()

    def watch():
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="watch the parent").start()


def ahead(iterator, count=2):
    """Keep `count` items of an iterator of device arrays under way, so that transfers overlap with computation."""
    queue = collections.deque()
    for item in iterator:
        queue.append(item)
        if len(queue) > count:
            yield queue.popleft()
    yield from queue


def training(source, config, *, seed, batch_size, steps, start, mesh):
    """Training batches from step `start` to `steps`.

    Args:
      source: see sources.py. config: `config.data`. seed: of the order. batch_size: global.

    Yields:
      {"image": [B, K, K, C] uint8, "size": [B, 2] int32, "label": [B] int32 (-1: none)}, split over the devices.

    Raises:
      UserError: too many bad images.
    """
    if start == steps:  # Grain knows no empty datasets
        return iter(())
    images = Decoded(source, config.canvas, config.channels, replace=True)
    first, rows = rows_of_process(batch_size)
    order = TrainingOrder(images, seed, batch_size, steps, first, rows)
    bad = BadImages(images, config.max_bad_fraction)

    def placed():
        for batch in read(order, rows, start, config.workers, config.threads):
            bad.see(batch["bad"])
            yield sharding.to_global({name: batch[name] for name in ("image", "size", "label")}, mesh)

    return ahead(placed())
