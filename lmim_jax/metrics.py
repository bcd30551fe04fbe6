"""Numbers on their way out: averaging, the NaN guard, speed and ETA; console, JSONL and TensorBoard."""

import json
import logging
import math
import pathlib
import statistics
import time

import absl.logging
import jax
from PIL import Image

from lmim_jax import files

log = logging.getLogger(__name__)


def log_to_console():
    """Show the package's log on stderr, with the time; other libraries' only from warnings up."""
    absl.logging.set_verbosity(absl.logging.WARNING)  # Orbax tells of every file it writes
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # and matplotlib of its fonts
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    package = logging.getLogger("lmim_jax")
    package.handlers, package.propagate = [handler], False
    package.setLevel(logging.WARNING if jax.process_index() else logging.INFO)


class NonFinite(RuntimeError):
    """A loss or gradient became NaN or infinite; the message names step and quantity."""


def check_finite(step, values, tell):
    """Raise NonFinite if the loss, the gradient norm, or anything else logged at `step` is NaN or infinite."""
    bad = {name: value for name, value in values.items() if not math.isfinite(value)}
    if bad:
        listed = ", ".join(f"{name} = {value}" for name, value in bad.items())
        raise NonFinite(f"step {step}: {listed}. Stopped; {tell()}. Try a lower config.optimizer.base_lr")


def duration(seconds):
    """3725 -> "1h02m", 125 -> "2m05s", 42 -> "42s"."""
    seconds = int(seconds)
    if seconds >= 3600:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 60}m{seconds % 60:02d}s" if seconds >= 60 else f"{seconds}s"


class Writer:
    """Writes metric lines to workdir/metrics.jsonl and TensorBoard, on the first process only."""

    def __init__(self, workdir, start):
        """Open the writers; lines of steps after `start` (of a run that was killed) are dropped."""
        self._workdir, self._file, self._board = workdir, None, None
        self.wall_seconds = 0.0  # that the run had taken before this start
        if jax.process_index():
            return
        from tensorboardX import SummaryWriter

        path = pathlib.Path(workdir, "metrics.jsonl")
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= start]
            files.write(path, "".join(line + "\n" for line in kept))
            self.wall_seconds = max((json.loads(line).get("wall_seconds", 0.0) for line in kept), default=0.0)
        self._file = path.open("a", buffering=1)
        self._board = SummaryWriter(str(pathlib.Path(workdir, "tensorboard")), purge_step=start + 1)

    def write(self, step, values):
        """One line: {"step": ..., name: value, ...}."""
        if self._file:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()

    def draw(self, step, pictures):
        """Pictures {name: uint8 [H, W, 3]} as workdir/pictures/NAME_STEP.png and in TensorBoard."""
        if self._file:
            for name, picture in pictures.items():
                write_picture(self._workdir, f"{name.rpartition('/')[2]}_{step:07d}", picture)
                self._board.add_image(name, picture, step, dataformats="HWC")
            self._board.flush()

    def close(self):
        """Flush and close."""
        if self._file:
            self._file.close()
            self._board.close()


def write_picture(workdir, name, picture):
    """Write uint8 [H, W, 3] to workdir/pictures/name.png."""
    folder = pathlib.Path(workdir, "pictures")
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(folder / f"{name}.png", optimize=True)


def _step_of(line):
    """The step of a metrics line; infinite for a line cut off by a kill, so that it is dropped."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return math.inf


class Meter:
    """Collects the metrics of each step, one step late, so that the host never waits for the step it just started.

    Every `log_every` steps it writes their means, with epoch, learning rate, images/s and ETA; metrics that not every
    step has (the gauges) as they are.
    """

    def __init__(
        self, writer, alarm, *, start, total_steps, steps_per_epoch, batch_size, log_every, learning_rate, tell, began
    ):
        """`alarm`: see `gauges.Alarm`; `learning_rate`: function of the step.

        `tell`: gives what to say of checkpoints on NaN; `began`: `time.perf_counter()` at the start of the process.
        """
        self._writer, self._alarm, self._began = writer, alarm, began
        self._log_every, self._rate, self._tell = log_every, learning_rate, tell
        self._total, self._per_epoch, self._batch = total_steps, steps_per_epoch, batch_size
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
        check_finite(step, values, self._tell)
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
            *(step, self._total, extra["epoch"], self._total / self._per_epoch, mean["loss"]),
            *(extra["images_per_second"], duration(per_step * (self._total - step)), extra["learning_rate"]),
        )
        log.info("    %s", "  ".join(f"{name} {value:.3g}" for name, value in mean.items() if name != "loss"))
        self._alarm.see(step, mean)
