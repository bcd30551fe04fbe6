"""How fast images come: stage by stage, as a whole, and beside what torchvision does (Pillow, one image at a time).

Rates are images per second of CPU time, all threads and processes counted, and per second of time. On a shared machine
the first is the steadier one; rounds of all stages alternate, and medians are told.
"""

import collections
import functools
import io
import os
import pathlib
import statistics
import time

import jax
import numpy as np
from PIL import Image

from lmim_jax.data import decode, loader, prefetch, sources
from lmim_jax.data.augment import device, host
from lmim_jax.distributed import sharding
from lmim_jax.methods import base as methods
from lmim_jax.utils.prng import augment_keys

ROWS = 64  # images in a batch here
AROUND = 4  # batches before and after the measured ones: neither fresh memory nor the start of processes counts
SETUPS = ((1, 0), (2, 0), (4, 0), (1, 1), (1, 2))  # (threads, workers) of the whole loader


def measure(config, images, repeats):
    """Rates of the training images of a recipe.

    Args:
      images: how many each measurement takes, the same ones in the order of training. repeats: rounds.

    Returns:
      {"stages": {name: images per CPU second}, "whole": {name: {"cpu": per CPU second, "wall": per second}}, "ratio":
      whole host side over the baseline, both on one thread, per CPU second}.
    """
    source = sources.from_config(config.data, "train")
    method = methods.from_config(config.method, total_steps=1, steps_per_epoch=1)
    augmentation = device.from_config(
        config.augment, image_size=method.image_size, eval_size=method.feature_size
    )
    keys = functools.partial(augment_keys, config.seed)
    crop = host.HostCrop(augmentation, keys, config.data.canvas)
    batches = max(1, images // ROWS)
    order = _order(source, config.data, batches)
    indices = np.stack([order.indices(AROUND + number) for number in range(batches)])
    stages = _stages(source, config.data, crop, indices.flatten())
    wholes = {"Pillow baseline, 1 thread": lambda: _baseline(source, config, augmentation, indices)}
    for threads, workers in SETUPS:
        name = f"{workers} worker(s)" if workers else f"{threads} thread(s)"
        wholes[f"resize_on=device, {name}"] = functools.partial(
            _whole, source, config.data, batches, None, threads, workers
        )
    wholes["resize_on=host, 1 thread(s)"] = functools.partial(
        _whole, source, config.data, batches, crop
    )
    found = {name: [] for name in (*stages, *wholes)}
    for _ in range(repeats):
        for name, run in stages.items():
            found[name].append((_timed(run, indices.size), 0.0))
        for name, run in wholes.items():
            found[name].append(run())
    cpu = {name: statistics.median(rate for rate, _ in rates) for name, rates in found.items()}
    wall = {name: statistics.median(rate for _, rate in rates) for name, rates in found.items()}
    pairs = zip(
        found["resize_on=device, 1 thread(s)"], found["Pillow baseline, 1 thread"], strict=True
    )
    return {
        "stages": {name: cpu[name] for name in stages},
        "whole": {name: {"cpu": cpu[name], "wall": wall[name]} for name in wholes},
        "ratio": statistics.median(ours / theirs for (ours, _), (theirs, _) in pairs),
    }


def _timed(run, count):
    """Things per CPU second of this process, in a thread, as in training: the main one handles memory otherwise."""
    began = time.process_time()
    prefetch.thread_pool(1).submit(run).result()
    return count / (time.process_time() - began)


def _stages(source, config, crop, indices):
    """{name: function that takes all images through one stage}, each by one thread."""
    data = {int(i): source.record(int(i))[0] for i in set(indices)}
    pixels = {
        i: decode.decode(bytes_, config.canvas, config.channels) for i, bytes_ in data.items()
    }
    canvases = np.zeros((ROWS, config.canvas, config.canvas, config.channels), np.uint8)
    draws = crop.draws(0, np.arange(len(indices)))
    mesh = sharding.make_mesh()

    def each(function):
        return lambda: [function(n, int(i)) for n, i in enumerate(indices)]

    def transfer():
        for _ in range(len(indices) // ROWS):
            jax.block_until_ready(sharding.to_global({"image": canvases.copy()}, mesh))

    return {
        "read": each(lambda _, i: source.record(i)),
        "decode": each(lambda _, i: decode.decode(data[i], config.canvas, config.channels)),
        "put on the canvas": each(lambda n, i: decode.place_on_canvas(pixels[i], canvases[n % ROWS])),
        "crop and resize (resize_on=host)": each(lambda n, i: crop(pixels[i], draws[n])),
        "copy and transfer to the device": transfer,
        "decode by Pillow": each(
            lambda _, i: np.asarray(Image.open(io.BytesIO(data[i])).convert("RGB"))
        ),
    }


def _baseline(source, config, augmentation, indices):
    """(per CPU second, per second): torchvision's way, uint8 crops stacked into batches, without normalisation."""
    rng = np.random.default_rng(0)
    began = time.process_time(), time.perf_counter()
    for batch in indices.tolist():
        np.stack(
            [
                _pillow_crop(source.record(i)[0], config.augment, augmentation.image_size, rng)
                for i in batch
            ]
        )
    return indices.size / (time.process_time() - began[0]), indices.size / (
        time.perf_counter() - began[1]
    )


def _pillow_crop(data, config, size, rng):
    """Decode, RandomResizedCrop and flip one image with Pillow: uint8 [H, W, 3]."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    width, height = image.size
    for _ in range(10):
        area = width * height * rng.uniform(*config.scale)
        aspect = np.exp(rng.uniform(*np.log(config.ratio)))
        w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            break
    else:
        w = h = min(width, height)
    left, top = rng.integers(0, width - w + 1), rng.integers(0, height - h + 1)
    image = image.crop((left, top, left + w, top + h)).resize(
        size[::-1], host.FILTERS[config.interpolation]
    )
    image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image
    return np.asarray(image)


def _order(source, config, batches, crop=None, threads=1, workers=0):
    """The batches to measure, between AROUND others."""
    images = loader.BatchDecoder(
        source, config.canvas, config.channels, threads, replace=True, crop=crop
    )
    size = min(ROWS, len(source))
    return loader.TrainingOrder(images, 0, size, batches + 2 * AROUND, 0, size, max(workers, 1))


def _whole(source, config, batches, crop=None, threads=1, workers=0):
    """(per CPU second, per second) of the loader: from the source to batches of numpy arrays."""
    order = _order(source, config, batches, crop, threads, workers)
    crew = prefetch.WorkerPool(order, 0, workers)
    for _ in range(AROUND):
        next(crew)
    pids = [os.getpid(), *crew.pids]
    began, used = time.perf_counter(), _cpu_seconds(pids)
    for _ in range(batches):
        next(crew)
    count = batches * order.batch_size
    rates = count / (_cpu_seconds(pids) - used), count / (time.perf_counter() - began)
    collections.deque(crew, maxlen=0)  # to its end: what workers have shared is freed
    return rates


def _cpu_seconds(pids):
    """CPU time of some processes so far, all threads, of those that are still there (Linux)."""
    total = 0.0
    for pid in pids:
        try:
            fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def table(found):
    """Lines for people."""
    lines = [f"{'stage, one thread':<36}{'images / CPU s':>16}"]
    lines += [f"{name:<36}{rate:>16.0f}" for name, rate in found["stages"].items()]
    lines += ["", f"{'whole host side':<36}{'images / CPU s':>16}{'images / s':>14}"]
    lines += [
        f"{name:<36}{rate['cpu']:>16.0f}{rate['wall']:>14.0f}"
        for name, rate in found["whole"].items()
    ]
    return "\n".join(
        [*lines, "", f"resize_on=device over the baseline, per CPU second: {found['ratio']:.2f}"]
    )
