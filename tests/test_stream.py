"""The stream of images, crops, flips and masks.

It is the same for any number of workers and processes, and after a restart.
"""

import functools
import hashlib
import io
import multiprocessing
import os
import signal
import sys
import threading
import time
from concurrent import futures

import jax
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict
from PIL import Image

from lmim_jax.configs import vit_b
from lmim_jax.data import loader, prefetch
from lmim_jax.data.augment.device import Augment, fit_crop
from lmim_jax.data.augment.host import make_host_crop
from lmim_jax.distributed import sharding
from lmim_jax.methods import base as methods
from lmim_jax.train.step import draw
from lmim_jax.utils import errors
from lmim_jax.utils.prng import augment_keys, image_keys

OPTIONS = vit_b.data().to_dict() | dict(
    canvas=40,
    channels=3,
    workers=0,
    threads=2,
    timeout=60.0,
    max_bad_fraction=0.2,
    resize_on="device",
)
BATCH, COUNT, SEED = 40, 2000, 3


class Numbered:
    """A source of 500 images of different sizes, quick to draw and the same in every process."""

    classes, ignored = ("a", "b"), ()

    def __len__(self):
        return 500

    def record(self, index):
        """(encoded bytes, class) of image `index`."""
        rng = np.random.default_rng(index)
        height, width = rng.integers(20, 41, 2)
        stream = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(
            stream, "BMP"
        )
        return stream.getvalue(), index % 2

    def name(self, index):
        """Its number."""
        return f"image {index}"


@functools.cache
def parts():
    """(method, augmentation) of the tiny recipe."""
    config = tiny.get_config()
    method = methods.from_config(config.method, total_steps=1, steps_per_epoch=1)
    return method, Augment.from_config(
        config.augment, image_size=method.image_size, eval_size=method.feature_size
    )


@functools.cache
def drawn():
    """Jitted (step, positions, sizes) -> (boxes, flips, masks), as in the train step."""
    method, augmentation = parts()

    def draw_step(step, positions, sizes):
        _, rng = jax.random.split(jax.random.key(SEED))
        rng, keys = image_keys(rng, step, positions)
        draws = jax.vmap(augmentation.draw)(augment_keys(SEED, step, positions))
        boxes = jax.vmap(lambda one, size: fit_crop(one, size, 40, augmentation.ratio))(
            draws, sizes
        )
        marker = {"image": np.zeros((len(positions), *method.image_size, 3), np.uint8)}
        _, views = draw(method, augmentation, rng, keys, marker)
        return boxes, draws["flip"], views["visible"]

    return jax.jit(draw_step)


def digest(rows_by_step, start=0):
    """SHA-256 over (record, crop box, flip, mask) of every image of the global batches given."""
    whole = hashlib.sha256()
    for step, batch in enumerate(rows_by_step, start):
        boxes, flips, masks = drawn()(step, np.arange(BATCH), np.asarray(batch["size"], np.int32))
        for row in zip(batch["index"], boxes, flips, masks, strict=True):
            whole.update(b"".join(np.asarray(column, np.int32).tobytes() for column in row))
        whole.update(np.asarray(batch["image"]).tobytes())
    return whole.hexdigest()


def stream(workers=0, processes=1, start=0, steps=COUNT // BATCH):
    """Batches from `start`, assembled from the rows of several processes."""
    pools = []
    rows = BATCH // processes
    for process in range(processes):
        images = loader.BatchDecoder(Numbered(), 40, 3, 2, replace=True)
        order = loader.TrainingOrder(
            images, SEED, BATCH, steps, process * rows, rows, max(workers, 1)
        )
        pools.append(prefetch.WorkerPool(order, start, workers))
    for batches in zip(*pools, strict=True):
        yield {
            name: np.concatenate([batch[name] for batch in batches])
            for name in batches[0]
            if name != "pid"
        }


@functools.cache
def undisturbed():
    """The batches of one process without workers."""
    return list(stream())


def test_the_first_2000_images_are_the_same_with_workers():
    # See faults/test_streams.py for 1 and 4 workers
    assert digest(stream(workers=2)) == digest(undisturbed())


@pytest.mark.parametrize("processes", [2, 4])  # their shares of the rows, made in this process
def test_they_are_the_same_for_any_number_of_processes(processes):
    assert digest(stream(processes=processes)) == digest(undisturbed())


@pytest.mark.parametrize(("start", "workers", "processes"), [(7, 2, 1), (29, 0, 4)])
def test_they_are_the_same_when_resumed_with_another_number(start, workers, processes):
    resumed = stream(workers=workers, processes=processes, start=start)
    assert digest(resumed, start) == digest(undisturbed()[start:], start)


def config_of(**change):
    return ConfigDict({**OPTIONS, **change})


def batches(source, crop=None, steps=4, start=0, **change):
    mesh, config = sharding.make_mesh(), config_of(**change)
    return loader.training_batches(
        source, config, seed=SEED, batch_size=BATCH, steps=steps, start=start, mesh=mesh, crop=crop
    )


def crop_on_host():
    keys = functools.partial(augment_keys, SEED)
    return make_host_crop(config_of(resize_on="host"), parts()[1], keys)


@pytest.mark.parametrize("workers", [0, 1])
def test_crops_on_the_host_are_those_of_the_device(workers):
    method, augmentation = parts()
    crop = crop_on_host()
    on_host = list(batches(Numbered(), crop, workers=workers, steps=2))
    prepare_step = jax.jit(
        lambda step, batch: augmentation(augment_keys(SEED, step, np.arange(BATCH)), batch)
    )
    for step, (device, host) in enumerate(zip(batches(Numbered(), steps=2), on_host, strict=True)):
        assert host.keys() == {"image", "label"}
        assert host["image"].shape == (BATCH, *method.image_size, 3)
        theirs, ours = (
            np.asarray(augmentation.denormalize(prepare_step(step, x))) for x in (device, host)
        )
        assert np.abs(theirs - ours).max() <= 1
        draws = crop.draws(step, np.arange(BATCH))
        sizes = np.asarray(device["size"])
        boxes, flips, _ = drawn()(step, np.arange(BATCH), sizes)
        np.testing.assert_array_equal(
            boxes, [crop.box(one, *s) for one, s in zip(draws, sizes, strict=True)]
        )
        np.testing.assert_array_equal(flips, [one["flip"] for one in draws])


def test_where_to_crop_is_checked():
    with pytest.raises(errors.UserError, match=r"resize_on='gpu' must be one of: device | host"):
        make_host_crop(config_of(resize_on="gpu"), None, None)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (signal.SIGKILL, r"data worker \d of 2 \(pid \d+\) died"),
        (
            signal.SIGSTOP,
            r"no image decoded for 4 s: data worker \d of 2 \(pid \d+\) does not respond",
        ),
    ],
)
def test_a_worker_that_dies_or_hangs_is_named(number, message):
    before = {process.pid for process in multiprocessing.active_children()}
    endless = batches(Numbered(), steps=10_000, workers=2, timeout=4.0)
    next(endless)
    os.kill(max({process.pid for process in multiprocessing.active_children()} - before), number)
    began = time.monotonic()
    with pytest.raises(errors.DataLoaderTimeout, match=message):
        for _ in endless:
            pass
    assert time.monotonic() - began < 60


class Hanging(Numbered):
    """After four batches, reading never returns."""

    until = threading.Event()
    reads = 0

    def record(self, index):
        """As in Numbered, for the first four batches."""
        self.reads += 1
        if self.reads > 4 * BATCH:
            self.until.wait(60)
        return super().record(index)


def test_a_read_that_hangs_is_named():
    source = Hanging()
    try:
        with pytest.raises(
            errors.DataLoaderTimeout,
            match=r"no image decoded for 3 s: a decoding thread does not respond, at image \d+",
        ):
            list(batches(source, steps=100, timeout=3.0))
    finally:
        source.until.set()


def test_memory_is_bounded():
    made, most = 0, 0

    class Counting(Numbered):
        def record(self, index):
            nonlocal made
            made += 1
            return super().record(index)

    for used, _ in enumerate(batches(Counting(), steps=12), 1):
        time.sleep(0.2)  # a slow step: the loader prefetches as far as it may
        most = max(most, made - used * BATCH)
    assert 2 <= most / BATCH <= 6  # on the devices 2, and 1 waiting to be put there; on the host 3


def test_threads_recycle_memory_of_several_sizes():
    """Four threads, each with sizes of its own: this once raised a KeyError."""

    def recycle(thread):
        for i in range(10_000):
            prefetch.recycled_array((1 + (i + thread) % 3, 8), np.uint8)[:] = thread

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with futures.ThreadPoolExecutor(4) as threads:
            list(threads.map(recycle, range(4)))
    finally:
        sys.setswitchinterval(before)


def test_memory_is_recycled_only_when_no_view_is_left():
    first = prefetch.recycled_array((4, 64, 64, 3), np.uint8)
    first[:] = 7
    placed = sharding.to_global({"image": np.concatenate([first, first])}, sharding.make_mesh())[
        "image"
    ]
    part = first[1:, :2]
    address = first.ctypes.data
    del first
    other = prefetch.recycled_array((4, 64, 64, 3), np.uint8)
    assert other.ctypes.data != address  # `part` still shows the first
    other[:] = 9
    assert (part == 7).all()
    del part
    again = prefetch.recycled_array((4, 64, 64, 3), np.uint8)
    assert again.ctypes.data == address
    on_devices = jax.device_put(again)  # may share the memory
    again[:] = 5
    seen = np.asarray(on_devices).copy()
    del again
    prefetch.recycled_array((4, 64, 64, 3), np.uint8)[:] = 1
    np.testing.assert_array_equal(np.asarray(on_devices), seen)
    assert (np.asarray(placed) == 7).all()
