"""From a source to batches on the devices: order, background decoding, bad images, prefetching.

The order is a pure function of (seed, epoch, index), and the position in it a function of the step
alone: the stream is the same for any number of workers, and resuming means starting at a step.

Letters: B batch, K side of the canvas, H W height and width of a crop, C channels.
"""

import dataclasses
import functools
import itertools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain.multiprocessing
import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int, UInt8
from ml_collections import ConfigDict

from lmim_jax.data import decode, prefetch
from lmim_jax.data.activity import Activity
from lmim_jax.data.augment.device import CropDraw
from lmim_jax.data.augment.host import HostCrop
from lmim_jax.data.image_options import ImageOptions
from lmim_jax.data.sources import Source
from lmim_jax.distributed import sharding
from lmim_jax.utils import faults
from lmim_jax.utils.errors import UserError

log = logging.getLogger(__name__)

CHUNK = 4  # rows that a thread decodes at a time
# Of `config.timeout`, for which an image is tried again: its fault is named before the loader gives
# up on whatever reads it
RETRY_SHARE = 0.9
LISTED = 10  # bad images listed in the error message


@functools.lru_cache(maxsize=2)  # the current epoch, and the next one while prefetching
def epoch_order(seed: int, epoch: int, length: int) -> Int[np.ndarray, " N"]:
    """The permutation of range(length) in which an epoch visits the images, int32 or int64 [N]."""
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    order = generator.permutation(length)
    if length < 2**31:
        return order.astype(np.int32)  # every worker keeps it: half the memory
    return order


@dataclasses.dataclass(frozen=True)
class BatchDecoder:
    """Decodes images of a source into batches of arrays; images that cannot be decoded are marked.

    Attributes:
      source: the images.
      canvas: K, side of the square canvas in pixels.
      channels: C.
      threads: number of decoding threads.
      replace: a bad image is replaced by the next good one (training) instead of a blank
        (evaluation).
      crop: crops images on the host, so that a batch holds crops instead of canvases; None:
        canvases.
      retry_seconds: how long to try to read an image while the environment is at fault.
      activity: what is being read.
      options: what is done to the pixels of a file.
    """

    source: Source
    canvas: int
    channels: int
    threads: int
    replace: bool
    crop: HostCrop | None = None
    retry_seconds: float = faults.RETRY_SECONDS
    activity: Activity = dataclasses.field(default_factory=Activity, compare=False)
    options: ImageOptions = decode.DEFAULTS

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one image of a batch: a canvas [K, K, C], or a crop [H, W, C]."""
        if self.crop is None:
            return (self.canvas, self.canvas, self.channels)
        height, width = self.crop.size
        return (height, width, self.channels)

    def batch(
        self,
        indices: Int[np.ndarray, " B"],
        step: int = 0,
        positions: Sequence[int] | Int[np.ndarray, " B"] = (),
    ) -> dict[str, Any]:
        """Decode a batch, by several threads straight into its rows.

        Args:
          indices: [B], which images; -1: none, a blank row.
          step: the training step, for the random numbers of crops.
          positions: [B], of the images in the global batch, for the random numbers of crops.

        Returns:
          "image" uint8 [B, *shape]; int32 "size" [B, 2] (height, width), "label" [B], "index" [B]
          of the images that were decoded, and "bad" [B], the index asked for where that image is
          bad, or -1; "pid", of this process.

        Raises:
          ReadFailed: the environment was at fault for `retry_seconds`.
        """
        count = len(indices)
        new_array = prefetch.recycled_array
        if prefetch.in_worker:
            new_array = grain.multiprocessing.SharedMemoryArray
        batch = {
            "image": new_array((count, *self.shape), np.uint8),
            "size": np.full((count, 2), self.canvas, np.int32),
            "label": np.full(count, -1, np.int32),
            "index": np.full(count, -1, np.int32),
            "bad": np.full(count, -1, np.int32),
        }
        draws: Sequence[CropDraw | None] = [None] * count
        if self.crop is not None:
            draws = self.crop.draws(step, positions)

        def decode_chunk(first: int) -> None:
            for row in range(first, min(first + CHUNK, count)):
                self._decode_row(batch, row, int(indices[row]), draws[row])

        firsts = range(0, count, CHUNK)
        if self.threads == 1:
            for first in firsts:
                decode_chunk(first)
        else:
            list(prefetch.thread_pool(self.threads).map(decode_chunk, firsts))
        return {**batch, "pid": np.int32(os.getpid())}

    def _decode_row(
        self, batch: dict[str, np.ndarray], row: int, index: int, draw: CropDraw | None
    ) -> None:
        """Write one row of a batch: image `index`, or the next good one if it is to be replaced."""
        tries = min(1, index + 1)
        if self.replace:
            tries = len(self.source)
        for offset in range(tries):
            taken = (index + offset) % len(self.source)
            try:
                pixels, label = self._read(taken)
            except (decode.BadImage, OSError):
                batch["bad"][row] = index
                continue
            if self.crop is not None and draw is not None:
                batch["image"][row] = self.crop(pixels, draw)
            else:
                batch["size"][row] = decode.place_on_canvas(pixels, batch["image"][row])
            batch["label"][row] = label
            batch["index"][row] = taken
            return
        batch["image"][row] = 0
        batch["index"][row] = index

    def _read(self, index: int) -> tuple[UInt8[np.ndarray, "h w C"], int]:
        """(pixels, class) of an image of the source."""
        self.activity.begin(index)
        try:
            return faults.retry(
                lambda: self._read_once(index),
                lambda: self.source.name(index),
                self.retry_seconds,
            )
        finally:
            self.activity.end()

    def _read_once(self, index: int) -> tuple[UInt8[np.ndarray, "h w C"], int]:
        data, label = self.source.record(index)
        return decode.decode(data, self.canvas, self.channels, self.options), label

    def describe_failure(self, index: int) -> str:
        """The name of a bad image and what is wrong with it."""
        name = self.source.name(index)
        try:
            self._read_once(index)
        except Exception as error:  # also of the environment, at this moment
            return f"{name} ({error})"
        return f"{name} (readable now)"

    def describe_reads(self) -> str:
        """The images that are being read, for a message; "": none."""
        names = [self.source.name(index) for index in self.activity.being_read()[:4]]
        return ", ".join(names)


@dataclasses.dataclass(frozen=True)
class TrainingOrder:
    """Random access to the rows of this process: element i is part i % parts of step i // parts.

    Each epoch is floor(N / batch_size) steps over its own permutation; the remainder is dropped.

    Attributes:
      images: decodes the images.
      seed: of the permutations.
      batch_size: global number of images per step.
      steps: of the whole run.
      first_row: the first row of the global batch that belongs to this process.
      rows: number of rows of this process.
      parts: into how many elements the rows of a step are divided.
    """

    images: BatchDecoder
    seed: int
    batch_size: int
    steps: int
    first_row: int
    rows: int
    parts: int = 1

    def __len__(self) -> int:
        return self.steps * self.parts

    def __getitem__(self, i: int) -> dict[str, Any]:
        step, part = divmod(int(i), self.parts)
        start = part * self.rows // self.parts
        stop = (part + 1) * self.rows // self.parts
        positions = self.first_row + np.arange(start, stop)
        return self.images.batch(self.indices(step)[positions], step, positions)

    def indices(self, step: int) -> Int[np.ndarray, " B"]:
        """Indices of the images in the global batch of a step, [batch_size]."""
        length = len(self.images.source)
        epoch, step_of_epoch = divmod(step, length // self.batch_size)
        start = step_of_epoch * self.batch_size
        return epoch_order(self.seed, epoch, length)[start : start + self.batch_size]


class BadImageMonitor:
    """Counts and logs bad images as they occur, and stops the run if there are too many.

    Args:
      images: the decoder whose batches are recorded.
      max_fraction: of the files, that may be bad.

    Raises:
      UserError: too many images of the source are damaged.
    """

    def __init__(self, images: BatchDecoder, max_fraction: float):
        self._images = images
        self._max_fraction = max_fraction
        self._found: dict[int, str] = {}  # what is wrong, by index

    def record(self, indices: Int[np.ndarray, " B"]) -> None:
        """Record the `bad` column [B] of a batch.

        Raises:
          UserError: too many images are bad.
        """
        new = {int(index) for index in indices if index >= 0} - self._found.keys()
        for index in sorted(new):
            self._found[index] = self._images.describe_failure(index)
            log.warning("bad image %d: %s", len(self._found), self._found[index])
        if new:
            self.check()

    def check(self) -> None:
        """Raise a UserError that lists the bad files if there are too many of them."""
        bad = len(self._found)
        total = len(self._images.source)
        if bad <= self._max_fraction * total:
            return
        listed = "; ".join(itertools.islice(self._found.values(), LISTED))
        if bad > LISTED:
            listed += " ..."
        raise UserError(
            f"{bad} of {total} images are damaged, more than "
            f"config.data.max_bad_fraction={self._max_fraction:g}; repair or remove them: {listed}"
        )


def steps_per_epoch(source: Source, batch_size: int, unit: int = 1) -> int:
    """floor(N / batch_size): the remainder of an epoch is dropped.

    Args:
      source: N training images.
      batch_size: images of a step.
      unit: what batch sizes must be a multiple of, for the error message.

    Raises:
      UserError: there are fewer images than one batch.
    """
    images = len(source)
    if images >= batch_size:
        return images // batch_size
    fitting = images // unit * unit
    advice = f"give at most --config.batch_size={fitting}"
    if not fitting:
        advice = f"batches are multiples of {unit}, the devices x config.micro_batches"
    raise UserError(
        f"config.batch_size={batch_size} is more than the {images} training images; {advice}"
    )


def process_rows(batch_size: int) -> tuple[int, int]:
    """(first row, number of rows) of this process in a global batch.

    The parts of the processes are equal and contiguous, in process order.
    """
    rows = batch_size // jax.process_count()
    return jax.process_index() * rows, rows


def training_batches(
    source: Source,
    config: ConfigDict,
    *,
    seed: int,
    batch_size: int,
    steps: int,
    start: int,
    mesh: Mesh,
    crop: HostCrop | None = None,
    check: Callable[[], None] = prefetch.no_check,
    targets: Float[np.ndarray, "N T"] | None = None,
) -> Iterator[dict[str, jax.Array]]:
    """Training batches from step `start` to `steps`, decoded and placed on the devices in advance.

    Host memory: at most 4 batches of this process's rows (7 with worker processes); on the devices:
    at most 4.

    Args:
      source: the training images.
      config: `config.data`.
      seed: of the order.
      batch_size: global.
      steps: of the whole run.
      start: the first step, when resuming.
      mesh: the devices.
      crop: crops images on the host; None: canvases, to be cropped on the devices.
      check: called now and then while a batch is waited for; it may raise.
      targets: labels of the images of `source` that are no classes, to be part of the batches.

    Yields:
      {"image": [B, K, K, C] uint8, "size": [B, 2] int32, "label": [B] int32 (-1: none)}, split over
      the devices; with `crop`, images are crops [B, H, W, C] and there is no "size"; with
      `targets`, also "target" float32 [B, T].

    Raises:
      UserError: too many bad images.
      DataLoaderTimeout: a worker died, or no image was decoded for `config.timeout` seconds.
      ReadFailed: an image could not be read for RETRY_SHARE of these seconds.
    """
    if start == steps:  # Grain does not accept empty datasets
        return iter(())
    first_row, rows = process_rows(batch_size)
    height, width = (config.canvas, config.canvas) if crop is None else crop.size
    workers = prefetch.num_workers(config, rows * height * width * config.channels)
    images = BatchDecoder(
        source=source,
        canvas=config.canvas,
        channels=config.channels,
        threads=prefetch.num_threads(config, workers),
        replace=True,
        crop=crop,
        retry_seconds=RETRY_SHARE * config.timeout,
        activity=Activity(workers),
        options=ImageOptions.from_config(config),
    )
    order = TrainingOrder(
        images=images,
        seed=seed,
        batch_size=batch_size,
        steps=steps,
        first_row=first_row,
        rows=rows,
        parts=prefetch.num_parts(workers, rows),
    )
    prefetcher = prefetch.Prefetcher(
        pool=prefetch.WorkerPool(order, start, workers),
        place=_placement(images, config.max_bad_fraction, mesh, targets),
        timeout=config.timeout,
        activity=images.activity,
        describe_reads=images.describe_reads,
        check=check,
    )
    return iter(prefetcher)


def _placement(
    images: BatchDecoder,
    max_bad_fraction: float,
    mesh: Mesh,
    targets: Float[np.ndarray, "N T"] | None,
) -> Callable[[prefetch.Batch], dict[str, jax.Array]]:
    """A function that records the bad images of a batch and places its arrays on the devices."""
    monitor = BadImageMonitor(images, max_bad_fraction)
    names = ["image", "label"]
    if images.crop is None:
        names.append("size")

    def place(batch: prefetch.Batch) -> dict[str, jax.Array]:
        monitor.record(batch["bad"])
        placed = {name: batch[name] for name in names}
        if targets is not None:
            placed["target"] = targets[batch["index"]]
        return sharding.to_global(placed, mesh)

    return place
