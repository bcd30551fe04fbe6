"""How fast a recipe trains: its step alone, on random images, on all devices.

It is the step of train.py: same function, donated state, same placement. On a shared machine only comparisons mean
anything: `compare` runs two recipes step by step in turn.
"""

import logging
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from lmim_jax import flops, optim, sharding, state, train
from lmim_jax.data import augment, loader
from lmim_jax.errors import UserError
from lmim_jax.methods import base as methods
from lmim_jax.tools import bench_program

log = logging.getLogger("lmim_jax.tools.bench")

# Part of jax's `device_kind` -> dense bfloat16 FLOP/s of one device (data sheets); the first that fits.
PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "B200": 2250e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
}


class Step:
    """The compiled train step of a recipe, with a state and a batch of random images to run it on."""

    def __init__(self, config, steps_per_epoch=1000):
        """Builds, compiles and allocates, as train.py does."""
        self.config, self.mesh = config, sharding.make_mesh()
        sharding.check_batch(config.batch_size, config.micro_batches, self.mesh.size)
        total = config.total_steps or config.epochs * steps_per_epoch
        self.method = methods.from_config(config.method, total_steps=total, steps_per_epoch=steps_per_epoch)
        sizes = dict(image_size=self.method.image_size, eval_size=self.method.feature_size)
        augmentation = augment.from_config(config.augment, **sizes)
        warmup = config.optimizer.warmup_epochs / config.epochs * total
        optimizer, _ = optim.from_config(config.optimizer, warmup_steps=warmup, total_steps=total)
        self._state, shardings = state.create(self.method, optimizer, config.seed, self.mesh)
        self._batch = random_batch(config, self.mesh)
        began = time.perf_counter()
        jitted = train.jit_step(config, self.method, augmentation, optimizer, self.mesh, shardings)
        self.lowered = jitted.lower(self._state, self._batch)
        traced = time.perf_counter()
        self.compiled = self.lowered.compile()
        self.trace_seconds, self.compile_seconds = traced - began, time.perf_counter() - traced

    def run(self, batch=None):
        """One step, on `batch` or the random one; its metrics, perhaps not computed yet."""
        with jax.transfer_guard("disallow"):
            self._state, numbers = self.compiled(self._state, self._batch if batch is None else batch)
        return numbers

    def timed(self):
        """Seconds of one step, from start to end."""
        began = time.perf_counter()
        jax.block_until_ready((self.run(), self._state))
        return time.perf_counter() - began

    def figures(self, seconds):
        """What timed steps and the program say, a dict of plain values; see `measure`."""
        kind, count = jax.devices()[0].device_kind, jax.device_count()
        gigaflop = flops.of_method(self.method).total / 1e9
        rate = self.config.batch_size / statistics.median(seconds)
        peak, source = peak_of(kind, count)
        stats = jax.local_devices()[0].memory_stats() or {}
        return {
            "device": kind,
            "devices": count,
            "batch_size": self.config.batch_size,
            "images_per_second": rate,
            "seconds_per_step": spread(seconds),
            "gflop_per_image": gigaflop,
            "teraflops": gigaflop * rate / 1e3,
            "peak_teraflops": peak and peak / 1e12,
            "peak_from": source,
            "mfu": peak and gigaflop * 1e9 * rate / peak,
            "trace_seconds": self.trace_seconds,
            "compile_seconds": self.compile_seconds,
            "peak_memory": stats.get("peak_bytes_in_use"),
            "asked": bench_program.asked(self.lowered),
            "made": bench_program.made(self.compiled),
        }


def random_batch(config, mesh):
    """A batch like the loader's, of noise."""
    _, rows = loader.rows_of_process(config.batch_size)
    shape = rows, config.data.canvas, config.data.canvas, config.data.channels
    return sharding.to_global(
        {
            "image": np.random.default_rng(0).integers(0, 256, shape, np.uint8),
            "size": np.full((rows, 2), config.data.canvas, np.int32),
            "label": np.full(rows, -1, np.int32),
        },
        mesh,
    )


def spread(values):
    """Median, least, greatest and quartiles, and how many they are of."""
    low, _, high = statistics.quantiles(values, method="inclusive") if len(values) > 1 else values * 3
    names = dict(median=statistics.median(values), min=min(values), max=max(values), lower_quartile=low)
    return {**names, "upper_quartile": high, "steps": len(values)}


def peak_of(kind, count):
    """(FLOP/s of so many devices at best, where that is from); (None, ...) for a device not in the table.

    A CPU's is what it reaches here and now, in 2048-cubed float32 matrix products: the median of ten.
    """
    if jax.default_backend() == "cpu":
        x = jnp.ones((2048, 2048))
        product = jax.jit(jnp.matmul)
        jax.block_until_ready(product(x, x))
        seconds = []
        for _ in range(10):
            began = time.perf_counter()
            jax.block_until_ready(product(x, x))
            seconds.append(time.perf_counter() - began)
        return 2 * 2048**3 / statistics.median(seconds), "float32 matrix products of 2048 x 2048, measured here"
    each = next((peak for part, peak in PEAKS.items() if part in kind), None)
    return each and each * count, "table of dense bfloat16 peaks" if each else f"{kind} is not in the table"


def measure(config, steps=20, warmup=3):
    """Time the train step of a recipe.

    Args:
      config: a recipe; its data are not touched. steps: to time, one by one. warmup: to run before.

    Returns:
      A dict of plain values: images_per_second (median step); seconds_per_step (see `spread`); gflop_per_image (see
      flops.py), teraflops reached, peak_teraflops, mfu, their ratio; trace_seconds, compile_seconds; peak_memory in
      bytes, where the device tells; asked and made (see bench_program.py).

    Raises:
      UserError: the batch cannot be split over the devices, or what the method refuses.
    """
    step = Step(config)
    for _ in range(warmup):
        step.timed()
    return step.figures([step.timed() for _ in range(steps)])


def compare(first, second, steps=20, warmup=3):
    """Time two recipes, step by step in turn.

    Returns:
      {"first", "second": see `measure`, "ratio": how many times as many images a second the second trains (median over
      pairs of neighbouring steps, and quartiles)}.
    """
    both = Step(first), Step(second)
    for _ in range(warmup):
        for step in both:
            step.timed()
    pairs = [[step.timed() for step in both] for _ in range(steps)]
    rates = [(second.batch_size / b) / (first.batch_size / a) for a, b in pairs]
    one, two = (step.figures(list(seconds)) for step, seconds in zip(both, zip(*pairs, strict=True), strict=True))
    return {"first": one, "second": two, "ratio": spread(rates)}
