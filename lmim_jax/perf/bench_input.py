"""Throughput of the input pipeline by stage and as a whole, compared with torchvision's way.

torchvision decodes and crops with Pillow, one image at a time; there is no comparison for images
that Pillow does not read as they are: several modalities, other bands, more than 8 bits. Rates are
images per second of CPU time, all threads and processes added up, and per second of wall-clock
time. On a shared machine the first is the steadier one. Rounds of all measurements alternate, and
medians are reported.
"""

import collections
import dataclasses
import functools
import io
import os
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Int, UInt8
from ml_collections import ConfigDict
from PIL import Image

from lmim_jax.data import decode, loader, modalities, prefetch, samples, sources
from lmim_jax.data.augment.device import Augment
from lmim_jax.data.augment.host import FILTERS, HostCrop
from lmim_jax.data.image_options import ImageOptions
from lmim_jax.distributed import sharding
from lmim_jax.methods import base as methods
from lmim_jax.utils.prng import augment_keys

BATCH = 64  # images in a batch here
# Batches read before and after the measured ones, so that neither the allocation of memory nor the
# start of processes is measured
MARGIN = 4
SETUPS = ((1, 0), (2, 0), (4, 0), (1, 1), (1, 2))  # (threads, workers) of the whole loader
TRIES = 10  # of a random crop that fits into the image

BASELINE = "Pillow baseline, 1 thread"
LOADER = "resize_on=device, 1 thread(s)"


@dataclasses.dataclass(frozen=True)
class Rate:
    """Images per second of CPU time, and per second of wall-clock time."""

    cpu: float
    wall: float


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """What is measured: the training images of a recipe.

    Attributes:
      config: the recipe.
      source: the images.
      augmentation: of the recipe.
      crop: the same augmentation on the host.
      batches: number of batches in each measurement.
      indices: the images of these batches, in the order of training.
      plain: whether they are images of 8 bits in colors, which Pillow reads.
    """

    config: ConfigDict
    source: Any
    augmentation: Augment
    crop: HostCrop
    batches: int
    indices: Int[np.ndarray, "batches B"]
    plain: bool


def measure(config: ConfigDict, images: int, repeats: int) -> dict[str, Any]:
    """Measure the throughput of the training images of a recipe.

    Args:
      config: the recipe.
      images: number of images in each measurement, always the same ones.
      repeats: number of rounds.

    Returns:
      {"stages": {name: images per CPU second}, "whole": {name: {"cpu": per CPU second, "wall": per
      second}}, "ratio": whole input pipeline over the baseline, both on one thread, per CPU
      second; None: there is no baseline}.

    Raises:
      UserError: the images are not found.
    """
    pipeline = _build_pipeline(config, images)
    stages = _Stages(pipeline).by_name()
    wholes = _whole_pipelines(pipeline)
    stage_rates: dict[str, list[float]] = collections.defaultdict(list)
    whole_rates: dict[str, list[Rate]] = collections.defaultdict(list)
    for _ in range(repeats):
        for name, run in stages.items():
            stage_rates[name].append(_stage_rate(run, pipeline.indices.size))
        for name, measure_rate in wholes.items():
            whole_rates[name].append(measure_rate())
    ratio = None
    if pipeline.plain:
        pairs = zip(whole_rates[LOADER], whole_rates[BASELINE], strict=True)
        ratio = statistics.median(ours.cpu / theirs.cpu for ours, theirs in pairs)
    return {
        "stages": {name: statistics.median(rates) for name, rates in stage_rates.items()},
        "whole": {name: _median_rate(rates) for name, rates in whole_rates.items()},
        "ratio": ratio,
    }


def _build_pipeline(config: ConfigDict, images: int) -> Pipeline:
    source = sources.from_config(config.data, "train")
    method = methods.from_config(
        modalities.method_options(config), total_steps=1, steps_per_epoch=1
    )
    augmentation = Augment.from_config(
        config.augment, image_size=method.image_size, eval_size=method.feature_size
    )
    keys = functools.partial(augment_keys, config.seed)
    batches = max(1, images // BATCH)
    order = _order(source, config.data, batches)
    indices = np.stack([order.indices(MARGIN + number) for number in range(batches)])
    return Pipeline(
        config=config,
        source=source,
        augmentation=augmentation,
        crop=HostCrop(augmentation, keys, config.data.canvas),
        batches=batches,
        indices=indices,
        plain=_are_plain(source, indices, config.data),
    )


def _are_plain(source: Any, indices: Int[np.ndarray, "batches B"], config: ConfigDict) -> bool:
    """Whether some images are of 8 bits in colors, which Pillow reads as they are."""
    if config.modalities or config.channels != 3:
        return False
    options = ImageOptions.from_config(config)
    encoded = (source.record(int(index))[0] for index in np.unique(indices))
    return all(samples.read(data, config.channels, options) is None for data in encoded)


def _median_rate(rates: list[Rate]) -> dict[str, float]:
    return {
        "cpu": statistics.median(rate.cpu for rate in rates),
        "wall": statistics.median(rate.wall for rate in rates),
    }


def _stage_rate(run: Callable[[], Any], count: int) -> float:
    """Images per CPU second of this process, while `run` handles `count` images.

    It runs in a thread, as in training: memory management differs in the main thread.
    """
    began = time.process_time()
    prefetch.thread_pool(1).submit(run).result()
    return count / (time.process_time() - began)


class _Stages:
    """The stages of the input pipeline, each as a method that takes all images through it."""

    def __init__(self, pipeline: Pipeline) -> None:
        """Prepare the input of every stage."""
        config = pipeline.config.data
        self._config = config
        self._options = ImageOptions.from_config(config)
        self._source = pipeline.source
        self._crop = pipeline.crop
        self._indices = [int(i) for i in pipeline.indices.flatten()]
        self._encoded = {}
        self._pixels = {}
        for i in set(self._indices):
            self._encoded[i] = pipeline.source.record(i)[0]
            self._pixels[i] = decode.decode(
                self._encoded[i], config.canvas, config.channels, self._options
            )
        canvas = (config.canvas, config.canvas, config.channels)
        self._canvases = np.zeros((BATCH,) + canvas, np.uint8)
        self._draws = pipeline.crop.draws(0, np.arange(len(self._indices)))
        self._mesh = sharding.make_mesh()
        self._plain = pipeline.plain

    def by_name(self) -> dict[str, Callable[[], None]]:
        """The stages and their names in the table."""
        stages = {
            "read": self.read,
            "decode": self.decode,
            "put on the canvas": self.put_on_canvas,
            "crop and resize (resize_on=host)": self.crop_and_resize,
            "copy and transfer to the device": self.transfer,
        }
        if self._plain:
            stages["decode by Pillow"] = self.decode_with_pillow
        return stages

    def read(self) -> None:
        """Read the encoded images."""
        for i in self._indices:
            self._source.record(i)

    def decode(self) -> None:
        """Decode images."""
        for i in self._indices:
            decode.decode(
                self._encoded[i], self._config.canvas, self._config.channels, self._options
            )

    def put_on_canvas(self) -> None:
        """Copy decoded images to canvases."""
        for n, i in enumerate(self._indices):
            decode.place_on_canvas(self._pixels[i], self._canvases[n % BATCH])

    def crop_and_resize(self) -> None:
        """Crop and resize decoded images on the host."""
        for n, i in enumerate(self._indices):
            self._crop(self._pixels[i], self._draws[n])

    def transfer(self) -> None:
        """Transfer batches of canvases to the devices."""
        for _ in range(len(self._indices) // BATCH):
            batch = {"image": self._canvases.copy()}
            jax.block_until_ready(sharding.to_global(batch, self._mesh))

    def decode_with_pillow(self) -> None:
        """Decode images with Pillow, as torchvision does."""
        for i in self._indices:
            np.asarray(Image.open(io.BytesIO(self._encoded[i])).convert("RGB"))


def _whole_pipelines(pipeline: Pipeline) -> dict[str, Callable[[], Rate]]:
    """{name: function that measures a whole pipeline, from the source to batches of arrays}."""
    pipelines: dict[str, Callable[[], Rate]] = {}
    if pipeline.plain:
        pipelines[BASELINE] = functools.partial(_baseline_rate, pipeline)
    for threads, workers in SETUPS:
        setup = f"{threads} thread(s)"
        if workers:
            setup = f"{workers} worker(s)"
        pipelines[f"resize_on=device, {setup}"] = functools.partial(
            _loader_rate, pipeline, crop=None, threads=threads, workers=workers
        )
    pipelines["resize_on=host, 1 thread(s)"] = functools.partial(
        _loader_rate, pipeline, crop=pipeline.crop, threads=1, workers=0
    )
    return pipelines


def _baseline_rate(pipeline: Pipeline) -> Rate:
    """torchvision's way: uint8 crops by Pillow, stacked into batches, without normalization."""
    rng = np.random.default_rng(0)
    size = pipeline.augmentation.image_size
    cpu_start = time.process_time()
    wall_start = time.perf_counter()
    for batch in pipeline.indices.tolist():
        crops = []
        for i in batch:
            data = pipeline.source.record(i)[0]
            crops.append(_pillow_crop(data, pipeline.config.augment, size, rng))
        np.stack(crops)
    count = pipeline.indices.size
    return Rate(
        cpu=count / (time.process_time() - cpu_start),
        wall=count / (time.perf_counter() - wall_start),
    )


def _pillow_crop(
    data: bytes, config: ConfigDict, size: tuple[int, int], rng: np.random.Generator
) -> UInt8[np.ndarray, "H W 3"]:
    """Decode, RandomResizedCrop and flip one image with Pillow."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    crop_width, crop_height = _draw_crop_size(image.size, config, rng)
    left = int(rng.integers(0, image.width - crop_width + 1))
    top = int(rng.integers(0, image.height - crop_height + 1))
    height, width = size
    image = image.crop((left, top, left + crop_width, top + crop_height))
    image = image.resize((width, height), FILTERS[config.interpolation])
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(image)


def _draw_crop_size(
    image_size: tuple[int, int], config: ConfigDict, rng: np.random.Generator
) -> tuple[int, int]:
    """(width, height) of a random crop; of the largest square if no try fits into the image."""
    image_width, image_height = image_size
    for _ in range(TRIES):
        area = image_width * image_height * rng.uniform(config.scale[0], config.scale[1])
        log_ratio = np.log(config.ratio)
        aspect = np.exp(rng.uniform(log_ratio[0], log_ratio[1]))
        width = round(np.sqrt(area * aspect))
        height = round(np.sqrt(area / aspect))
        if 0 < width <= image_width and 0 < height <= image_height:
            return width, height
    side = min(image_width, image_height)
    return side, side


def _order(
    source: Any,
    config: ConfigDict,
    batches: int,
    crop: HostCrop | None = None,
    threads: int = 1,
    workers: int = 0,
) -> loader.TrainingOrder:
    """The batches to measure, with MARGIN others before and after them."""
    images = loader.BatchDecoder(
        source=source,
        canvas=config.canvas,
        channels=config.channels,
        threads=threads,
        replace=True,
        crop=crop,
        options=ImageOptions.from_config(config),
    )
    size = min(BATCH, len(source))
    return loader.TrainingOrder(
        images=images,
        seed=0,
        batch_size=size,
        steps=batches + 2 * MARGIN,
        first_row=0,
        rows=size,
        parts=max(workers, 1),
    )


def _loader_rate(pipeline: Pipeline, crop: HostCrop | None, threads: int, workers: int) -> Rate:
    """The data loader, from the source to batches of numpy arrays."""
    order = _order(pipeline.source, pipeline.config.data, pipeline.batches, crop, threads, workers)
    pool = prefetch.WorkerPool(order, 0, workers)
    for _ in range(MARGIN):
        next(pool)
    processes = [os.getpid()] + list(pool.pids)
    wall_start = time.perf_counter()
    cpu_start = _cpu_seconds(processes)
    for _ in range(pipeline.batches):
        next(pool)
    count = pipeline.batches * order.batch_size
    cpu_seconds = max(_cpu_seconds(processes) - cpu_start, 1 / _ticks_per_second())
    rate = Rate(
        cpu=count / cpu_seconds,
        wall=count / (time.perf_counter() - wall_start),
    )
    collections.deque(pool, maxlen=0)  # read the rest, so that the workers' shared memory is freed
    return rate


def _cpu_seconds(processes: list[int]) -> float:
    """CPU time of the running ones of some processes so far, over all threads (Linux)."""
    total = 0.0
    for process in processes:
        try:
            status = pathlib.Path(f"/proc/{process}/stat").read_text()
        except OSError:
            continue
        fields = status.rpartition(")")[2].split()
        user = int(fields[11])
        system = int(fields[12])
        total += (user + system) / _ticks_per_second()
    return total


def _ticks_per_second() -> int:
    """The resolution of the CPU time of other processes."""
    return os.sysconf("SC_CLK_TCK")


def table(measured: dict[str, Any]) -> str:
    """The result of `measure` as text."""
    lines = [f"{'stage, one thread':<36}{'images / CPU s':>16}"]
    for name, rate in measured["stages"].items():
        lines.append(f"{name:<36}{rate:>16.0f}")
    lines.append("")
    lines.append(f"{'whole input pipeline':<36}{'images / CPU s':>16}{'images / s':>14}")
    for name, rate in measured["whole"].items():
        lines.append(f"{name:<36}{rate['cpu']:>16.0f}{rate['wall']:>14.0f}")
    comparison = "no baseline: Pillow does not read these images as they are"
    if measured["ratio"] is not None:
        comparison = f"resize_on=device over the baseline, per CPU second: {measured['ratio']:.2f}"
    lines += ["", comparison]
    return "\n".join(lines)
