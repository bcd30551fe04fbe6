"""A training run, from its config to its summary."""

import functools
import json
import logging
import time
from typing import Any

import jax
from clu import parameter_overview
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lmim_jax.data import inventory, loader, pixel_range, prefetch, sources
from lmim_jax.data.eval.eval_data import EvaluationData, batch_bytes
from lmim_jax.distributed import multihost, preemption, sharding
from lmim_jax.evaluators import base as evaluators
from lmim_jax.evaluators.common import feature_cache, kept_classifier
from lmim_jax.evaluators.common.outcome import Outcome
from lmim_jax.models import attention
from lmim_jax.train import (
    checkpoint_manifest,
    extension,
    frozen_teacher,
    gpu_kernels,
    initialization,
    provenance,
    wandb_writer,
)
from lmim_jax.train import summary as summaries
from lmim_jax.train import workdir as workdirs
from lmim_jax.train.build import TrainingParts, build
from lmim_jax.train.checkpoint_manifest import newest_committed_step
from lmim_jax.train.checkpoints import Checkpoints, SaveFailed
from lmim_jax.train.collapse_metrics import make_collapse_metrics
from lmim_jax.train.lock import Lock, LockLost
from lmim_jax.train.metric_logger import MetricLogger, NonFinite
from lmim_jax.train.metric_writer import MetricWriter, read_metrics, write_picture
from lmim_jax.utils import atomic_io, buckets, descriptors, faults, progress
from lmim_jax.utils.errors import UserError, did_you_mean
from lmim_jax.utils.logging import duration, fill_lines

log = logging.getLogger(__name__)

Sources = dict[str, Any]  # {"train": source, "test": source or None}

FEATURES = "features_of_step"  # folder in that of the run, while a step is evaluated
RESULTS_TIMEOUT = (
    30.0  # seconds without an image, after which a user who stops a run has no results
)
EVALUATION_TIMEOUT = 600.0  # seconds that the other processes may take longer for an evaluation


def train(config: ConfigDict, workdir: buckets.Pathname, extend: str = "") -> dict[str, Any]:
    """Train; a run that was interrupted resumes.

    Args:
      config: see configs/vit_b.py.
      workdir: folder of this run's checkpoints, metrics and summary, local or gs://BUCKET/FOLDER;
        created if needed.
      extend: "continue" or "restart": extend the run to the length of `config`, with schedules as
        in extension.py. "": its length is that of `config`.

    Returns:
      The summary, which is also written to workdir/summary.json.

    Raises:
      UserError: a mistake in the config, the data or the folder.
      NonFinite: a loss or gradient was NaN or infinite.
      Preempted: a signal to stop was received, and the state is saved.
      SaveFailed: several checkpoints in a row could not be written.
      LockLost: another run has taken the folder over.
    """
    with preemption.PreemptionHandler() as handler:
        return _train(config, workdir, extend, handler)


def _train(
    config: ConfigDict,
    workdir: buckets.Pathname,
    extend: str,
    handler: preemption.PreemptionHandler,
) -> dict[str, Any]:
    """`train`, with a handler that listens already."""
    process_start = time.perf_counter()
    descriptors.raise_limit()
    config.data.source = sources.kind(config.data)
    workdirs.check_outside_images(workdir, config.data)
    multihost.decide(lambda: workdirs.check_bucket(workdir))
    mesh = _make_mesh(config)
    attention.check_fused(config.method)
    wandb_writer.check(config.wandb)
    splits, found = _open_sources(config)
    found += _resolve_range(config, workdir, splits["train"])
    unit = mesh.size * config.micro_batches
    per_epoch = loader.steps_per_epoch(splits["train"], config.batch_size, unit)
    history = multihost.decide(lambda: extension.read(workdir))
    config = extension.with_history(config, history)
    if extend:
        entries = multihost.decide(lambda: extension.extend(config, workdir, extend, per_epoch))
        config = extension.with_history(config, entries)
    extended = len(config.extensions) > len(history)
    parts = build(config, per_epoch)
    scheduled = _schedule_evaluators(parts, splits)
    workers = _num_workers(parts, scheduled)

    # The whole config has been checked: from here on, files are written
    config = parts.config
    plain_config = config.to_dict()
    identity = splits["train"].identity()
    multihost.check_consistent(config=plain_config, data=identity)
    allowed = extension.KEYS if extended else ()
    multihost.decide(lambda: workdirs.check(workdir, plain_config, identity, allowed))
    finished = multihost.decide(lambda: _read_finished(workdir, parts.total_steps))
    if finished:
        steps = parts.total_steps
        log.info("this run is finished: %d of %d steps, in %s", steps, steps, workdir)
        log.info(summaries.format_summary(finished, workdir))
        return finished
    initial = _initial_weights(parts, workdir)
    with (
        Lock(workdir) as lock,
        Checkpoints(workdir, config, lock) as checkpoints,
    ):
        if extended:
            multihost.decide(lambda: extension.record(workdir, plain_config))
            log.info(extension.describe(config, parts.total_steps))
        workdirs.claim(workdir, plain_config, identity)
        provenance.record_start(workdir, found)
        _remove_summary(workdir)
        loop = TrainingLoop(
            parts=parts,
            mesh=mesh,
            splits=splits,
            scheduled=scheduled,
            initial=initial,
            workdir=buckets.path(workdir),
            lock=lock,
            checkpoints=checkpoints,
            handler=handler,
            process_start=process_start,
        )
        del initial  # its memory
        config.data.workers = workers  # of this host alone, and no part of the recipe
        handler.begin()
        loop.run()
        summary = multihost.decide(
            lambda: _write_last_summary(workdir, parts.total_steps, loop.wall_seconds)
        )
    log.info("finished %d steps in %s", parts.total_steps, duration(summary["wall_seconds"]))
    log.info(summaries.format_summary(summary, workdir))
    return summary


def _read_finished(workdir: buckets.Pathname, total_steps: int) -> dict[str, Any] | None:
    """The summary of a finished run; None if there is more to do, or its last state is damaged."""
    summary = summaries.read_summary(workdir, total_steps)
    last = checkpoint_manifest.steps(workdir).get(total_steps)
    if summary is None or last is None:  # checkpoints of a finished run may have been deleted
        return summary
    status = checkpoint_manifest.verify(last)
    if status.state == "good":
        return summary
    log.warning("this run was finished, but its last checkpoint is %s", status)
    return None


def _make_mesh(config: ConfigDict) -> Mesh:
    """The mesh of the recipe over all devices of all processes."""
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    sharding.check_batch(config.batch_size, config.micro_batches, mesh.size)
    kind = jax.devices()[0].device_kind
    shape = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    log.info("%d %s device(s) as %s, %d process(es)", mesh.size, kind, shape, jax.process_count())
    return mesh


def _open_sources(config: ConfigDict) -> tuple[Sources, list[str]]:
    """The images of both splits, and what was found, which is logged."""
    listings: sources.Listings = {}
    splits = sources.open_splits(config.data, listings)
    found = inventory.describe_config(config.data, splits, listings, "--config.data")
    for line in found:
        log.info("%s", line)
    return splits, found


def _resolve_range(config: ConfigDict, workdir: buckets.Pathname, source: Any) -> list[str]:
    """Measure the range of the pixel values, or take that of the run; lines, which are logged."""

    def resolve() -> tuple[dict[str, str], list[str]]:
        return pixel_range.resolve_all(config.data, source, workdirs.stored_ranges(workdir))

    ranges, lines = multihost.decide(resolve)
    pixel_range.set_ranges(config.data, ranges)
    for line in lines:
        log.info("%s", line)
    return lines


def _initial_weights(
    parts: TrainingParts, workdir: buckets.Pathname
) -> initialization.InitialWeights | None:
    """Those of `config.init_from` and of a frozen teacher, unless the run has its own already."""
    folder = parts.config.init_from
    teacher = frozen_teacher.folder(parts.config.method)
    if not folder and not teacher:
        return None
    if multihost.decide(lambda: newest_committed_step(workdir)) is not None:
        return None
    found = initialization.InitialWeights({}, {}, {}, [])
    if folder:
        found = initialization.read(folder, parts.method)
    if teacher:
        found = found.joined(frozen_teacher.weights(teacher, parts.method))
    return found


def _schedule_evaluators(parts: TrainingParts, splits: Sources) -> list[evaluators.Scheduled]:
    """The evaluators of the run; those that have nothing to measure are logged."""
    scheduled = parts.schedule_evaluators()
    return evaluators.only_possible(scheduled, splits["train"].classes, splits)


def _num_workers(parts: TrainingParts, scheduled: list[evaluators.Scheduled]) -> int:
    """The number of decoding processes of this host, in training and evaluations.

    Raises:
      UserError: /dev/shm cannot hold the batches of so many.
    """
    config = parts.config
    _, rows = loader.process_rows(config.batch_size)
    largest = max([getattr(one.evaluator, "batch_size", 0) for one in scheduled], default=0)
    needed = (parts.batch_bytes(rows), batch_bytes(config.data, largest))
    workers = prefetch.num_workers(config.data, *needed)
    prefetch.check_shared_memory(needed[0], workers, needed[1])
    return workers


class TrainingLoop:
    """Trains from the newest checkpoint to the last step.

    At a boundary (the end of an evaluation or checkpoint interval) the same state is saved and
    evaluated.
    """

    def __init__(
        self,
        *,
        parts: TrainingParts,
        mesh: Mesh,
        splits: Sources,
        scheduled: list[evaluators.Scheduled],
        initial: initialization.InitialWeights | None,
        workdir: buckets.Path,
        lock: Lock,
        checkpoints: Checkpoints,
        handler: preemption.PreemptionHandler,
        process_start: float,
    ) -> None:
        """Create or restore the state, and open what the loop needs.

        Args:
          parts: of the recipe.
          mesh: all devices.
          splits: images of both splits.
          scheduled: evaluators.
          initial: weights to start from in place of random ones, unless there is a checkpoint.
          workdir: of the run, which must be claimed already.
          lock: of the run.
          checkpoints: of the run.
          handler: for signals.
          process_start: `time.perf_counter()` at the start of the process.
        """
        config = parts.config
        self._config = config
        self._parts = parts
        self._total_steps = parts.total_steps
        self._mesh = mesh
        self._train_source = splits["train"]
        self._scheduled = scheduled
        self._evaluated: dict[str, int] = {}  # title of an evaluator -> the last step
        self._workdir = workdir
        self._lock = lock
        self._checkpoints = checkpoints
        self._handler = handler
        self._saved_at = time.monotonic()  # when the last save began

        with progress.working("creating the weights"):
            self._state, shardings = parts.create_state(mesh)
        _log_parameter_counts(self._state.params)
        self._start = 0
        restored = checkpoints.restore(self._state, shardings)
        if restored:
            self._state = restored
            self._start = int(restored.step)
            log.info("resuming after step %d of %d", self._start, self._total_steps)
        elif initial:
            self._state = initial.put_into(self._state, shardings)
            initial.write(workdir)
            for line in initial.lines:
                log.info("%s", line)

        self._train_step = parts.jit_train_step(mesh, shardings)
        self._data = EvaluationData(
            splits,
            config.data,
            parts.augmentation,
            mesh,
            check=handler.check,
            wait_check=handler.check_alone,
            progress=progress.show_split,
        )
        self._collapse_metrics = make_collapse_metrics(
            parts.method, self._data, config.gauge_images
        )
        self._writer = MetricWriter(workdir, self._start, config.wandb)
        self._writer.write_config(config.to_dict())
        log.info("curves: %s", self._writer.board_command)
        self._logger = MetricLogger(
            self._writer,
            config,
            start=self._start,
            total_steps=self._total_steps,
            steps_per_epoch=parts.steps_per_epoch,
            learning_rate=parts.learning_rate,
            describe_checkpoints=checkpoints.describe,
            process_start=process_start,
        )

    @property
    def wall_seconds(self) -> float:
        """How long the run has taken so far, over all its restarts."""
        return self._logger.wall_seconds

    def run(self) -> None:
        """Train to the last step, save the final state, and close the files.

        Whatever ends the run early, the state is saved first, unless it is the state that is bad or
        cannot be saved.

        Raises:
          Preempted: a signal was received, and the state is saved.
          NonFinite: a loss or gradient was NaN or infinite.
          SaveFailed: several checkpoints in a row could not be written.
          LockLost: another run has taken the folder over.
          UserError: too many images are bad; or an evaluation failed, and is `strict`.
          DataLoaderTimeout: no image could be read for a long time.
        """
        try:
            self._train()
        except preemption.Interrupted:
            step = self._save_now()
            if self._handler.from_keyboard:
                self._show_results(step)
            message = f"stopped after step {step} of {self._total_steps}"
            raise preemption.Preempted(message) from None
        except (NonFinite, SaveFailed, LockLost, KeyboardInterrupt):
            raise
        except BaseException as error:
            self._rescue_state(error)
            raise
        self._checkpoints.wait(must_succeed=True)
        self._writer.close()

    def _train(self) -> None:
        """Train and evaluate to the last step.

        Raises:
          Interrupted: a signal was received.
        """
        if self._config.init_from and not self._start and not self._checkpoints.is_saved(0):
            self._save(0)  # from here on, the other run is not needed
        self._evaluate(self._start)
        for step, batch in enumerate(self._batches(), self._start + 1):
            if step == self._start + 1:
                self._compile(batch)
                self._logger.resume()
            self._run_step(step, batch)
            self._lock.raise_if_lost()
            self._handler.check()
            if self._save_due(step):
                self._logger.pause()  # raises NonFinite unless this state is finite
                self._save(step)
                self._evaluate(step)
                self._logger.resume()

    def _batches(self) -> Any:
        """An iterator over the remaining batches."""
        config = self._config
        return loader.training_batches(
            self._train_source,
            config.data,
            seed=config.seed,
            batch_size=config.batch_size,
            steps=self._total_steps,
            start=self._start,
            mesh=self._mesh,
            crop=self._parts.host_crop,
            check=self._handler.check_alone,
        )

    def _compile(self, batch: dict[str, jax.Array]) -> None:
        """Compile what the steps run; the clock of the run starts afterwards."""
        log.info("compiling the train step ...")
        start = time.perf_counter()
        with progress.working("compiling"):
            self._collapse_metrics.compile(self._state.params, self._state.target)
            lowered = self._train_step.lower(self._state, batch)
            _, metrics = lowered.out_info
            self._check_best(self._writer.names | metrics.keys() | self._collapse_metrics.names)
            self._train_step = lowered.compile()
        gpu_kernels.publish(self._workdir)
        log.info("compiled in %s", duration(time.perf_counter() - start))

    def _check_best(self, known: set[str]) -> None:
        """Raise a UserError if `config.checkpoint_best` is none of the metrics of this run.

        Args:
          known: the metrics of a step, and of the evaluations so far.
        """
        metric = self._config.checkpoint_best
        title, slash, _ = metric.partition("/")
        if not metric or metric in known:
            return
        alike = sorted(name for name in known if name.startswith(f"{title}/"))
        if not slash:
            alike = sorted(name for name in known if "/" not in name)
        elif title in {one.title for one in self._scheduled} and not alike:
            return  # not measured yet
        listed = ", ".join(alike) or f"none of {title}, which has nothing to measure here"
        raise UserError(
            f"config.checkpoint_best={metric!r} is no metric of this run; it has {listed}"
            f"{did_you_mean(metric, alike) if alike else ''}"
        )

    def _run_step(self, step: int, batch: dict[str, jax.Array]) -> None:
        """Dispatch a step; the metrics of the previous one are fetched meanwhile."""
        with jax.transfer_guard("disallow"):
            self._state, metrics = self._train_step(self._state, batch)
            if self._log_due(step):
                metrics |= self._collapse_metrics(self._state.params, self._state.target)
        self._logger.add(step, metrics)

    def _log_due(self, step: int) -> bool:
        return step % self._config.log_every == 0 or step == self._total_steps

    def _save_due(self, step: int) -> bool:
        if step == self._total_steps or step % self._config.checkpoint_every == 0:
            return True
        if self._evaluation_due(step):  # which may fail in ways that end the process
            return True
        if self._log_due(step) and self._checkpoints.failing:
            return True
        return self._minutes_have_passed(step)

    def _minutes_have_passed(self, step: int) -> bool:
        """Whether the last save was `checkpoint_minutes` ago.

        Process 0 decides it for all of them, which takes time, and so not after every step.
        """
        limit = 60 * self._config.checkpoint_minutes
        if not limit or (jax.process_count() > 1 and not self._log_due(step)):
            return False
        return multihost.decide(lambda: time.monotonic() - self._saved_at > limit)

    def _evaluation_due(self, step: int) -> bool:
        return any(evaluator.due(step, self._total_steps) for evaluator in self._scheduled)

    def _save(self, step: int) -> None:
        """Start to save the state after a step."""
        self._writer.flush()  # a resumed run goes on after the saved lines
        gpu_kernels.publish(self._workdir)  # of evaluations too
        self._checkpoints.save(self._state, step)
        self._saved_at = time.monotonic()

    def _save_now(self) -> int:
        """Save the state unless it is saved, and wait for it; returns its step.

        Raises:
          NonFinite: the state is not finite.
          SaveFailed: it could not be saved.
        """
        step = int(jax.device_get(self._state.step))
        self._logger.flush()
        if not self._checkpoints.is_saved(step):
            self._save(step)
        self._checkpoints.wait(must_succeed=True)
        return step

    def _show_results(self, step: int) -> None:
        """Show what there is of a run that its user has stopped; its state is saved.

        Another signal leaves out what is not done yet. Errors are only logged. A run that has come
        to its last step without all of its evaluations gets no summary file: it is not finished.
        """
        self._handler.ignore_signals()
        if not step:
            return
        data = self._data.config
        data.timeout = min(data.timeout, RESULTS_TIMEOUT)
        log.info("the state of step %d is saved; evaluating it, Ctrl-C leaves that out", step)
        try:
            self._logger.log_rest()
            for evaluator in self._scheduled:
                if self._evaluated.get(evaluator.title) != step:
                    self._run_evaluator(evaluator, step)
        except KeyboardInterrupt:
            log.info("the evaluation is left out")
        except Exception as error:  # if it is strict
            log.error("the evaluation failed: %s", faults.first_line(error))
        try:
            self._writer.flush()
            summary = _summarize(self._workdir, step, self._total_steps, self.wall_seconds)
            missing = [
                one.title for one in self._scheduled if self._evaluated.get(one.title) != step
            ]
            if step < self._total_steps or not missing:
                _write_summary(self._workdir, summary)
            log.info(summaries.format_summary(summary, self._workdir))
        except Exception as error:
            log.error("there is no summary: %s", faults.first_line(error))

    def _rescue_state(self, error: BaseException) -> None:
        """Save the state, if that is possible, before an error ends the run; it raises nothing."""
        reason = faults.first_line(error)
        try:
            if jax.process_count() > 1:
                log.error("stopping (%s); only all processes together could save first", reason)
                return
            if any(leaf.is_deleted() for leaf in jax.tree.leaves(self._state)):
                log.error("stopping (%s) in the middle of a step, whose state is lost", reason)
                return
            log.error("stopping: %s; saving the state first", reason)
            log.error("the state of step %d is saved", self._save_now())
        except Exception as failure:
            log.error("the state could not be saved: %s", faults.first_line(failure))

    def _evaluate(self, step: int) -> None:
        """Run the evaluators that are due, except those that ran before a restart at this step.

        Raises:
          Interrupted: a signal was received.
        """
        due = []
        for evaluator in self._scheduled:
            measured = step == self._start and self._writer.has_evaluation(evaluator.title)
            if evaluator.due(step, self._total_steps) and not measured:
                due.append(evaluator)
        with feature_cache.compute_once(self._data, due, self._workdir / FEATURES):
            for evaluator in due:
                self._run_evaluator(evaluator, step)
                self._handler.check()

    def _keep(self, evaluator: evaluators.Scheduled, outcome: Outcome) -> None:
        """Write what an evaluator learned from the last step into the run."""
        if jax.process_index() != 0:
            return
        origin = {
            "run": str(self._workdir),
            "step": self._total_steps,
            "checkpoint": "",  # it is written at the same time
            "weights": evaluator.weights,
            "modalities": [],  # all of them
        }
        folder = self._workdir / "evaluations" / evaluator.title
        test = self._data.sources["test"]
        try:
            kept_classifier.write(folder, outcome, test, self._config.to_dict(), origin)
        except OSError as error:  # such as a full disk; the metrics are worth more
            log.error("what %s has learned is not kept: %s", evaluator.title, error)

    def _run_evaluator(self, evaluator: evaluators.Scheduled, step: int) -> None:
        """Run an evaluator; one that fails is skipped on all processes, unless it is `strict`."""
        start = time.perf_counter()
        metrics: dict[str, float] = {}
        pictures: dict[str, evaluators.Picture | str] = {}
        failure = ""
        self._data.keep = None
        if step == self._total_steps:
            self._data.keep = functools.partial(self._keep, evaluator)
        try:
            with progress.working(evaluator.title):
                evaluator = evaluator.without_known_baselines(self._writer.names)
                metrics, pictures = evaluator.run(self._parts.method, self._state, self._data)
        except preemption.Interrupted:
            raise
        except Exception as error:  # such as missing masks, or no memory
            if self._config.evaluators[evaluators.STRICT]:
                raise
            failure = faults.first_line(error)
            trace = None if isinstance(error, UserError) else error
            log.error("the evaluation %s failed:", evaluator.title, exc_info=trace)
        failures = multihost.exchange(failure, EVALUATION_TIMEOUT)
        self._evaluated[evaluator.title] = step
        if any(failures):
            failure = next(filter(None, failures))
            log.error(
                "step %d  %s IS SKIPPED, AND TRAINING GOES ON: %s (config.evaluators.strict=True "
                "would stop the run)",
                step,
                evaluator.title,
                failure,
            )
            self._writer.write_failure(step, evaluator.title, failure)
            return
        self._writer.write(step, metrics)
        self._writer.write_pictures(step, pictures)
        parts = [f"{name} {value:.4g}" for name, value in metrics.items()]
        parts = parts or [evaluator.title]
        parts.append(f"({duration(time.perf_counter() - start)})")
        for line in fill_lines(parts, f"step {step}"):
            log.info("%s", line)


def _log_parameter_counts(params: dict[str, Any]) -> None:
    counts = []
    for name, tree in params.items():
        counts.append(f"{name} {parameter_overview.count_parameters(tree):,}")
    log.info("parameters: %s", ", ".join(counts))


def _summarize(
    workdir: buckets.Pathname, steps: int, total_steps: int, wall_seconds: float
) -> dict[str, Any]:
    """The summary of the run, whose curves are drawn."""
    lines = read_metrics(workdir)
    write_picture(workdir, "curves", summaries.draw_curves(lines, workdir))
    return summaries.summarize(lines, steps=steps, total_steps=total_steps, seconds=wall_seconds)


def _remove_summary(workdir: buckets.Pathname) -> None:
    """Remove the summary of a run that goes on: it was stopped, or its end was damaged."""
    if jax.process_index() == 0:
        buckets.path(workdir, "summary.json").unlink(missing_ok=True)


def _write_last_summary(
    workdir: buckets.Pathname, total_steps: int, wall_seconds: float
) -> dict[str, Any]:
    """Summarize a run that has finished."""
    summary = _summarize(workdir, total_steps, total_steps, wall_seconds)
    _write_summary(workdir, summary)
    return summary


def _write_summary(workdir: buckets.Pathname, summary: dict[str, Any]) -> None:
    path = buckets.path(workdir, "summary.json")
    atomic_io.write(path, json.dumps(summary, indent=2) + "\n")
