"""From a source to batches on the devices: order, decoding in the background, bad images, prefetch.

The order is a pure function of (seed, epoch, index), and the position in it of the step alone: any number of workers
gives the same stream, and resuming is starting at a step.
"""

import dataclasses
import functools
import itertools
import logging
import os
import threading

import grain.multiprocessing
import jax
import numpy as np

from lmim_jax.data import decode, prefetch
from lmim_jax.distributed import sharding
from lmim_jax.utils.errors import UserError

log = logging.getLogger(__name__)

CHUNK = 4  # rows that a thread decodes at a time
_reading = {}  # by thread: what is being read, to be named when it hangs


@functools.lru_cache(maxsize=2)  # an epoch, and the next one while prefetching
def epoch_order(seed, epoch, length):
    """The permutation of range(length) in which epoch `epoch` visits the images, int64."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(length)


@dataclasses.dataclass(frozen=True)
class Decoded:
    """Images of a source as batches of arrays; what cannot be decoded is marked, and replaced for training.

    canvas: K; channels: C; threads: that decode; replace: a bad image gives the next good one (training) instead of a
    blank (evaluation); crop: an `augment.HostCrop` instead of canvases, or None.
    """

    source: object
    canvas: int
    channels: int
    threads: int
    replace: bool
    crop: object = None

    @property
    def shape(self):
        """Of a row of "image": a canvas, or a crop."""
        return (*(self.crop.size if self.crop else (self.canvas, self.canvas)), self.channels)

    def batch(self, indices, step=0, positions=()):
        """A batch, decoded by several threads straight into its rows.

        Args:
          indices: [B], which images; -1: none, a blank row. step, positions: [B], where in the stream, for crops.

        Returns:
          image uint8 [B, *shape], size [B, 2] (height, width), label [B], index [B] of the images taken, bad [B]: the
          index asked for where that image is bad, or -1; int32; and pid, who made it.
        """
        new = grain.multiprocessing.SharedMemoryArray if prefetch.in_worker else prefetch.recycled
        batch = {
            "image": new((len(indices), *self.shape), np.uint8),
            "size": np.full((len(indices), 2), self.canvas),
        }
        batch |= {name: np.full(len(indices), -1) for name in ("label", "index", "bad")}
        draws = self.crop.draws(step, positions) if self.crop else [None] * len(indices)

        def fill(first):
            for row in range(first, min(first + CHUNK, len(indices))):
                self._fill(
                    {name: column[row : row + 1] for name, column in batch.items()},
                    indices[row],
                    draws[row],
                )

        run = map if self.threads == 1 else prefetch.pool(self.threads).map
        for _ in run(fill, range(0, len(indices), CHUNK)):
            pass
        numbers = {
            name: column.astype(np.int32) for name, column in batch.items() if name != "image"
        }
        return {**batch, **numbers, "pid": np.int32(os.getpid())}

    def _fill(self, row, index, draw):
        """Write one row of a batch, given as views of length one."""
        for offset in range(len(self.source) if self.replace else min(1, index + 1)):
            taken = (index + offset) % len(self.source)
            try:
                pixels, label = self._read(taken)
            except (decode.BadImage, OSError):
                row["bad"][:] = index
                continue
            if self.crop:
                row["image"][0] = self.crop(pixels, draw)
            else:
                row["size"][0] = decode.place(pixels, row["image"][0])
            row["label"][:], row["index"][:] = label, taken
            return
        row["image"][:], row["index"][:] = 0, index

    def _read(self, index):
        """(pixels, class) of an image of the source."""
        thread = threading.get_ident()
        _reading[thread] = self, index
        try:
            data, label = self.source.record(index)
            return decode.decode(data, self.canvas, self.channels), label
        finally:
            del _reading[thread]

    def why(self, index):
        """Name of a bad image and what is wrong with it."""
        try:
            self._read(index)
        except (decode.BadImage, OSError) as error:
            return f"{self.source.name(index)} ({error})"
        return f"{self.source.name(index)} (readable now)"

    def reading(self):
        """What the threads of this process read right now, for a message."""
        names = [
            images.source.name(index) for images, index in list(_reading.values()) if images is self
        ]
        return f", at {', '.join(names[:4])}" if names else ""


@dataclasses.dataclass(frozen=True)
class TrainingOrder:
    """Random access to the rows of this process, in `parts` per step: element i is part i % parts of step i // parts.

    Each epoch is floor(N / batch_size) steps over its own permutation; the remainder is dropped.
    """

    images: Decoded
    seed: int
    batch_size: int
    steps: int
    first_row: int
    rows: int
    parts: int = 1

    def __len__(self):
        return self.steps * self.parts

    def __getitem__(self, i):
        step, part = divmod(int(i), self.parts)
        positions = self.first_row + np.arange(
            part * self.rows // self.parts, (part + 1) * self.rows // self.parts
        )
        return self.images.batch(self.indices(step)[positions], step, positions)

    def indices(self, step):
        """Which images are in the global batch of a step, [batch_size]."""
        length = len(self.images.source)
        epoch, step = divmod(step, length // self.batch_size)
        return epoch_order(self.seed, epoch, length)[
            step * self.batch_size : (step + 1) * self.batch_size
        ]


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
        raise UserError(
            f"config.batch_size={batch_size} is more than the {len(source)} training images there are"
        )
    return len(source) // batch_size


def rows_of_process(batch_size):
    """(first row, number of rows) of this process in a global batch: equal, contiguous parts in process order."""
    rows = batch_size // jax.process_count()
    return jax.process_index() * rows, rows


def training(source, config, *, seed, batch_size, steps, start, mesh, crop=None):
    """Training batches from step `start` to `steps`, decoded in the background and placed on the devices ahead of use.

    Host memory: at most 4 batches of this process's rows (7 with worker processes); on the devices: at most 4.

    Args:
      source: see sources.py. config: `config.data`. seed: of the order. batch_size: global.
      crop: an `augment.HostCrop` where images are cropped here, or None.

    Yields:
      {"image": [B, K, K, C] uint8, "size": [B, 2] int32, "label": [B] int32 (-1: none)}, split over the devices;
      with `crop`, images are crops [B, H, W, C] and there is no size.

    Raises:
      UserError: too many bad images. DataLoaderTimeout: a worker died, or there was no batch for `config.timeout` seconds.
    """
    if start == steps:  # Grain knows no empty datasets
        return iter(())
    threads = prefetch.threads_of(config)
    images = Decoded(source, config.canvas, config.channels, threads, replace=True, crop=crop)
    first, rows = rows_of_process(batch_size)
    parts = prefetch.parts_of(config.workers, rows)
    order = TrainingOrder(images, seed, batch_size, steps, first, rows, parts)
    bad = BadImages(images, config.max_bad_fraction)
    names = ("image", "label") if crop else ("image", "size", "label")

    def place(batch):
        bad.see(batch["bad"])
        return sharding.to_global({name: batch[name] for name in names}, mesh)

    return prefetch.ahead(
        prefetch.Crew(order, start, config.workers), place, config.timeout, images.reading
    )
