"""Speed of the training loop with its input pipeline, compared with the train step by itself."""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from lmim_jax.data import loader, sources
from lmim_jax.data.augment.host import make_host_crop
from lmim_jax.perf.bench_step import Batch, BenchmarkStep, spread, time_matrix_product
from lmim_jax.utils.prng import augment_keys

# Batches that the loader may have prepared when a round begins, on the host and on the devices:
# they were made while the other side ran, and are used up before the clock starts. See
# `loader.training_batches`.
PREFETCHED = 12
MATRIX_PRODUCTS = 3  # timed in each round


def measure_loop(
    config: ConfigDict,
    steps: int = 20,
    rounds: int = 3,
    warmup: int = 3,
    on_compiled: Callable[[], None] | None = None,
) -> tuple[BenchmarkStep, dict[str, Any]]:
    """Train on the recipe's own images and on one random batch, in turn, with the same program.

    The loop is that of training without evaluation, checkpoints and files: batches from the loader,
    and one step in progress while the metrics of the one before are fetched. Both sides run in it.

    Args:
      config: the recipe, with its data.
      steps: number of steps of each side in each round.
      rounds: number of rounds.
      warmup: number of steps to run before.
      on_compiled: see `BenchmarkStep`.

    Returns:
      The step, and the metrics: those of `bench_step.measure` for the step by itself, and "train":
      {"images_per_second", "seconds_per_step" with real images, "ratio" of the mean rates, whole
      loop over step, "input_images_per_second" of the input without training}.

    Raises:
      UserError: there are no images or too few, or the batch cannot be split over the devices.
    """
    source = sources.from_config(config.data, "train")
    assert source is not None, "every dataset has a training split"
    steps_per_epoch = loader.steps_per_epoch(source, config.batch_size)
    step = BenchmarkStep(config, steps_per_epoch, on_compiled)
    batches = loader.training_batches(
        source,
        config.data,
        seed=config.seed,
        batch_size=config.batch_size,
        steps=(rounds + 1) * (PREFETCHED + steps),
        start=0,
        mesh=step.mesh,
        crop=make_host_crop(
            config.data, step.parts.augmentation, functools.partial(augment_keys, config.seed)
        ),
    )
    next_batch = functools.partial(next, batches)
    for _ in range(warmup):
        step.timed()
    step_seconds: list[float] = []
    loop_seconds: list[float] = []
    matrix_seconds: list[float | None] = []
    for _ in range(rounds):
        for _ in range(MATRIX_PRODUCTS):
            matrix_seconds.append(time_matrix_product())
        step_seconds += step.timed_in_a_row(steps)
        loop_seconds += step.timed_in_a_row(steps, next_batch, skip=PREFETCHED)
    input_seconds = _time_batches(next_batch, steps)
    mean_loop_seconds = statistics.fmean(loop_seconds)
    measured = step.metrics(step_seconds, matrix_seconds)
    measured["train"] = {
        "images_per_second": config.batch_size / mean_loop_seconds,
        "seconds_per_step": spread(loop_seconds),
        "ratio": statistics.fmean(step_seconds) / mean_loop_seconds,
        "input_images_per_second": config.batch_size / input_seconds,
    }
    return step, measured


def _time_batches(next_batch: Callable[[], Batch], steps: int) -> float:
    """Mean seconds of a batch until it is on the devices, which do nothing else."""
    for _ in range(PREFETCHED):
        jax.block_until_ready(next_batch())
    began = time.perf_counter()
    for _ in range(steps):
        jax.block_until_ready(next_batch())
    return (time.perf_counter() - began) / steps


def table(measured: dict[str, Any]) -> list[str]:
    """What `measure_loop` adds to the metrics of the step, as lines of text."""
    train = measured["train"]
    return [
        f"whole loop    {train['images_per_second']:.4g} images/s, "
        f"{train['ratio']:.3f} of the step by itself",
        f"input         {train['input_images_per_second']:.4g} images/s by itself",
    ]
