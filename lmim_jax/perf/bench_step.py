"""Speed of the train step of a recipe by itself, on random images, on all devices.

It is the step of the training loop: same function, donated state, same placement. On a shared
machine only comparisons are meaningful: `compare` runs two recipes in turn, step by step.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lmim_jax.data import loader
from lmim_jax.distributed import sharding
from lmim_jax.perf import accelerators, aot, flops, program_stats
from lmim_jax.train.build import TrainingParts, build

MATRIX_SIDE = 2048  # of the matrix product that a CPU's peak is measured with
NO_LABEL = -1

Batch = dict[str, jax.Array]


def lower(
    config: ConfigDict, mesh: Mesh, steps_per_epoch: int = 1000
) -> tuple[TrainingParts, jax.stages.Lowered]:
    """Lower the train step of a recipe from shapes alone.

    Raises:
      UserError: the batch cannot be split over the devices, or the config has an invalid value.
    """
    sharding.check_batch(config.batch_size, config.micro_batches, mesh.size)
    parts = build(config, steps_per_epoch)
    function, arguments = aot.abstract_step(parts, mesh)
    return parts, function.lower(*arguments)


def _no_batch() -> None:
    """In place of a batch: the step runs on its random one."""


class BenchmarkStep:
    """The compiled train step of a recipe, with a state and a batch of random images.

    Attributes:
      config: the recipe.
      mesh: all devices.
      parts: what the recipe consists of.
      lowered: the step as StableHLO.
      compiled: the compiled step.
      trace_seconds: time to trace and lower it.
      compile_seconds: time to compile it.
    """

    def __init__(
        self,
        config: ConfigDict,
        steps_per_epoch: int = 1000,
        on_compiled: Callable[[], None] | None = None,
    ) -> None:
        """Lower and compile the step, and allocate its state and batch.

        Args:
          config: the recipe.
          steps_per_epoch: for the schedules.
          on_compiled: called before anything is allocated, such as to wait for the device.
        """
        self.config = config
        self.mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
        began = time.perf_counter()
        self.parts, self.lowered = lower(config, self.mesh, steps_per_epoch)
        traced = time.perf_counter()
        self.compiled = self.lowered.compile()
        compiled = time.perf_counter()
        self.trace_seconds = traced - began
        self.compile_seconds = compiled - traced
        self._lowered_stats = program_stats.lowered_stats(self.lowered)
        self._compiled_stats = program_stats.compiled_stats(self.compiled)
        init, _ = self.parts.jit_init(self.mesh)
        compiled_init = init.lower().compile()
        if on_compiled:
            on_compiled()
        self._state = compiled_init()
        self._batch = random_batch(self.parts, self.mesh)

    def run(self, batch: Batch | None = None) -> dict[str, jax.Array]:
        """Start one step.

        Args:
          batch: the images; None: random ones.

        Returns:
          The metrics of the step, which may not be computed yet.
        """
        if batch is None:
            batch = self._batch
        with jax.transfer_guard("disallow"):
            self._state, metrics = self.compiled(self._state, batch)
        return metrics

    def timed(self) -> float:
        """Run one step on random images; its time in seconds, from start to end."""
        began = time.perf_counter()
        metrics = self.run()
        jax.block_until_ready((metrics, self._state))
        return time.perf_counter() - began

    def timed_in_a_row(
        self,
        steps: int,
        next_batch: Callable[[], Batch | None] = _no_batch,
        skip: int = 1,
    ) -> list[float]:
        """Run steps as training does: one is in progress while the metrics of the one before come.

        Args:
          steps: number of steps to time.
          next_batch: returns the images of a step; None: random ones.
          skip: number of steps before the clock starts.

        Returns:
          Seconds from the metrics of one step to those of the next.
        """
        ends = []
        pending = None
        for _ in range(skip + steps):
            metrics = self.run(next_batch())
            if pending is not None:
                jax.device_get(pending)
                ends.append(time.perf_counter())
            pending = metrics
        jax.device_get(pending)
        ends.append(time.perf_counter())
        return [end - start for start, end in itertools.pairwise(ends[skip - 1 :])]

    def metrics(
        self, seconds: Sequence[float], matrix_seconds: Sequence[float | None]
    ) -> dict[str, Any]:
        """Summarize timed steps and the program, as plain values; see `measure`.

        Args:
          seconds: of each step.
          matrix_seconds: of the matrix products in between, see `time_matrix_product`.
        """
        device_kind = jax.devices()[0].device_kind
        devices = jax.device_count()
        gigaflop = flops.count_method(self.parts.method).total / 1e9
        rate = self.config.batch_size / statistics.median(seconds)
        peak, source = peak_flops(device_kind, devices, matrix_seconds)
        peak_teraflops = None
        mfu = None
        if peak is not None:
            peak_teraflops = peak / 1e12
            mfu = gigaflop * 1e9 * rate / peak
        memory_stats = jax.local_devices()[0].memory_stats() or {}
        return {
            "device": device_kind,
            "devices": devices,
            "batch_size": self.config.batch_size,
            "images_per_second": rate,
            "seconds_per_step": spread(seconds),
            "gflop_per_image": gigaflop,
            "masks_per_image": flops.masks_per_image(self.parts.method),
            "teraflops": gigaflop * rate / 1e3,
            "peak_teraflops": peak_teraflops,
            "peak_from": source,
            "mfu": mfu,
            "trace_seconds": self.trace_seconds,
            "compile_seconds": self.compile_seconds,
            "peak_memory": memory_stats.get("peak_bytes_in_use"),
            "lowered_stats": self._lowered_stats,
            "compiled_stats": self._compiled_stats,
        }


def random_batch(parts: TrainingParts, mesh: Mesh) -> dict[str, jax.Array]:
    """A batch like the loader's, of noise that fills the canvas, without labels."""
    _, rows = loader.process_rows(parts.config.batch_size)
    fill_values = {"size": parts.config.data.canvas, "label": NO_LABEL}
    generator = np.random.default_rng(0)
    batch = {}
    for name, array in parts.abstract_batch(rows).items():
        if name == "image":
            batch[name] = generator.integers(0, 256, array.shape, np.uint8)
        else:
            batch[name] = np.full(array.shape, fill_values[name], array.dtype)
    return sharding.to_global(batch, mesh)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, minimum, maximum and quartiles, and the number of values as "steps"."""
    lower_quartile = upper_quartile = values[0]
    if len(values) > 1:
        lower_quartile, _, upper_quartile = statistics.quantiles(values, method="inclusive")
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "lower_quartile": lower_quartile,
        "upper_quartile": upper_quartile,
        "steps": len(values),
    }


def time_matrix_product() -> float | None:
    """Seconds of a large float32 matrix product on a CPU, the better of two; None elsewhere."""
    if jax.default_backend() != "cpu":
        return None
    matrix = jax.block_until_ready(jnp.ones((MATRIX_SIDE, MATRIX_SIDE)))
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        jax.block_until_ready(matrix @ matrix)
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def peak_flops(
    device_kind: str, devices: int, matrix_seconds: Sequence[float | None]
) -> tuple[float | None, str]:
    """Peak FLOP/s of some devices.

    For a CPU, it is what matrix products reach between the steps: their median, as the speed of a
    shared machine can double within a minute.

    Args:
      device_kind: jax's name of the devices.
      devices: number of devices.
      matrix_seconds: see `time_matrix_product`; only used for a CPU.

    Returns:
      (FLOP/s, or None for a device that is not in the table; where the number is from).
    """
    if jax.default_backend() == "cpu":
        measured = [seconds for seconds in matrix_seconds if seconds is not None]
        peak = 2 * MATRIX_SIDE**3 / statistics.median(measured)
        side = f"{MATRIX_SIDE} x {MATRIX_SIDE}"
        return peak, f"float32 matrix products of {side} between the steps"
    chip = accelerators.find_chip(device_kind)
    if chip is None:
        return None, f"{device_kind} is not in accelerators.py"
    return chip.flops * devices, "dense bfloat16, accelerators.py"


def measure(config: ConfigDict, steps: int = 20, warmup: int = 3) -> dict[str, Any]:
    """Time the train step of a recipe.

    Args:
      config: the recipe; its data are not read.
      steps: number of steps to time: on a CPU one by one, else in a row, as in training.
      warmup: number of steps to run before.

    Returns:
      A dict of plain values: images_per_second (median step); seconds_per_step (see `spread`);
      gflop_per_image (see flops.py), of masks_per_image masks; teraflops reached, peak_teraflops,
      and their ratio mfu; trace_seconds, compile_seconds; peak_memory in bytes, where the device
      reports it; lowered_stats and compiled_stats (see program_stats.py).

    Raises:
      UserError: the batch cannot be split over the devices, or the config has an invalid value.
    """
    _, metrics = measure_with_step(config, steps, warmup)
    return metrics


def measure_with_step(
    config: ConfigDict,
    steps: int = 20,
    warmup: int = 3,
    on_compiled: Callable[[], None] | None = None,
) -> tuple[BenchmarkStep, dict[str, Any]]:
    """Time the train step of a recipe; the step, and what `measure` returns."""
    step = BenchmarkStep(config, on_compiled=on_compiled)
    for _ in range(warmup):
        step.timed()
        time_matrix_product()
    if jax.default_backend() != "cpu":
        return step, step.metrics(step.timed_in_a_row(steps), [])
    seconds = []
    matrix_seconds = []
    for _ in range(steps):
        seconds.append(step.timed())
        matrix_seconds.append(time_matrix_product())
    return step, step.metrics(seconds, matrix_seconds)


def compare(
    first: ConfigDict, second: ConfigDict, steps: int = 20, warmup: int = 3
) -> dict[str, Any]:
    """Time two recipes in turn, step by step.

    Returns:
      {"first", "second": see `measure`, "ratio": images per second of the second recipe over those
      of the first (see `spread`, over pairs of consecutive steps)}.
    """
    first_step = BenchmarkStep(first)
    second_step = BenchmarkStep(second)
    for _ in range(warmup):
        first_step.timed()
        second_step.timed()
    first_seconds = []
    second_seconds = []
    matrix_seconds = []
    ratios = []
    for _ in range(steps):
        first_seconds.append(first_step.timed())
        second_seconds.append(second_step.timed())
        matrix_seconds.append(time_matrix_product())
        first_rate = first.batch_size / first_seconds[-1]
        second_rate = second.batch_size / second_seconds[-1]
        ratios.append(second_rate / first_rate)
    return {
        "first": first_step.metrics(first_seconds, matrix_seconds),
        "second": second_step.metrics(second_seconds, matrix_seconds),
        "ratio": spread(ratios),
    }


def table(measured: dict[str, Any]) -> list[str]:
    """The result of `measure` or `compare` as lines of text."""
    if "ratio" not in measured:
        return _metrics_table(measured)
    lines = []
    for name in ("first", "second"):
        lines += ["", f"{name}:"] + _metrics_table(measured[name])
    ratio = measured["ratio"]
    quartiles = f"{ratio['lower_quartile']:.3f} .. {ratio['upper_quartile']:.3f}"
    lines.append("")
    lines.append(
        f"ratio         {ratio['median']:.3f} times as many images/s "
        f"(quartiles {quartiles}, {ratio['steps']} pairs of steps)"
    )
    return lines


def _metrics_table(measured: dict[str, Any]) -> list[str]:
    """The metrics of one recipe as lines of text."""
    seconds = measured["seconds_per_step"]
    quartiles = f"{seconds['lower_quartile']:.4g} .. {seconds['upper_quartile']:.4g}"
    extremes = f"{seconds['min']:.4g} .. {seconds['max']:.4g}"
    return [
        f"device        {measured['devices']} x {measured['device']}, "
        f"batch {measured['batch_size']}",
        f"step          {measured['images_per_second']:.4g} images/s, {seconds['median']:.4g} s "
        f"(quartiles {quartiles}, range {extremes}, {seconds['steps']} steps)",
        f"utilization   {measured['gflop_per_image']:.4g} GFLOP per image"
        f"{flops.share_of_masks(measured['gflop_per_image'], measured['masks_per_image'])}, "
        f"{measured['teraflops']:.4g} TFLOP/s: {_utilization(measured)}",
        f"compilation   {measured['compile_seconds']:.1f} s, "
        f"after {measured['trace_seconds']:.1f} s of tracing",
        f"memory        {_memory(measured)}",
        f"program       {_program(measured)}",
    ]


def _utilization(measured: dict[str, Any]) -> str:
    share = "peak unknown"
    if measured["mfu"]:
        share = f"{measured['mfu']:.1%} of {measured['peak_teraflops']:.4g}"
    return f"{share} ({measured['peak_from']})"


def _memory(measured: dict[str, Any]) -> str:
    sizes = measured["compiled_stats"]["memory"]
    text = ", ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in sizes.items())
    if measured["peak_memory"]:
        text += f"; peak use {measured['peak_memory'] / 1e6:,.1f} MB"
    return text


def _program(measured: dict[str, Any]) -> str:
    lowered = measured["lowered_stats"]
    compiled = measured["compiled_stats"]
    float32_products = sum(lowered["float32_products"].values())
    host_transfers = compiled["host_transfers"] + lowered["host_transfers"]
    return (
        f"{lowered['products']} matrix products, {float32_products} of them float32; "
        f"{compiled['fusions']} fusions, {compiled['copies']} copies, "
        f"{host_transfers} host transfers, {compiled['collectives']} collectives of "
        f"{compiled['collective_bytes'] / 1e6:.3f} MB"
    )
