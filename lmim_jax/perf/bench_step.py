"""How fast a recipe trains: its step alone, on random images, on all devices.

It is the step of train.py: same function, donated state, same placement. On a shared machine only comparisons mean
anything: `compare` runs two recipes step by step in turn.
"""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from lmim_jax.data import loader
from lmim_jax.distributed import sharding
from lmim_jax.perf import accelerators, aot, flops, program_stats
from lmim_jax.train import state


def lower(config, mesh, steps_per_epoch=1000):
    """The train step of a recipe, lowered from shapes alone, as train.py has it.

    Returns:
      (dry_run.Recipe, jax.stages.Lowered).

    Raises:
      UserError: the batch cannot be split over the devices, or what the method refuses.
    """
    sharding.check_batch(config.batch_size, config.micro_batches, mesh.size)
    recipe = aot.Recipe.of(config, steps_per_epoch * config.batch_size)
    function, arguments = recipe.jitted(mesh)
    return recipe, function.lower(*arguments)


class Step:
    """The compiled train step of a recipe, with a state and a batch of random images to run it on."""

    def __init__(self, config, steps_per_epoch=1000):
        """Lowers, compiles, and allocates."""
        self.config, self.mesh = config, sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
        began = time.perf_counter()
        self.recipe, self.lowered = lower(config, self.mesh, steps_per_epoch)
        traced = time.perf_counter()
        self.compiled = self.lowered.compile()
        self.trace_seconds, self.compile_seconds = traced - began, time.perf_counter() - traced
        parts, layout = (self.recipe.method, self.recipe.optimizer), config.mesh
        self._state, _ = state.create(
            *parts, config.seed, self.mesh, rules=layout.rules, min_size=layout.min_size
        )
        self._batch = random_batch(self.recipe, self.mesh)

    def run(self, batch=None):
        """One step, on `batch` or the random one; its metrics, perhaps not computed yet."""
        with jax.transfer_guard("disallow"):
            self._state, numbers = self.compiled(
                self._state, self._batch if batch is None else batch
            )
        return numbers

    def timed(self):
        """Seconds of one step, from start to end."""
        began = time.perf_counter()
        jax.block_until_ready((self.run(), self._state))
        return time.perf_counter() - began

    def figures(self, seconds, products):
        """What timed steps and the program say, a dict of plain values; see `measure`.

        Args:
          seconds: of each step. products: of a matrix product beside each, on a CPU; see `peak_of`.
        """
        kind, count = jax.devices()[0].device_kind, jax.device_count()
        gigaflop = flops.of_method(self.recipe.method).total / 1e9
        rate = self.config.batch_size / statistics.median(seconds)
        peak, source = peak_of(kind, count, products)
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
            "asked": program_stats.asked(self.lowered),
            "made": program_stats.made(self.compiled),
        }


def random_batch(recipe, mesh):
    """A batch like the loader's, of noise that fills the canvas."""
    _, rows = loader.process_rows(recipe.config.batch_size)
    values = {name: np.empty(x.shape, x.dtype) for name, x in recipe.batch(rows).items()}
    values["image"] = np.random.default_rng(0).integers(0, 256, values["image"].shape, np.uint8)
    for name, value in (("size", recipe.config.data.canvas), ("label", -1)):
        if name in values:
            values[name].fill(value)
    return sharding.to_global(values, mesh)


def spread(values):
    """Median, least, greatest and quartiles, and how many they are of."""
    low, _, high = (
        statistics.quantiles(values, method="inclusive") if len(values) > 1 else values * 3
    )
    names = dict(
        median=statistics.median(values), min=min(values), max=max(values), lower_quartile=low
    )
    return {**names, "upper_quartile": high, "steps": len(values)}


def matrix_seconds():
    """Seconds of a float32 matrix product of 2048 x 2048 on a CPU, the better of two; None elsewhere."""
    if jax.default_backend() != "cpu":
        return None
    x, seconds = jax.block_until_ready(jnp.ones((2048, 2048))), []
    for _ in range(2):
        began = time.perf_counter()
        jax.block_until_ready(x @ x)
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def peak_of(kind, count, products):
    """(FLOP/s of so many devices at best, where that is from); (None, ...) for a device not in the table.

    A CPU's is what it reaches here and now, in 2048-cubed float32 matrix products: the median of those between the
    steps, as a shared machine may be twice as fast a minute later.
    """
    if jax.default_backend() == "cpu":
        return 2 * 2048**3 / statistics.median(
            products
        ), "float32 matrix products of 2048 x 2048 between the steps"
    chip = accelerators.of_device(kind)
    return (
        chip and chip.flops * count,
        "dense bfloat16, chips.py" if chip else f"{kind} is not in chips.py",
    )


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
    return measured(config, steps, warmup)[1]


def measured(config, steps=20, warmup=3):
    """(Step, `measure`)."""
    step = Step(config)
    for _ in range(warmup):
        step.timed()
        matrix_seconds()
    seconds, products = zip(*[(step.timed(), matrix_seconds()) for _ in range(steps)], strict=True)
    return step, step.figures(seconds, products)


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
    rounds = [(*[step.timed() for step in both], matrix_seconds()) for _ in range(steps)]
    rates = [(second.batch_size / b) / (first.batch_size / a) for a, b, _ in rounds]
    *seconds, products = zip(*rounds, strict=True)
    one, two = (step.figures(times, products) for step, times in zip(both, seconds, strict=True))
    return {"first": one, "second": two, "ratio": spread(rates)}
