"""A training run, from its config to its summary."""

import contextlib
import json
import logging
import os
import pathlib
import time
from typing import Any

import jax
from clu import parameter_overview
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lmim_jax.data import loader, sources
from lmim_jax.data.eval.eval_data import EvaluationData
from lmim_jax.distributed import multihost, preemption, sharding
from lmim_jax.evaluators import base as evaluators
from lmim_jax.models import attention
from lmim_jax.train import provenance
from lmim_jax.train import summary as summaries
from lmim_jax.train import workdir as workdirs
from lmim_jax.train.build import TrainingParts, build
from lmim_jax.train.checkpoints import Checkpoints
from lmim_jax.train.collapse_metrics import make_collapse_metrics
from lmim_jax.train.lock import Lock
from lmim_jax.train.metric_logger import MetricLogger
from lmim_jax.train.metric_writer import MetricWriter, read_metrics, write_picture
from lmim_jax.utils import atomic_io
from lmim_jax.utils.errors import UserError
from lmim_jax.utils.logging import duration, fill_lines

log = logging.getLogger(__name__)

Sources = dict[str, Any]  # {"train": source, "test": source or None}


def train(config: ConfigDict, workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """Train; a run that was interrupted resumes.

    Args:
      config: see configs/vit_b.py.
      workdir: folder of this run's checkpoints, metrics and summary; created if needed.

    Returns:
      The summary, which is also written to workdir/summary.json.

    Raises:
      UserError: a mistake in the config, the data or the folder.
      NonFinite: a loss or gradient was NaN or infinite.
      Preempted: SIGTERM or SIGUSR1 was received, and the state is saved.
      SaveFailed: several checkpoints in a row could not be written.
      LockLost: another run has taken the folder over.
    """
    process_start = time.perf_counter()
    mesh = _make_mesh(config)
    attention.check_fused(config.method)
    splits = _open_sources(config)
    parts = build(config, loader.steps_per_epoch(splits["train"], config.batch_size))
    scheduled = _schedule_evaluators(parts, splits)

    # The whole config has been checked: from here on, files are written
    config = parts.config
    plain_config = config.to_dict()
    identity = splits["train"].identity()
    multihost.check_consistent(config=plain_config, data=identity)
    multihost.decide(lambda: workdirs.check(workdir, plain_config, identity))
    finished = multihost.decide(lambda: summaries.read_summary(workdir, parts.total_steps))
    if finished:
        steps = parts.total_steps
        log.info("this run is finished: %d of %d steps, in %s", steps, steps, workdir)
        log.info(summaries.format_summary(finished, workdir))
        return finished
    with (
        Lock(workdir) as lock,
        Checkpoints(workdir, config, lock) as checkpoints,
        preemption.PreemptionHandler() as handler,
    ):
        workdirs.claim(workdir, plain_config, identity)
        provenance.record_start(workdir)
        loop = TrainingLoop(
            parts=parts,
            mesh=mesh,
            splits=splits,
            scheduled=scheduled,
            workdir=pathlib.Path(workdir),
            lock=lock,
            checkpoints=checkpoints,
            handler=handler,
            process_start=process_start,
        )
        loop.run()
        summary = multihost.decide(
            lambda: _write_summary(workdir, parts.total_steps, loop.wall_seconds)
        )
    log.info("finished %d steps in %s", parts.total_steps, duration(summary["wall_seconds"]))
    log.info(summaries.format_summary(summary, workdir))
    return summary


def _make_mesh(config: ConfigDict) -> Mesh:
    """The mesh of the recipe over all devices of all processes."""
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    sharding.check_batch(config.batch_size, config.micro_batches, mesh.size)
    kind = jax.devices()[0].device_kind
    shape = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    log.info("%d %s device(s) as %s, %d process(es)", mesh.size, kind, shape, jax.process_count())
    return mesh


def _open_sources(config: ConfigDict) -> Sources:
    """The images of both splits."""
    splits = sources.open_splits(config.data)
    counts = {split: len(source) if source else 0 for split, source in splits.items()}
    log.info("%d training and %d test images", counts["train"], counts["test"])
    return splits


def _schedule_evaluators(parts: TrainingParts, splits: Sources) -> list[evaluators.Scheduled]:
    """The evaluators of the run; those that have nothing to measure or never run are logged."""
    scheduled = parts.schedule_evaluators()
    problem = evaluators.labels_problem(splits["train"].classes, splits)
    if problem:
        scheduled = evaluators.without_labels(scheduled, problem)
    for evaluator in scheduled:
        if not evaluator.due(parts.total_steps, parts.total_steps):
            log.info(
                "%s is not evaluated: the run is shorter than its interval (`every`)",
                evaluator.title,
            )
    return scheduled


class TrainingLoop:
    """Trains from the newest checkpoint to the last step.

    At a boundary (the end of an evaluation or checkpoint interval) the same state is evaluated and
    saved.
    """

    def __init__(
        self,
        *,
        parts: TrainingParts,
        mesh: Mesh,
        splits: Sources,
        scheduled: list[evaluators.Scheduled],
        workdir: pathlib.Path,
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
        self._lock = lock
        self._checkpoints = checkpoints
        self._handler = handler

        self._state, shardings = parts.create_state(mesh)
        _log_parameter_counts(self._state.params)
        self._start = 0
        restored = checkpoints.restore(self._state, shardings)
        if restored:
            self._state = restored
            self._start = int(restored.step)
            log.info("resuming after step %d of %d", self._start, self._total_steps)

        self._train_step = parts.jit_train_step(mesh, shardings)
        self._data = EvaluationData(
            splits, config.data, parts.augmentation, mesh, check=handler.raise_if_received
        )
        self._collapse_metrics = make_collapse_metrics(
            parts.method, self._data, config.gauge_images
        )
        self._writer = MetricWriter(workdir, self._start)
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

        Raises:
          Preempted: a signal was received, and the state is saved.
          NonFinite: a loss or gradient was NaN or infinite.
          SaveFailed: several checkpoints in a row could not be written.
          LockLost: another run has taken the folder over.
          UserError: an evaluation failed; the state is saved.
        """
        # A signal interrupts the evaluation, and the loop stops after its next step
        with contextlib.suppress(preemption.EvaluationInterrupted):
            self._evaluate(self._start)
        self._logger.resume()
        for step, batch in enumerate(self._batches(), self._start + 1):
            self._run_step(step, batch)
            self._lock.raise_if_lost()
            stop = self._handler.should_stop(step)
            save = stop or self._save_due(step)
            if save or self._evaluation_due(step):
                self._finish_interval(step, stop=stop, save=save)
        self._checkpoints.wait(must_succeed=True)
        if self._handler.received:
            raise preemption.Preempted(f"stopped in the evaluation after step {self._total_steps}")
        self._writer.close()

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
        )

    def _run_step(self, step: int, batch: dict[str, jax.Array]) -> None:
        """Dispatch a step; the metrics of the previous one are fetched meanwhile."""
        with jax.transfer_guard("disallow"):
            self._state, metrics = self._train_step(self._state, batch)
            if self._log_due(step):
                metrics |= self._collapse_metrics(self._state.params, self._state.target)
        self._logger.add(step, metrics)

    def _log_due(self, step: int) -> bool:
        return step % self._config.log_every == 0

    def _save_due(self, step: int) -> bool:
        if step == self._total_steps or step % self._config.checkpoint_every == 0:
            return True
        return self._log_due(step) and self._checkpoints.failing

    def _evaluation_due(self, step: int) -> bool:
        return any(evaluator.due(step, self._total_steps) for evaluator in self._scheduled)

    def _finish_interval(self, step: int, *, stop: bool, save: bool) -> None:
        """Evaluate and save the state after a step.

        Args:
          step: the step.
          stop: a signal was received: do not evaluate, and raise Preempted in the end.
          save: whether to save.
        """
        self._logger.pause()  # raises NonFinite unless this state is finite
        if not stop:
            try:
                with contextlib.suppress(preemption.EvaluationInterrupted):
                    self._evaluate(step)
            except UserError:  # such as missing masks: what was trained is kept
                self._checkpoints.save(self._state, step)
                self._checkpoints.wait(must_succeed=True)
                raise
        if save:
            self._checkpoints.save(self._state, step)
        if stop:
            raise preemption.Preempted(f"stopped after step {step} of {self._total_steps}")
        self._logger.resume()

    def _evaluate(self, step: int) -> None:
        """Run the evaluators that are due, except those that ran before a restart at this step."""
        for evaluator in self._scheduled:
            if not evaluator.due(step, self._total_steps):
                continue
            if step == self._start and self._writer.has_evaluation(evaluator.title):
                continue
            start = time.perf_counter()
            metrics, pictures = evaluator.run(self._parts.method, self._state, self._data)
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


def _write_summary(
    workdir: str | os.PathLike[str], total_steps: int, wall_seconds: float
) -> dict[str, Any]:
    """Summarize the run in summary.json and curves.png."""
    lines = read_metrics(workdir)
    summary = summaries.summarize(lines, total_steps=total_steps, seconds=wall_seconds)
    write_picture(workdir, "curves", summaries.draw_curves(lines, workdir))
    path = pathlib.Path(workdir, "summary.json")
    atomic_io.write(path, json.dumps(summary, indent=2) + "\n")
    return summary
