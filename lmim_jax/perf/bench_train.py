"""The whole training loop beside its step alone: what the input pipeline and the host cost. And the command of both."""

import functools
import itertools
import json
import logging
import statistics
import tempfile
import time

import jax
from absl import flags
from ml_collections import config_flags

from lmim_jax.data import loader, sources
from lmim_jax.data.augment.host import make_host_crop
from lmim_jax.perf import bench_step
from lmim_jax.perf import profile as bench_profile
from lmim_jax.train import workdir
from lmim_jax.utils.errors import UserError
from lmim_jax.utils.logging import log_to_console
from lmim_jax.utils.prng import augment_keys

log = logging.getLogger("lmim_jax.cli.bench")

# Batches that the loader may have ready when a round begins, on the host and on the devices: they were made while the
# other side ran, and are used up before the clock starts. See `loader.training`.
READY = 12


def measure_loop(config, steps=20, rounds=3, warmup=3):
    """Train on the recipe's own images, and on one batch that is there already, in turn, with the same program.

    The loop is that of train.py, without evaluation, checkpoints and files: batches from the loader, one step under
    way while the metrics of the one before are fetched. Both sides run in it.

    Args:
      config: a recipe, with its data. steps: of each side, in each round.

    Returns:
      (bench_step.Step, figures): those of `bench_step.measure` for the step alone, and "train": {"images_per_second",
      "seconds_per_step" with real images, "ratio" of the mean rates, whole loop over step alone}.

    Raises:
      UserError: no images, too few, or a batch that cannot be split over the devices.
    """
    source = sources.from_config(config.data, "train")
    per_epoch = loader.steps_per_epoch(source, config.batch_size)
    step = bench_step.Step(config, per_epoch)
    crop = make_host_crop(
        config.data, step.recipe.augmentation, functools.partial(augment_keys, config.seed)
    )
    batches = loader.training_batches(
        source,
        config.data,
        seed=config.seed,
        batch_size=config.batch_size,
        steps=rounds * (READY + steps),
        start=0,
        mesh=step.mesh,
        crop=crop,
    )
    for _ in range(warmup):
        step.timed()
    alone, whole, products = [], [], []
    for _ in range(rounds):
        products += [bench_step.matrix_seconds() for _ in range(3)]
        alone += _loop(step, lambda: None, 1, steps)
        whole += _loop(step, lambda: next(batches), READY, steps)
    mean = statistics.fmean(whole)
    train = {
        "images_per_second": config.batch_size / mean,
        "seconds_per_step": bench_step.spread(whole),
    }
    return step, step.figures(alone, products) | {
        "train": train | {"ratio": statistics.fmean(alone) / mean}
    }


def _loop(step, read, before, steps):
    """Seconds of each of `steps` steps, after `before` others: from the metrics of one to those of the next."""
    ended, pending = [], None
    for _ in range(before + steps):
        numbers = step.run(read())
        if pending:
            jax.device_get(pending)
            ended.append(time.perf_counter())
        pending = numbers
    jax.device_get(pending)
    ended = [*ended, time.perf_counter()][before - 1 :]
    return [after - begin for begin, after in itertools.pairwise(ended)]


def main():
    """--what=step and --what=train, as the flags say: JSON on stdout, the same for people on stderr."""
    flag = flags.FLAGS
    if flag.compare and (flag.what != "step" or flag.profile):
        raise UserError(
            "--compare is for --what=step without --profile: it times two recipes in turn"
        )
    with tempfile.TemporaryDirectory() as folder:
        workdir.pin_kernels(folder, flag.config.deterministic)  # as main.py does
        log_to_console()
        if flag.compare:
            found = bench_step.compare(flag.config, flag.compare, flag.steps)
        else:
            measure = bench_step.measured if flag.what == "step" else measure_loop
            step, found = measure(flag.config, flag.steps)
            if flag.profile:
                found["profile"] = bench_profile.record(step, flag.profile)
    if jax.process_index() == 0:
        print(json.dumps(found, indent=2))
    log.info("\n%s", "\n".join(table(found)))


def table(found):
    """Lines for people."""
    if "ratio" in found:
        ratio = found["ratio"]
        spread = f"{ratio['lower_quartile']:.3f} .. {ratio['upper_quartile']:.3f}, {ratio['steps']} pairs of steps"
        lines = [
            line for name in ("first", "second") for line in ["", f"{name}:", *table(found[name])]
        ]
        return [
            *lines,
            "",
            f"ratio         {ratio['median']:.3f} times as many images/s (quartiles {spread})",
        ]
    seconds, asked, made = found["seconds_per_step"], found["asked"], found["made"]
    low, high = seconds["lower_quartile"], seconds["upper_quartile"]
    share = (
        f"{found['mfu']:.1%} of {found['peak_teraflops']:.4g}" if found["mfu"] else "peak unknown"
    )
    memory = {name: f"{size / 1e6:,.1f} MB" for name, size in made["memory"].items()}
    float32 = sum(asked["float32_products"].values())
    lines = [
        f"device        {found['devices']} x {found['device']}, batch {found['batch_size']}",
        f"step          {found['images_per_second']:.4g} images/s, {seconds['median']:.4g} s (quartiles {low:.4g} .. "
        f"{high:.4g}, {seconds['min']:.4g} .. {seconds['max']:.4g} in all, {seconds['steps']} steps)",
        f"utilisation   {found['gflop_per_image']:.4g} GFLOP per image, {found['teraflops']:.4g} TFLOP/s: {share} "
        f"({found['peak_from']})",
        f"compilation   {found['compile_seconds']:.1f} s, after {found['trace_seconds']:.1f} s of tracing",
        "memory        "
        + ", ".join(f"{name} {size}" for name, size in memory.items())
        + (
            f"; at most in use {found['peak_memory'] / 1e6:,.1f} MB" if found["peak_memory"] else ""
        ),
        f"program       {asked['products']} matrix products, {float32} of them float32; {made['fusions']} fusions, "
        f"{made['copies']} copies, {made['host_transfers'] + asked['host_transfers']} host transfers, "
        f"{made['collectives']} collectives of {made['collective_bytes'] / 1e6:.3f} MB",
    ]
    if train := found.get("train"):
        lines += [
            f"whole loop    {train['images_per_second']:.4g} images/s, {train['ratio']:.3f} of the step alone"
        ]
    return lines + (["", *bench_profile.table(found["profile"])] if "profile" in found else [])


def define_flags():
    """Those of --what=step and --what=train."""
    config_flags.DEFINE_config_file(
        "compare",
        None,
        "step: a second recipe, run in turn with --config.",
        lock_config=True,
    )
    flags.DEFINE_integer(
        "steps", 20, "step, train: steps to time (train: in each of 3 rounds).", lower_bound=2
    )
    flags.DEFINE_string(
        "profile", None, "step, train: folder for a trace of the step; tells its slowest parts."
    )
