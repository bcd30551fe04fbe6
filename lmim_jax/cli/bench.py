"""Benchmarks the train step, its program, the training loop, the input pipeline or checkpoints.

    lmim bench --what=step --config=vit_b [--profile=DIR]
    lmim bench --what=step --config=vit_b --compare=vit_b --compare.KEY=VALUE
    lmim bench --what=program --device=h100 --config=vit_b --config.batch_size=256
    lmim bench --what=train --config=vit_b --config.data.path=IMAGES
    lmim bench --what=input --config=vit_b --config.data.path=IMAGES
    lmim bench --what=checkpoint --config=vit_b [--folder=DIR]

step: the train step by itself, on random images: images/s, utilization, compile time, memory, and
properties of its program.
program: the train step compiled for a GPU or a TPU that need not be there (pip install
'.[plan-gpu]', pip install libtpu): kernels, memory traffic by part of the model, memory, products,
and, for GPUs, an estimate of its time. This takes minutes.
train: the whole training loop with its input pipeline, compared with the step by itself.
input: images per second that the host decodes, by stage and as a whole, compared with torchvision's
way (Pillow and numpy).
checkpoint: how long a save blocks training, how long it takes until it is complete, and a verified
restore; compared with Orbax's CheckpointManager.
"""

import json
import logging
import tempfile
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from lmim_jax.cli import app
from lmim_jax.perf import (
    bench_checkpoint,
    bench_input,
    bench_program,
    bench_step,
    bench_train,
    profile,
)
from lmim_jax.train import workdir
from lmim_jax.utils import buckets
from lmim_jax.utils.errors import UserError
from lmim_jax.utils.logging import log_to_console

log = logging.getLogger("lmim_jax.cli.bench")

RECIPES: dict[str, str | None] = {"config": "quickstart", "compare": None}
CHOICES = ("step", "program", "train", "input", "checkpoint")  # of --what


def main(arguments: list[str]) -> None:
    """Run the command: JSON on stdout, and a table."""
    if arguments:
        raise UserError(f"unknown argument {arguments[0]!r}; flags look like --what=step")
    given = flags.FLAGS
    for place in (given.folder, given.profile, given.program_text):
        if place:
            buckets.local_path(place)
    if given.what == "checkpoint":
        log_to_console()
        measured = bench_checkpoint.measure(given.config, given.folder, given.repeats)
        print(json.dumps(measured, indent=2))
        print(f"\n{bench_checkpoint.table(measured)}")
    elif given.what == "input":
        log_to_console()
        measured = bench_input.measure(given.config, given.images, given.repeats)
        print(json.dumps(measured, indent=2))
        print(f"\n{bench_input.table(measured)}")
    elif given.what == "program":
        jax.config.update("jax_platforms", "cpu")
        log_to_console()
        measured = bench_program.measure(given.config, given.device, given.program_text)
        print(json.dumps(measured, indent=2))
        log.info("\n%s", "\n".join(bench_program.table(measured)))
    else:
        bench_devices(given)


def bench_devices(given: Any) -> None:
    """Benchmark the step or the training loop: JSON on stdout, a table in the log.

    Args:
      given: the values of the flags.

    Raises:
      UserError: flags that exclude each other, or a config that cannot be run on these devices.
    """
    if given.compare and (given.what != "step" or given.profile):
        raise UserError(
            "--compare is for --what=step without --profile: it times two recipes in turn"
        )
    with tempfile.TemporaryDirectory() as folder:
        app.keep_freed_memory()  # as training does
        flags_of_xla = workdir.set_xla_flags(given.config, folder)
        log_to_console()
        for line in flags_of_xla:
            log.info(line)
        if given.compare:
            measured = bench_step.compare(given.config, given.compare, given.steps)
            lines = bench_step.table(measured)
        else:
            measured, lines = _measure_one(given.what, given.config, given.steps, given.profile)
    if jax.process_index() == 0:
        print(json.dumps(measured, indent=2))
    log.info("\n%s", "\n".join(lines))


def _measure_one(
    what: str, config: ConfigDict, steps: int, profile_folder: str | None
) -> tuple[dict[str, Any], list[str]]:
    """Benchmark one recipe; the metrics, and the lines of a table."""
    if what == "train":
        step, measured = bench_train.measure_loop(config, steps)
        lines = bench_step.table(measured) + bench_train.table(measured)
    else:
        step, measured = bench_step.measure_with_step(config, steps)
        lines = bench_step.table(measured)
    if profile_folder:
        measured["profile"] = profile.record(step, profile_folder)
        lines.append("")
        lines += profile.table(measured["profile"])
    return measured, lines


def define_flags() -> None:
    """Define the flags of the command."""
    config_flags.DEFINE_config_file(
        "config",
        None,
        "Recipe: its name or a file. Examples: --config=vit_b, --config.batch_size=256.",
        lock_config=True,
    )
    flags.DEFINE_enum("what", None, CHOICES, "What to measure. Example: --what=step", required=True)
    config_flags.DEFINE_config_file(
        "compare",
        None,
        "step: a second recipe, run in turn with the first one. "
        "Example: --compare=vit_b --compare.remat=full",
        lock_config=True,
    )
    flags.DEFINE_enum(
        "device",
        "h100",
        bench_program.DEVICES,
        "program: the GPU or TPU to compile for. Example: --device=v5e",
    )
    flags.DEFINE_string(
        "program_text",
        "",
        "program: also write the compiled program, XLA's HLO, to this file. "
        "Example: --program_text=step.hlo",
    )
    flags.DEFINE_integer(
        "steps",
        20,
        "step, train: number of steps to time (train: in each of 3 rounds). Example: --steps=50",
        lower_bound=2,
    )
    flags.DEFINE_string(
        "profile",
        None,
        "step, train: folder for a profiler trace of the step; its slowest operations are printed. "
        "Example: --profile=/tmp/trace",
    )
    flags.DEFINE_integer(
        "images",
        1000,
        "input: number of images in each measurement. Example: --images=5000",
    )
    flags.DEFINE_integer(
        "repeats",
        3,
        "checkpoint, input: number of repetitions; medians are reported. Example: --repeats=5",
    )
    flags.DEFINE_string(
        "folder",
        None,
        "checkpoint: where to write; the system's temporary folder if not given. "
        "Example: --folder=/mnt/disk",
    )
