"""Pretrains an encoder on a folder of images or with a recipe, or resumes a run.

    lmim train DIR
    lmim train DIR --hours=2
    lmim train --config=vit_b --config.data.path=IMAGES --workdir=RUN
    lmim train --config=quickstart --config.batch_size=64 --config.epochs=20

DIR is any folder of images: the recipe `own` chooses all settings by the images and the machine,
prints them with the options that change them, and writes a page of results. Nothing is written
into DIR. Running the same command again resumes the run.

Exit codes: 2 for a mistake in flags or config, 1 if the run diverged, cannot save or cannot read
its images, 75 if it was interrupted (SIGTERM, SIGUSR1, SIGHUP, Ctrl-C) and has saved its state, 130
if a second Ctrl-C aborted that, or Ctrl-C the page of results.
"""

import logging
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from lmim_jax.cli import app
from lmim_jax.distributed import multihost, preemption
from lmim_jax.methods import base as methods
from lmim_jax.train import (
    build,
    checkpoints,
    extension,
    lock,
    loop,
    metric_logger,
    restarts,
    runs,
    workdir,
)
from lmim_jax.utils import atomic_io, buckets, commands, faults
from lmim_jax.utils.errors import EXIT_SECONDS, UserError, exit_now, fail
from lmim_jax.utils.logging import log_to_console

log = logging.getLogger("lmim_jax.cli.train")

RECIPES: dict[str, str | None] = {"config": "quickstart"}
RECIPES_OF_ARGUMENTS: dict[str, str | None] = {"config": "own"}  # where DIR is given
ABORTED = 130  # exit code, as of a process that SIGINT ended
BANK = 2048  # training images that are searched for the neighbors of the page


def main(arguments: list[str]) -> None:
    """Train."""
    given = flags.FLAGS
    config = given.config
    folder = read_arguments(arguments)
    run(config, folder, given.schedule if given.extend else "")


def run(config: ConfigDict, folder: str, schedule: str = "") -> None:
    """Train in a folder, and exit as the errors and signals of a run ask for.

    Args:
      config: the recipe.
      folder: of the run.
      schedule: "continue" or "restart": extend the run, see train/extension.py.
    """
    given = flags.FLAGS
    app.keep_freed_memory()
    workdir.check_outside_images(folder, config.data)
    workdir.check_compilation_cache(os.environ)
    process = multihost.process_number(given.coordinator, given.process_id)
    restart = restarts.check(folder, os.environ, process)
    try:
        flags_of_xla = workdir.set_xla_flags(config, folder, given.coordinator, process)
        multihost.initialize(
            given.coordinator,
            given.num_processes,
            given.process_id,
            given.heartbeat,
            app.device_ids(),
        )
        log_to_console()
        if restart:
            log.warning(restart)
        for line in flags_of_xla:
            log.info(line)
        if "hours" in config and "config" in given:
            fill_in(config, folder)
        loop.train(config, folder, schedule)
        if config.report and jax.process_count() == 1:
            write_report(folder)
    except (metric_logger.NonFinite, checkpoints.SaveFailed) as error:
        fail(error, 1)
    except (lock.LockLost, lock.LockUnavailable) as error:
        fail(error, 1)
    except jax.errors.JaxRuntimeError as error:
        fail_with(config, error)
    except KeyboardInterrupt:
        log.error("aborted; what was not saved is lost")
        exit_now(ABORTED)
    except preemption.Preempted as error:
        fail(
            f"{error}; its state is saved, run the same command again to resume",
            preemption.EXIT_CODE,
            EXIT_SECONDS if jax.process_count() > 1 else 1.0,
        )


def fail_with(config: ConfigDict, error: jax.errors.JaxRuntimeError) -> None:
    """Exit with what XLA's error means, or raise it.

    Args:
      config: the recipe.
      error: while it ran.
    """
    if "RESOURCE_EXHAUSTED" in str(error):
        fail(out_of_memory(config, str(error)))
    if jax.process_count() == 1:
        raise error
    reason = str(error).splitlines()[0]
    fail(
        "an operation over all processes failed; was one lost? Run the same command again to "
        f"resume. {reason}",
        1,
    )


def out_of_memory(config: ConfigDict, reason: str) -> str:
    """What to change where the memory of the devices does not suffice.

    Args:
      config: the recipe.
      reason: XLA's message.
    """
    from lmim_jax.perf import choices  # slow to import

    tried = config.copy_and_resolve_references()
    advice = []
    for key, value in _memory_savers(config):
        now = config.mesh.fsdp if key == "mesh.fsdp" else config[key]
        tried.update_from_flattened_dict({key: value})
        advice.append(f"--config.{key}={value} (now {now}; {_estimate(tried)})")
    smaller = "a smaller --config.batch_size, --config.method.width or grid"
    listed = ", then ".join(advice) or smaller
    memory = f"{choices.device_memory() / 1e9:.1f} GB"
    first = reason.strip().splitlines()[0][:200]
    return (
        f"the batch does not fit into the memory of the devices, {memory} each "
        f"({_estimate(config)}): give {listed}; these are estimates of lmim plan --sweep, which "
        f"compiles with the same --config flags and --topology. {first}"
    )


def _memory_savers(config: ConfigDict) -> list[tuple[str, Any]]:
    """What saves memory, in the order in which to try it: (option, value)."""
    savers: list[tuple[str, Any]] = []
    rows = config.batch_size // jax.device_count()
    more = [parts for parts in range(2, rows + 1) if rows % parts == 0]
    larger = [parts for parts in more if parts > config.micro_batches]
    whole = methods.method_class(config.method.name).needs_whole_batch(config.method)
    if larger and not whole:
        savers.append(("micro_batches", larger[0]))
    if config.remat != "full":
        savers.append(("remat", "full"))
    if config.mesh.fsdp < jax.device_count():
        savers.append(("mesh.fsdp", jax.device_count()))
    return savers


def _estimate(config: ConfigDict) -> str:
    """What the planner estimates that a recipe needs on a device, for a message."""
    from lmim_jax.perf import choices  # slow to import

    try:
        needed = choices.needed_bytes(config, config.batch_size, jax.device_count())
    except Exception as error:  # the error that is reported must not be lost for this one
        return f"not estimated: {faults.first_line(error)}"
    return f"{needed / 1e9:.2g} GB needed"


def read_arguments(arguments: Sequence[str]) -> str:
    """The folder of the run; the folder of images and --hours are set in the config.

    Args:
      arguments: the positional ones: none, or the folder of images.

    Raises:
      UserError: an argument or a flag does not fit the others.
    """
    given = flags.FLAGS
    config = given.config
    overrides = config_flags.get_override_values(given["config"])
    if arguments:
        images = buckets.path(arguments[0]).absolute()
        in_bucket = isinstance(images, buckets.BucketPath)
        if len(arguments) > 1 or not (in_bucket or images.is_dir()):
            raise UserError(
                f"unknown argument {arguments[-1]!r}: not a folder of images, and flags look like "
                "--config.batch_size=256"
            )
        if overrides.get("data.path", str(images)) != str(images):
            raise UserError(f"{arguments[0]} and --config.data.path: give only one of them")
        config.data.path = str(images)
        if "data.source" not in overrides:
            config.data.source = "folder"
    if given.hours is not None:
        if "hours" not in config or given.hours <= 0:
            raise UserError(
                f"--hours={given.hours:g}: hours above 0, and for the recipe own (lmim train DIR); "
                "others have --config.epochs"
            )
        for other in ("epochs", "total_steps"):
            if other in overrides:
                raise UserError(f"--hours and --config.{other}: give only one of them")
        config.hours = given.hours
    name = pathlib.Path(config_flags.get_config_filename(given["config"])).stem
    if "hours" in config and config.data.path:
        name = pathlib.Path(config.data.path).expanduser().absolute().name or name
    return given.workdir or f"runs/{name}"


def fill_in(config: ConfigDict, folder: str) -> None:
    """Choose what is not given of the recipe own, or take it from the run, and print it.

    Args:
      config: of configs/own.py; it is changed in place.
      folder: of the run, which may exist.
    """
    from lmim_jax.perf import choices  # slow to import

    given = flags.FLAGS
    overrides = config_flags.get_override_values(given["config"])
    if buckets.path(folder, "config.json").exists():
        stored = runs.read_config(folder)
        if "hours" in stored:
            images = {key: config.data[key] for key in ("path", "source")}
            known = {key: value for key, value in stored.items() if key in config}
            with config.unlocked():
                config.update(runs.with_tuples(known))
                for key in build.DERIVED:
                    if key in config.method:
                        del config.method[key]
            if images["path"] and "data.path" not in overrides:  # DIR: the images may have moved
                config.data.update(images)
            config.update_from_flattened_dict(overrides)
            if given.hours is not None:
                config.hours = given.hours
            log.info("settings: those that were chosen for %s", folder)
        return
    chooser = choices.Chooser(config, overrides.keys())
    chooser.choose()
    log.info("Chosen for %s; the options below each line change it:", config.data.path)
    for line in choices.table(chooser.choices):
        log.info(line)


def write_report(folder: str) -> None:
    """Write the page of a run, unless it exists; what it lacks is logged."""
    from lmim_jax.cli import report  # slow to import

    page = buckets.path(folder, "report.html")
    if not page.exists():
        log.info("writing the page ...")
        try:
            atomic_io.write(page, report.report(runs.open_run(folder), BANK))
        except (UserError, OSError) as error:
            log.warning("no page: %s", error)
            return
        except KeyboardInterrupt:
            command = commands.line("report", f"--workdir={folder}")
            log.warning("no page, it was interrupted; the run is finished, and saved: %s", command)
            exit_now(ABORTED)
    log.info("A page to look at: %s", page)


def define_flags() -> None:
    """Define the flags of the command."""
    app.define_recipe(
        "config",
        "The recipe: a name or a file. "
        "Examples: --config=vit_b, --config=mine.py, --config.batch_size=256",
    )
    flags.DEFINE_string(
        "workdir",
        None,
        "The folder of the run, by default runs/NAME, of DIR or of the recipe. "
        "Example: --workdir=runs/vit_b",
    )
    flags.DEFINE_float(
        "hours",
        None,
        "With DIR: how long to train, by default 4 minutes on a CPU and an hour on others; more "
        "than 800 epochs are never chosen. Example: --hours=2",
    )
    flags.DEFINE_bool(
        "extend",
        False,
        "Extend a run to more epochs than it had, with --config.epochs. "
        "Example: --extend --config.epochs=200",
    )
    define_schedule()
    define_processes()


def define_schedule() -> None:
    """Define what an extension does to the schedules."""
    flags.DEFINE_enum(
        "schedule",
        extension.CONTINUE,
        extension.SCHEDULES,
        "Extending a run: continue (the cosine of the new length goes on from this step) or "
        "restart (warm-up and cosine again, over the added steps). Example: --schedule=restart",
    )


def define_processes() -> None:
    """Define the flags of a command that trains as several processes."""
    app.define_processes()
    flags.DEFINE_integer(
        "heartbeat",
        30,
        "Seconds of silence after which a process counts as lost. Example: --heartbeat=60",
    )
