"""Metrics of the training steps: averages, the check for NaN, speed and ETA; console output."""

import logging
import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from lmim_jax.train.collapse_metrics import CollapseMonitor
from lmim_jax.train.metric_writer import MetricWriter
from lmim_jax.utils.logging import duration, fill_lines

log = logging.getLogger(__name__)

# What a NaN in another quantity may come from; the likely cause first
CAUSES = ("input_mean", "target_norm", "loss")
# Not in the second line on the console
HIDDEN = {"loss", "input_mean", "param_norm", "target_norm"}


class NonFinite(RuntimeError):
    """A quantity became NaN or infinite; the message names the step and the quantities."""


def check_finite(
    step: int, values: Mapping[str, float], describe_checkpoints: Callable[[], str]
) -> None:
    """Check the metrics of a step.

    Args:
      step: of the metrics.
      values: all metrics of the step.
      describe_checkpoints: gives a clause on the saved checkpoints, for the error message.

    Raises:
      NonFinite: one of them is NaN or infinite.
    """
    listed = list_nonfinite(values)
    if listed:
        raise NonFinite(
            f"step {step}: {listed}. Stopped; {describe_checkpoints()}. Try a lower "
            "config.optimizer.base_lr"
        )


def list_nonfinite(values: Mapping[str, float]) -> str:
    """The values that are NaN or infinite, the likely cause first; "" where all are finite."""
    names = [name for name, value in values.items() if not math.isfinite(value)]
    names.sort(key=_cause_rank)
    return ", ".join(f"{name} = {values[name]}" for name in names)


def _cause_rank(name: str) -> int:
    return CAUSES.index(name) if name in CAUSES else len(CAUSES)


def _means(lines: list[dict[str, float]]) -> dict[str, float]:
    """The mean of every metric over the lines that have it."""
    collected: dict[str, list[float]] = {}
    for line in lines:
        for name, value in line.items():
            collected.setdefault(name, []).append(value)
    return {name: statistics.fmean(values) for name, values in collected.items()}


class MetricLogger:
    """Collects the metrics of each step and logs their means every `log_every` steps.

    The metrics of a step are fetched after the next step has been dispatched, so that the host
    never waits for the step it has just started. A line also has the epoch, the learning rate,
    images/s and ETA; metrics that only some steps have (collapse metrics) are logged as they are.
    """

    def __init__(
        self,
        writer: MetricWriter,
        config: ConfigDict,
        *,
        start: int,
        total_steps: int,
        steps_per_epoch: int,
        learning_rate: Callable[[int], Any],
        describe_checkpoints: Callable[[], str],
        process_start: float,
    ) -> None:
        """Set up logging.

        Args:
          writer: where metrics are written.
          config: `method`, `batch_size`, `log_every`, `on_nonfinite` and `max_skipped` are read.
          start: steps done before.
          total_steps: of the run.
          steps_per_epoch: of the run.
          learning_rate: as a function of the step.
          describe_checkpoints: see `check_finite`.
          process_start: `time.perf_counter()` at the start of the process.
        """
        self._writer = writer
        self._monitor = CollapseMonitor(config.method)
        self._learning_rate = learning_rate
        self._describe_checkpoints = describe_checkpoints
        self._process_start = process_start
        self._batch_size = config.batch_size
        self._log_every = config.log_every
        self._max_skipped = config.max_skipped if config.on_nonfinite == "skip" else 0
        self._total_steps = total_steps
        self._steps_per_epoch = steps_per_epoch
        self._skipped = 0  # steps in a row
        self._pending: tuple[int, dict[str, Any]] | None = None
        self._window: list[dict[str, float]] = []
        self._logged_step = start
        self._seconds = 0.0  # of training since the last line, up to the last pause
        self._resumed: float | None = time.perf_counter()  # None: paused

    @property
    def wall_seconds(self) -> float:
        """How long the run has taken so far, over all its restarts."""
        return self._writer.wall_seconds + time.perf_counter() - self._process_start

    def add(self, step: int, metrics: dict[str, Any]) -> None:
        """Take the device metrics of a step (1-based); process those of the step before."""
        previous = self._pending
        self._pending = (step, metrics)
        if previous:
            self._process(previous[0], previous[1])

    def flush(self) -> None:
        """Wait for the last step, and process its metrics."""
        if self._pending:
            self._process(self._pending[0], self._pending[1])
            self._pending = None

    def log_rest(self) -> None:
        """Log the steps since the last line, if there are any; for a run that ends early."""
        self.pause()
        if self._window:
            self._log_window(self._logged_step + len(self._window))

    def pause(self) -> None:
        """Stop the clock, as evaluations and checkpoints are not training time; flushes."""
        self.flush()
        self._seconds += self._seconds_since_resumed()
        self._resumed = None

    def resume(self) -> None:
        """Restart the clock."""
        self._resumed = time.perf_counter()

    def _seconds_since_resumed(self) -> float:
        """How long the clock has been running; 0 while it is stopped."""
        return 0.0 if self._resumed is None else time.perf_counter() - self._resumed

    def _process(self, step: int, metrics: dict[str, Any]) -> None:
        fetched = jax.device_get(metrics)
        values = {name: float(value) for name, value in fetched.items()}
        if self._was_skipped(step, values):
            values = {"skipped": 1.0}
        self._window.append(values)
        if step % self._log_every == 0 or step == self._total_steps:
            self._log_window(step)

    def _log_window(self, step: int) -> None:
        """Write and print the means since the last line."""
        seconds = self._seconds + self._seconds_since_resumed()
        per_step = seconds / max(step - self._logged_step, 1)
        self._logged_step = step
        self._seconds = 0.0
        if self._resumed is not None:
            self.resume()
        means = _means(self._window)
        self._window = []
        progress = {
            "epoch": step / self._steps_per_epoch,
            "learning_rate": float(self._learning_rate(step - 1)),
            "images_per_second": self._batch_size / per_step,
            "seconds_per_step": per_step,
            "wall_seconds": self.wall_seconds,
        }
        self._writer.write(step, {**means, **progress})
        log.info(
            "step %d/%d  epoch %.2f/%.2f  loss %.4f  %.4g images/s  ETA %s  lr %.2e",
            step,
            self._total_steps,
            progress["epoch"],
            self._total_steps / self._steps_per_epoch,
            means.get("loss", math.nan),
            progress["images_per_second"],
            duration(per_step * (self._total_steps - step)),
            progress["learning_rate"],
        )
        shown = [f"{name} {value:.3g}" for name, value in means.items() if name not in HIDDEN]
        for line in fill_lines(shown):
            log.info("%s", line)
        self._monitor.update(step, means)

    def _was_skipped(self, step: int, values: dict[str, float]) -> bool:
        """Whether this step was skipped as not finite.

        Raises:
          NonFinite: a quantity is not finite, and the step must not be skipped, or too many steps
            in a row were.
        """
        self._skipped = self._skipped + 1 if values.get("skipped") else 0
        if self._skipped == 0 or self._skipped > self._max_skipped:
            check_finite(step, values, self._describe_checkpoints)
            return False
        listed = list_nonfinite(values)
        log.warning("step %d skipped (%d in a row): %s", step, self._skipped, listed)
        return True
