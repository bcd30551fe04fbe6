"""Runs that go on for longer than they were to: what the schedules of an extended run span.

Each extension is an entry of `config.extensions`, kept in the run: the step it was made at, what it
did to the schedules, and the length before it. An extended run resumes like any other.

  continue   the schedules are those of a run that had the new length from the start: the cosine
             goes on towards the new end, from the value that it has there at this step
  restart    all schedules begin again at this step, warm-up included, and take the added steps
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from lmim_jax.train import checkpoint_manifest
from lmim_jax.utils import atomic_io, buckets
from lmim_jax.utils.errors import UserError

CONTINUE = "continue"
RESTART = "restart"
SCHEDULES = (CONTINUE, RESTART)
KEYS = ("epochs", "total_steps", "extensions")  # of the config, which an extension changes
PAGE = "report.html"  # of the shorter run


class Extension(NamedTuple):
    """One extension of a run, as stored.

    Attributes:
      step: the newest saved step, when it was made.
      schedule: "continue" or "restart".
      steps: length of the run before, in optimizer steps.
      epochs: `config.epochs` before.
    """

    step: int
    schedule: str
    steps: int
    epochs: float


@dataclasses.dataclass(frozen=True)
class Span:
    """What the schedules of a run span, in optimizer steps.

    Attributes:
      start: the step at which they begin.
      steps: from there to their end.
      warmup_steps: from there to the peak of the learning rate.
      steps_per_epoch: of an epoch, as schedules count them: with `config.total_steps`, all that is
        given in epochs scales with the run.
    """

    start: int
    steps: int
    warmup_steps: float
    steps_per_epoch: float


def schedule_start(config: ConfigDict) -> int:
    """The step at which the schedules of a run begin: that of its last restart, or 0."""
    restarts = [entry[0] for entry in config.extensions if entry[1] == RESTART]
    return restarts[-1] if restarts else 0


def span(config: ConfigDict, total_steps: int) -> Span:
    """What the schedules of a run span.

    Args:
      config: the recipe, with the extensions of the run.
      total_steps: length of the run.

    Raises:
      UserError: the warm-up is longer than the run.
    """
    entries = [Extension(*entry) for entry in config.extensions]
    lengths = [entry.steps for entry in entries] + [total_steps]
    epochs = entries[0].epochs if entries else config.epochs  # of the first length
    warmup_epochs = config.optimizer.warmup_epochs
    if warmup_epochs > epochs:
        raise UserError(
            f"config.optimizer.warmup_epochs={warmup_epochs:g} is longer than config.epochs="
            f"{epochs:g}: the learning rate would never reach its peak; give a shorter one, such "
            f"as --config.optimizer.warmup_epochs={epochs / 20:g}"
        )
    start = 0
    planned = lengths[0]  # when the schedules began
    for entry, length in zip(entries, lengths[1:], strict=True):
        if entry.schedule == RESTART:
            start = entry.step
            planned = length - start
    return Span(
        start=start,
        steps=total_steps - start,
        warmup_steps=warmup_epochs * planned / epochs,
        steps_per_epoch=lengths[0] / epochs,
    )


def read(workdir: buckets.Pathname) -> list[list[Any]]:
    """The extensions of a run, oldest first; none where there is no run."""
    path = buckets.path(workdir, "config.json")
    if not path.is_file():
        return []
    return json.loads(path.read_text()).get("extensions", [])


def with_history(config: ConfigDict, history: Sequence[Sequence[Any]]) -> ConfigDict:
    """A copy of a recipe with the extensions of its run.

    Options that follow the number of epochs are those of the run before it was extended.

    Args:
      config: the recipe, with its references.
      history: entries, see `Extension`.

    Raises:
      UserError: the recipe has others.
    """
    entries = tuple(tuple(entry) for entry in history)
    if config.extensions != entries[: len(config.extensions)]:
        raise UserError("config.extensions is not to be set: lmim extend RUN --epochs=N does it")
    if not entries:
        return config
    extended = _with_first(config, entries)
    extended.extensions = entries
    return extended


def _with_first(config: ConfigDict, history: Sequence[Sequence[Any]]) -> ConfigDict:
    """A copy whose options, apart from `epochs`, follow the epochs before the first extension."""
    epochs = config.epochs
    config.epochs = Extension(*history[0]).epochs
    resolved = config.copy_and_resolve_references()
    config.epochs = epochs
    resolved.epochs = epochs
    return resolved


def extend(
    config: ConfigDict, workdir: buckets.Pathname, schedule: str, steps_per_epoch: int
) -> list[Extension]:
    """The extensions of a run with one more, unless that was made already.

    Args:
      config: the recipe, with the new number of epochs or of total steps.
      workdir: of the run.
      schedule: "continue" or "restart".
      steps_per_epoch: optimizer steps in an epoch.

    Raises:
      UserError: there is no run, nothing is saved, or the run is not shorter.
    """
    stored = _stored(workdir)
    history = [Extension(*entry) for entry in stored.get("extensions", [])]
    key = "total_steps" if stored["total_steps"] else "epochs"
    if bool(config.total_steps) != bool(stored["total_steps"]):
        raise UserError(f"the length of {workdir} is that of config.{key}: extend it by that")
    before = stored["total_steps"] or stored["epochs"] * steps_per_epoch
    after = config.total_steps or config.epochs * steps_per_epoch
    if after == before and history and history[-1].schedule == schedule:
        return history
    if after <= before:
        raise UserError(
            f"{workdir} has {key}={stored[key]} already, and can only be extended to more"
        )
    saved = checkpoint_manifest.newest_committed_step(workdir)
    if saved is None:
        raise UserError(f"{workdir} has not saved a checkpoint: there is nothing to extend")
    return [*history, Extension(saved, schedule, before, stored["epochs"])]


def _stored(workdir: buckets.Pathname) -> dict[str, Any]:
    path = buckets.path(workdir, "config.json")
    if not path.is_file():
        raise UserError(f"{workdir} is not a run: there is nothing to extend")
    return json.loads(path.read_text())


def record(workdir: buckets.Pathname, config: dict[str, Any]) -> None:
    """Store the length and the extensions of a run, and remove the page of the shorter one.

    Args:
      workdir: of the run; its lock is held.
      config: of `extend`, as plain values.
    """
    path = buckets.path(workdir, "config.json")
    stored = json.loads(path.read_text())
    for key in KEYS:
        stored[key] = config[key]
    atomic_io.write(path, json.dumps(stored, indent=2) + "\n")
    buckets.path(workdir, PAGE).unlink(missing_ok=True)


def describe(config: ConfigDict, total_steps: int) -> str:
    """The last extension, as a line for the log."""
    entry = Extension(*config.extensions[-1])
    return (
        f"extended from {entry.steps:,} to {total_steps:,} steps; schedules {entry.schedule} at "
        f"step {entry.step:,}"
    )
