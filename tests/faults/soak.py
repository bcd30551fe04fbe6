"""Training with faults at random under launch/restart.py, compared with an undisturbed run.

    python tests/faults/soak.py FOLDER --minutes=180 --every=60 --seed=0

Prints a report as JSON and as a table, and ends with exit code 1 if the run did not end with the
same bits, or needed more and more memory or descriptors. What is in FOLDER is continued.
"""

import argparse
import contextlib
import errno
import itertools
import json
import os
import pathlib
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time

sys.path[:0] = [str(pathlib.Path(__file__).parents[1])]

import numpy as np  # noqa: E402
import processes  # noqa: E402
from PIL import Image  # noqa: E402

from lmim_jax.train import checkpoint_manifest, checkpoints, restarts, summary  # noqa: E402
from lmim_jax.utils import atomic_io  # noqa: E402

EVERY = 100  # steps between two checkpoints
DISK = "512m"
BATCH = 64  # images
SIDE = 64  # of images, pixels
PROBE_STEPS = 100  # of the run that measures the speed
SAMPLE = 2.0  # seconds between two samples of memory and descriptors
STEADY = 30.0  # seconds after which a start has all its memory
RESTARTS = 20
RECIPE = "configs/quickstart.py"
FLAGS = (
    f"--config.batch_size={BATCH}",
    "--config.micro_batches=2",
    "--config.data.source=folder",
    "--config.data.workers=2",
    "--config.data.timeout=10",
    f"--config.checkpoint_every={EVERY}",
    "--config.evaluators.knn.every=50",
    "--config.evaluators.logistic_regression.every=0",
    "--config.report=False",
)
SIGNALS = {
    "SIGTERM": signal.SIGTERM,
    "SIGHUP": signal.SIGHUP,
    "SIGUSR1": signal.SIGUSR1,
    "SIGKILL": signal.SIGKILL,
}
STATES = {  # content of FAULT_FILE, see inject/sitecustomize.py and soak_train.py
    "storage pauses": "sleep 3",
    "EIO": f"errno {errno.EIO}",
    "EMFILE": f"errno {errno.EMFILE}",
    "evaluator fails": "evaluator",
}
OTHERS = ("worker killed", "bit flip", "full disk")


def make_images(folder):
    """512 training and 64 test images of two classes."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 256), ("test", 32)):
        for label, name in enumerate(("cat", "dog")):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                noise = rng.integers(0, 120, (SIDE, SIDE, 3)) + 100 * label
                image = Image.fromarray(noise.astype(np.uint8))
                image.save(folder / split / name / f"{index:03d}.png")


def start(images, workdir, steps, fault_file, restarting):
    """A run, under restart.py or not."""
    tests = processes.ROOT / "tests"
    path = f"{tests}/faults/inject:{processes.ROOT}:{tests}:{tests}/faults"
    launcher = ["env", f"PYTHONPATH={path}", f"FAULT_FILE={fault_file}", "RESTART_PAUSE=1"]
    if restarting:
        restart = processes.ROOT / "launch" / "restart.py"
        launcher += [sys.executable, str(restart), str(RESTARTS)]
    flags = (*FLAGS, f"--config.total_steps={steps}")
    program = str(tests / "faults" / "soak_train.py")
    (process,) = processes.start(
        images, workdir, *flags, launcher=launcher, program=program, config=RECIPE
    )
    return process


@contextlib.contextmanager
def undisturbed(images, workdir, steps):
    """Train without faults, beside what is done in the context, to the end."""
    process = start(images, workdir, steps, workdir / "none", restarting=False)
    try:
        yield
    except BaseException:
        process.terminate()  # it saves its state first
        raise
    finally:
        code = process.wait()
    if code:
        raise RuntimeError(f"the undisturbed run ended with exit code {code}: {process.output()}")


def children(pid):
    """Process ids of the children of a process."""
    found = []
    for file in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [int(number) for number in file.read_text().split()]
        except OSError:  # it has ended
            continue
    return found


def trainer(process):
    """Process id of the training under restart.py; None between two starts."""
    return next(iter(children(process.pid)), None)


def sample(pid):
    """(resident MB, open descriptors, age in seconds) of a process; None: it has ended."""
    try:
        pages = int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1])
        descriptors = len(list(pathlib.Path(f"/proc/{pid}/fd").iterdir()))
        ticks = int(pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError):
        return None
    uptime = float(pathlib.Path("/proc/uptime").read_text().split()[0])
    age = uptime - ticks / os.sysconf("SC_CLK_TCK")
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, descriptors, age


class Soak:
    """A disturbed run in a folder; it may be stopped and continued."""

    def __init__(self, folder, seed):
        self._folder = folder
        self._disk = folder / "disk"
        self._workdir = self._disk / "run"
        self._fault = folder / "fault"
        self._log = folder / "events.jsonl"
        self._rng = random.Random(f"{seed} {len(self.events())}")
        self._small = self._mount()
        self._process = None

    def events(self):
        """What has happened so far."""
        if not self._log.exists():
            return []
        return [json.loads(line) for line in self._log.read_text().splitlines()]

    def note(self, event, **values):
        """Add an event."""
        with self._log.open("a") as log:
            log.write(json.dumps({"time": time.time(), "event": event, **values}) + "\n")

    def run(self, images, steps, every):
        """Train to the end, with a fault every so many seconds; the last exit code."""
        self._fault.unlink(missing_ok=True)
        code = 75
        while code == 75:  # a scheduler starts it again
            self.note("start")
            self._process = start(images, self._workdir, steps, self._fault, restarting=True)
            try:
                self._disturb(every)
            finally:
                if self._process.poll() is None:
                    self._process.terminate()
                code = self._process.wait()
            output = self._process.output()
            with (self._folder / "log").open("a") as log:
                log.write(output)
            self.note("end", code=code)
        return code

    def _disturb(self, every):
        """Inject faults, and take samples, while the run goes on."""
        due = time.monotonic() + self._rng.uniform(0.5, 1.5) * every
        while self._process.poll() is None:
            time.sleep(SAMPLE)
            pid = trainer(self._process)
            if pid is None:
                continue
            values = sample(pid)
            if values is not None and values[2] > STEADY:
                self.note("sample", resident=values[0], descriptors=values[1], pid=pid)
            if time.monotonic() > due:
                due = time.monotonic() + self._rng.uniform(0.5, 1.5) * every
                self._inject(pid)

    def _inject(self, pid):
        """One fault, drawn at random."""
        kinds = [*SIGNALS, *STATES, *OTHERS]
        if not self._small:
            kinds.remove("full disk")
        kind = self._rng.choice(kinds)
        done = True
        try:
            if kind in SIGNALS:
                os.kill(pid, SIGNALS[kind])
            elif kind in STATES:
                self._set_state(STATES[kind])
            elif kind == "worker killed":
                done = self._kill_worker(pid)
            elif kind == "bit flip":
                done = self._flip_bit(pid)
            else:
                self._fill_disk()
        except ProcessLookupError:
            done = False
        self.note("fault", kind=kind, done=done, step=processes.step_of(self._workdir))

    def _set_state(self, content):
        """Faulty images or evaluators for some seconds, sometimes longer than the time-out."""
        other = self._fault.with_suffix(".new")
        other.write_text(content)
        other.replace(self._fault)
        time.sleep(self._rng.uniform(3, 20))
        self._fault.unlink()

    def _kill_worker(self, pid):
        workers = []
        for child in children(pid):
            command = pathlib.Path(f"/proc/{child}/cmdline").read_bytes()
            if b"spawn_main" in command:
                workers.append(child)
        if workers:
            os.kill(self._rng.choice(workers), signal.SIGKILL)
        return bool(workers)

    def _flip_bit(self, pid):
        """Damage the newest of several good checkpoints of a run that is killed just before."""
        os.kill(pid, signal.SIGSTOP)
        steps = checkpoints.steps(self._workdir).items()
        good = [folder for _, folder in steps if checkpoint_manifest.is_committed(folder)]
        flipped = len(good) > 1
        if flipped:
            files = [path for path in good[-1].rglob("*") if path.is_file() and path.stat().st_size]
            path = self._rng.choice(sorted(files))
            content = bytearray(path.read_bytes())
            content[self._rng.randrange(len(content))] ^= 1 << self._rng.randrange(8)
            path.write_bytes(content)
        os.kill(pid, signal.SIGKILL)
        return flipped

    def _fill_disk(self):
        filler = self._disk / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:  # until it is full
                atomic_io.write_all(file, bytes(1 << 20))
        time.sleep(self._rng.uniform(3, 20))
        filler.unlink()

    def _mount(self):
        """Whether the run is on a small file system of its own."""
        self._disk.mkdir(parents=True, exist_ok=True)
        if self._disk.is_mount():
            return True
        command = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(self._disk)]
        return os.geteuid() == 0 and subprocess.run(command).returncode == 0

    def close(self):
        """Leave nothing mounted."""
        if self._small:
            subprocess.run(["umount", "-l", str(self._disk)], check=True)

    def report(self, steps, whole, code):
        """What was injected, and how the run compares with the undisturbed one."""
        events = self.events()
        faults = {}
        for event in events:
            if event["event"] == "fault" and event["done"]:
                faults[event["kind"]] = faults.get(event["kind"], 0) + 1
        samples = [event for event in events if event["event"] == "sample"]
        report = {
            "minutes": round(_minutes(events), 1),
            "steps": steps,
            "exit_code": code,
            "faults": dict(sorted(faults.items())),
            "starts": sum(event["event"] == "start" for event in events),
            "restarts": len(restarts.read(self._workdir)),
        }
        if code == 0:
            report["same_bits"] = processes.digest(self._workdir, steps) == processes.digest(
                whole, steps
            )
            report["same_losses"] = processes.losses(self._workdir) == processes.losses(whole)
        if len(samples) >= 6:
            third = len(samples) // 3
            for name in ("resident", "descriptors"):
                values = [event[name] for event in samples]
                report[name] = {
                    "first_third": round(statistics.median(values[:third])),
                    "last_third": round(statistics.median(values[-third:])),
                    "most": round(max(values)),
                }
        return report


def _minutes(events):
    """Minutes in which the run went on, over all calls, also those that were killed."""
    total = 0.0
    for event, following in itertools.pairwise(events):
        if following["event"] != "start":
            total += following["time"] - event["time"]
    return total / 60


def soak(folder, minutes, every, seed):
    """Train with faults for about so many minutes.

    Args:
      folder: for all files; what is there is continued.
      minutes: how long the run would take with faults on an idle machine, about; without faults it
        takes half of that. It goes on beside.
      every: seconds between two faults, on average.
      seed: of the faults.

    Returns:
      The report, a dict of plain values.
    """
    folder = pathlib.Path(folder).absolute()
    images = folder / "images"
    plan = folder / "plan.json"
    if not plan.exists():
        shutil.rmtree(images, ignore_errors=True)
        make_images(images)
        with undisturbed(images, folder / "probe", PROBE_STEPS):
            pass
        speed = summary.median_speed(processes.lines(folder / "probe")) / BATCH
        steps = max(1, round(speed * 30 * minutes / EVERY)) * EVERY
        atomic_io.write(plan, json.dumps({"steps": steps}))
    steps = json.loads(plan.read_text())["steps"]
    whole = folder / "whole"
    run = Soak(folder, seed)
    with undisturbed(images, whole, steps):
        code = run.run(images, steps, every)
    report = run.report(steps, whole, code)
    shutil.copy(folder / "disk" / "run" / "metrics.jsonl", folder)  # the disk is in memory
    run.close()
    return report


def problems(report):
    """What a report shows that must not be; [] where nothing is."""
    found = []
    if report["exit_code"]:
        found.append(f"it ended with exit code {report['exit_code']}")
    for name in ("same_bits", "same_losses"):
        if report.get(name) is False:
            found.append(f"{name} is False")
    for name, slack in (("resident", 64), ("descriptors", 8)):
        values = report.get(name)
        if values and values["last_third"] > 1.1 * values["first_third"] + slack:
            found.append(f"{name} grew from {values['first_third']} to {values['last_third']}")
    return found


def table(report):
    """The report in Markdown."""
    lines = ["| | |", "|---|---|"]
    for name, value in report.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key.replace('_', ' ')} {number}" for key, number in value.items())
        lines.append(f"| {name.replace('_', ' ')} | {value} |")
    return "\n".join(lines)


def main():
    """Run it, and print the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--every", type=float, default=60, help="seconds between two faults")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the runs are stopped, too
    report = soak(given.folder, given.minutes, given.every, given.seed)
    print(json.dumps(report, indent=1))
    print(table(report))
    found = problems(report)
    for problem in found:
        print("PROBLEM:", problem)
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
