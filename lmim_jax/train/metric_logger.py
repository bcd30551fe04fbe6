"""Numbers of the steps: averaging, the NaN guard, speed and ETA; the console."""

import logging
import math
import statistics
import time

import jax

from lmim_jax.utils.logging import duration

log = logging.getLogger(__name__)


class NonFinite(RuntimeError):
    """Something became NaN or infinite; the message names step and quantities, the likely cause first."""


CAUSES = (
    "input_mean",
    "target_norm",
    "loss",
)  # what a NaN elsewhere may come from, first things first
QUIET = {"loss", "input_mean", "param_norm", "target_norm"}  # not in the second line on the console


def check_finite(step, values, tell):
    """Raise NonFinite if the loss, the gradient norm, or anything else measured at `step` is NaN or infinite."""
    if bad := bad_values(values):
        raise NonFinite(
            f"step {step}: {bad}. Stopped; {tell()}. Try a lower config.optimizer.base_lr"
        )


def bad_values(values):
    """The values that are NaN or infinite, as text, the likely cause first; "" where all are finite."""
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    bad.sort(key=lambda name: CAUSES.index(name) if name in CAUSES else len(CAUSES))
    return ", ".join(f"{name} = {values[name]}" for name in bad)


class Meter:
    """Collects the metrics of each step, one step late, so that the host never waits for the step it just started.

    Every `log_every` steps it writes their means, with epoch, learning rate, images/s and ETA; metrics that not every
    step has (the gauges) as they are.
    """

    def __init__(
        self,
        writer,
        alarm,
        config,
        *,
        start,
        total_steps,
        steps_per_epoch,
        learning_rate,
        tell,
        began,
    ):
        """`alarm`: see `gauges.Alarm`; `config`: batch_size, log_every, on_nonfinite, max_skipped are read.

        `learning_rate`: function of the step; `tell`: gives what to say of checkpoints on NaN; `began`:
        `time.perf_counter()` at the start of the process.
        """
        self._writer, self._alarm, self._began, self._rate, self._tell = (
            writer,
            alarm,
            began,
            learning_rate,
            tell,
        )
        self._batch, self._log_every = config.batch_size, config.log_every
        self._max_skipped = config.max_skipped if config.on_nonfinite == "skip" else 0
        self._total, self._per_epoch, self._skipped = total_steps, steps_per_epoch, 0
        self._pending, self._window = None, []
        self._done, self._seconds, self._since = start, 0.0, time.perf_counter()

    @property
    def wall_seconds(self):
        """What the run has taken so far, over all its restarts."""
        return self._writer.wall_seconds + time.perf_counter() - self._began

    def add(self, step, metrics):
        """Take the (device) metrics that optimiser step number `step` (1-based) returned; reports those before."""
        pending, self._pending = self._pending, (step, metrics)
        if pending:
            self._report(*pending)

    def flush(self):
        """Wait for the last step, and report it."""
        if self._pending:
            self._report(*self._pending)
            self._pending = None

    def pause(self):
        """Stop the clock: evaluations and checkpoints are not training time. Flushes."""
        self.flush()
        self._seconds += time.perf_counter() - self._since

    def resume(self):
        """Start the clock again."""
        self._since = time.perf_counter()

    def _report(self, step, metrics):
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if self._skip(step, values):
            values = {"skipped": 1.0}
        self._window.append(values)
        if step % self._log_every and step != self._total:
            return
        now = time.perf_counter()
        seconds = self._seconds + now - self._since
        per_step = seconds / max(step - self._done, 1)
        self._done, self._seconds, self._since = step, 0.0, now
        mean = {
            name: statistics.fmean(line[name] for line in self._window if name in line)
            for name in dict.fromkeys(name for line in self._window for name in line)
        }
        self._window = []
        extra = {
            "epoch": step / self._per_epoch,
            "learning_rate": float(self._rate(step - 1)),
            "images_per_second": self._batch / per_step,
            "seconds_per_step": per_step,
            "wall_seconds": self.wall_seconds,
        }
        self._writer.write(step, {**mean, **extra})
        log.info(
            "step %d/%d  epoch %.2f/%.2f  loss %.4f  %.4g images/s  ETA %s  lr %.2e",
            *(
                step,
                self._total,
                extra["epoch"],
                self._total / self._per_epoch,
                mean.get("loss", math.nan),
            ),
            *(
                extra["images_per_second"],
                duration(per_step * (self._total - step)),
                extra["learning_rate"],
            ),
        )
        told = {name: value for name, value in mean.items() if name not in QUIET}
        log.info("    %s", "  ".join(f"{name} {value:.3g}" for name, value in told.items()))
        self._alarm.see(step, mean)

    def _skip(self, step, values):
        """Whether this step was skipped as not finite; NonFinite where it must not be, or too many were in a row."""
        self._skipped = self._skipped + 1 if values.get("skipped") else 0
        if not self._skipped or self._skipped > self._max_skipped:
            check_finite(step, values, self._tell)
            return False
        log.warning("step %d skipped (%d in a row): %s", step, self._skipped, bad_values(values))
        return True
