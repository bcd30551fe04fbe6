"""Trains variants of a recipe over several seeds, and compares them.

    lmim study --config=study --out=runs/study
    lmim study --config=study --out=runs/study --only=ladder --parallel=2 --set=epochs=10

The config of a study has `seeds`, `runs` (name, description, recipe, changes to the recipe),
`groups` (title, what each row is compared with, names of runs), `cost` (whether to measure the
cost of training) and, if it likes, `baselines` (whether tables have rows for raw pixels and the
untrained encoders) and `later_seeds` (changes to the recipes for all seeds but the first). Every
run is a process of its own in OUT/NAME/seedS, with its own log. Re-run the command to resume.
OUT/index.html, OUT/table.md and OUT/results.json are updated after every run.

With --records=DIR, the small files of every run that has finished are copied to DIR: its command,
versions, metrics and log. A run with records is not trained again, so that the pages can be made
anew from DIR alone.
"""

import ast
import collections
import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from lmim_jax.report import comparison, records
from lmim_jax.report.comparison import Group, Values
from lmim_jax.train import summary
from lmim_jax.utils import atomic_io, buckets, commands
from lmim_jax.utils import cores as usable_cores
from lmim_jax.utils.errors import UserError, did_you_mean, fail
from lmim_jax.utils.logging import duration, log_to_console
from lmim_jax.utils.subprocess import STOP_SIGNALS

log = logging.getLogger("lmim_jax.cli.study")

RECIPES: dict[str, str | None] = {"config": "study"}

COMMAND_FILE = records.COMMAND_FILE
PLACES = tuple(f"--config.{key}=" for key in records.PLACES)
LOG_FILE = records.LOG_FILE
COST_FILE = "cost.json"  # of training, see `measure_costs`
COSTS = ("gflop_per_image", "step_images_per_second")
POLL_SECONDS = 0.3
EXIT_STOPPED = 75  # interrupted, and can be resumed
GPU_MEMORY_SHARE = 0.9  # of an accelerator's memory, for all runs together


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run of a study.

    Attributes:
      name: of the variant.
      seed: of the run.
      recipe: as for `lmim train --config`.
      changes: "KEY=VALUE" of the recipe.
      folder: its workdir.
      records: where its records are kept, see report/records.py; None: nowhere.
    """

    name: str
    seed: int
    recipe: str
    changes: tuple[str, ...]
    folder: buckets.Path
    records: buckets.Path | None = None

    @property
    def config_flags(self) -> list[str]:
        """Flags of `lmim train` and `lmim bench` that give the config of the run."""
        arguments = [f"--config={self.recipe}"]
        for change in self.changes:
            arguments.append(f"--config.{change}")
        arguments.append(f"--config.seed={self.seed}")
        return arguments

    @property
    def finished(self) -> bool:
        """Whether the run has been trained to its end, with this config."""
        return self.results is not None

    @property
    def results(self) -> buckets.Path | None:
        """The folder with the results of the finished run: its workdir, or else its records."""
        if self._finished_in(self.folder):
            return self.folder
        if self.records is not None and self._finished_in(self.records):
            return self.records
        return None

    def _finished_in(self, folder: buckets.Path) -> bool:
        if not self._has_results(folder):
            return False
        return self.is_command((folder / COMMAND_FILE).read_text())

    def is_command(self, recorded: str) -> bool:
        """Whether a recorded command is that of this run, wherever its images were."""
        found = records.hide_folders(_without_places(recorded), self.changes)
        return found == records.hide_folders(self.recorded_command, self.changes)

    @staticmethod
    def _has_results(folder: buckets.Path) -> bool:
        """Whether a folder has the results of a run, of whatever command, to its end."""
        path = folder / "summary.json"
        if not (folder / COMMAND_FILE).exists() or not path.exists():
            return False
        return summary.is_finished(json.loads(path.read_text()))

    def check_folder(self) -> None:
        """Check that the workdir is not that of another run.

        Raises:
          UserError: it has the results of another command.
        """
        if self._has_results(self.folder) and not self._finished_in(self.folder):
            raise UserError(
                f"{self.folder} has the results of other options, see its {COMMAND_FILE}: choose "
                "another --out, or delete that folder"
            )

    def keep_records(self) -> None:
        """Copy the small files of the finished run to its records, if these are wanted."""
        if self.records is not None and self._finished_in(self.folder):
            records.keep(self.folder, self.records, self.changes)

    @property
    def recorded_command(self) -> str:
        """The content of COMMAND_FILE; without folders, as a study may be moved."""
        return _without_places("\n".join(["python", "main.py"] + self.config_flags) + "\n")

    def start(self, cores: Sequence[int], share: float) -> subprocess.Popen:
        """Start the training in a process of its own.

        Args:
          cores: CPU cores that it may use.
          share: of an accelerator's memory that it may use.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        atomic_io.write(self.folder / COMMAND_FILE, self.recorded_command)
        command = [sys.executable, "-m", "lmim_jax.cli", "train"] + self.config_flags
        command.append(f"--workdir={self.folder.absolute()}")
        with usable_cores.bound_to(cores), self._local_log.open("ab") as output:
            return subprocess.Popen(
                command,
                env=self._environment(share),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the study, which stops its runs
            )

    @property
    def _local_log(self) -> pathlib.Path:
        """Where the log is written; for a run in a bucket, it is uploaded in the end."""
        log_file = self.folder / LOG_FILE
        if isinstance(log_file, pathlib.Path):
            return log_file
        digest = hashlib.sha256(str(log_file).encode()).hexdigest()
        return pathlib.Path(tempfile.gettempdir(), f"lmim_jax_study_{digest[:16]}.txt")

    def upload_log(self) -> None:
        """Upload the log of a run in a bucket that has ended."""
        log_file = self.folder / LOG_FILE
        if isinstance(log_file, buckets.BucketPath):
            log_file.write_bytes(self._local_log.read_bytes())

    def _environment(self, share: float) -> dict[str, str]:
        """Environment variables of the process; the runs of a study share compiled programs."""
        study_folder = self.folder.parent.parent.absolute()
        environment = {"JAX_COMPILATION_CACHE_DIR": str(study_folder / "compiled")}
        environment.update(os.environ)
        if share < 1:
            environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{GPU_MEMORY_SHARE * share:.3f}"
        return environment

    def failure_reason(self) -> str:
        """The last line of the log that names an error, or else the last line."""
        text = self._local_log.read_text(errors="replace").strip()
        lines = text.splitlines() or ["no output"]
        for line in reversed(lines):
            if re.match(r"[\w.]*(error|exception|killed)\b", line, re.IGNORECASE):
                return line
        return lines[-1]


def _without_places(command: str) -> str:
    """A command, one word per line, without the flags that only say where images are."""
    lines = []
    for line in command.splitlines():
        if not line.startswith(PLACES):
            lines.append(line)
    return "\n".join(lines) + "\n"


@dataclasses.dataclass(frozen=True)
class _Process:
    """A run that is being trained."""

    run: Run
    process: subprocess.Popen
    started: float


def plan(
    config: ConfigDict,
    only: Sequence[str],
    changes: Sequence[str],
    out: buckets.Pathname,
    kept: buckets.Pathname | None = None,
) -> tuple[list[Group], list[Run]]:
    """The groups and runs of a study.

    Args:
      config: of the study, see the top of this file.
      only: titles of groups; empty: all.
      changes: "KEY=VALUE" of the recipe, for all runs.
      out: the folder of the study.
      kept: the folder of its records; None: none are kept.

    Raises:
      UserError: no such group.
    """
    groups = []
    for title, reference, names in config.groups:
        groups.append(Group(title, reference, names))
    titles = [group.title for group in groups]
    for title in only:
        if title not in titles:
            raise UserError(f"--only={title}: no such group{did_you_mean(title, titles)}")
    if only:
        groups = [group for group in groups if group.title in only]
    wanted: set[str] = set()
    for group in groups:
        wanted.update(group.names)
    runs = []
    for seed in config.seeds:
        of_seed = () if seed == config.seeds[0] else config.get("later_seeds", ())
        for name, _, recipe, run_changes in config.runs:
            if name in wanted:
                inner = (_folder_name(name), f"seed{seed}")
                all_changes = (*dict.fromkeys((*run_changes, *of_seed)), *changes)
                run_records = None
                if kept is not None:
                    run_records = buckets.path(kept, *inner)
                folder = buckets.path(out, *inner)
                runs.append(Run(name, seed, recipe, all_changes, folder, run_records))
    return groups, runs


def _folder_name(name: str) -> str:
    """The name of a variant with only characters that are safe in names of folders."""
    return re.sub(r"[^\w.=+-]", "_", name)


class _Scheduler:
    """Trains runs, several at once, each on its share of the CPU cores.

    Args:
      runs: what to train.
      parallel: how many at once.
      hours: after which it stops; 0: never.
      on_finished: called after each run that ended well.

    Raises:
      UserError: more runs at once than CPU cores.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        parallel: int,
        hours: float,
        on_finished: Callable[[], None],
    ) -> None:
        self._cores = usable_cores.available()
        if not 1 <= parallel <= len(self._cores):
            raise UserError(
                f"--parallel={parallel} must be 1 .. {len(self._cores)}, the number of CPU cores"
            )
        self._parallel = parallel
        self._on_finished = on_finished
        self._queue = collections.deque(runs)
        self._number_of_runs = len(runs)
        self._processes: dict[int, _Process] = {}  # by slot, 0 .. parallel - 1
        self._free_slots = list(range(parallel))
        self._number_done = 0
        self._started = time.perf_counter()
        self._hours = hours
        self.failed: list[Run] = []

    def execute(self) -> None:
        """Train all runs; if interrupted or out of time, stop them first."""
        try:
            while self._queue or self._processes:
                if self._hours and time.perf_counter() - self._started > 3600 * self._hours:
                    raise KeyboardInterrupt(f"after --hours={self._hours:g}")
                self._start_runs()
                time.sleep(POLL_SECONDS)
                self._collect_runs()
        except KeyboardInterrupt:
            self._stop_runs()
            raise

    def _start_runs(self) -> None:
        """Fill the free slots."""
        while self._queue and self._free_slots:
            slot = self._free_slots.pop()
            run = self._queue.popleft()
            process = run.start(self._cores[slot :: self._parallel], 1 / self._parallel)
            self._processes[slot] = _Process(run, process, time.perf_counter())

    def _collect_runs(self) -> None:
        """Handle the runs that have ended."""
        for slot, process in list(self._processes.items()):
            if process.process.poll() is not None:
                del self._processes[slot]
                self._free_slots.append(slot)
                self._number_done += 1
                self._report(process)

    def _report(self, ended: _Process) -> None:
        """Log the result of a run."""
        run = ended.run
        run.upload_log()
        if ended.process.returncode:
            self.failed.append(run)
            log.error("%s, seed %d FAILED: %s", run.name, run.seed, run.failure_reason())
            return
        run.keep_records()
        now = time.perf_counter()
        seconds_per_run = (now - self._started) / self._number_done
        remaining = self._number_of_runs - self._number_done
        log.info(
            "[%d/%d, ETA %s]  %s, seed %d (%s): %s",
            self._number_done,
            self._number_of_runs,
            duration(seconds_per_run * remaining),
            run.name,
            run.seed,
            duration(now - ended.started),
            comparison.one_line_summary(run.folder),
        )
        self._on_finished()

    def _stop_runs(self) -> None:
        """Stop the runs; they save their states before they exit."""
        for process in self._processes.values():
            process.process.terminate()
        for process in self._processes.values():
            process.process.wait()


def execute(
    runs: Sequence[Run], parallel: int, hours: float, on_finished: Callable[[], None]
) -> list[Run]:
    """Train runs, each on its share of the CPU cores.

    Args:
      runs: what to train.
      parallel: how many at once.
      hours: after which it stops; 0: never.
      on_finished: called after each run that ended well.

    Returns:
      The runs that failed.

    Raises:
      KeyboardInterrupt: a signal to stop, or out of time; all runs were stopped, and their states
        are saved.
      UserError: more runs at once than CPU cores.
    """
    scheduler = _Scheduler(runs, parallel, hours, on_finished)
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, signal.default_int_handler)
    scheduler.execute()
    return scheduler.failed


def measure_costs(runs: Iterable[Run], path: buckets.Path) -> None:
    """Measure the cost of training each variant, one by one, and store it in a file.

    A cost that was measured with other options is measured anew.

    Args:
      runs: of the variants.
      path: of the file, see `known_costs`.

    Raises:
      UserError: a benchmark failed.
    """
    entries = _read_costs(path)
    names = set()
    for run in runs:
        if run.name in names:
            continue  # the first seed stands for all
        names.add(run.name)
        if not _is_cost_of(run, entries):
            entries[run.name] = _measure_cost(run)
            atomic_io.write(path, json.dumps(entries, indent=2) + "\n")


def known_costs(runs: Iterable[Run], path: buckets.Path) -> dict[str, Values]:
    """The costs of runs that have been measured with their options.

    Args:
      runs: the runs.
      path: of COST_FILE, which may not exist.

    Returns:
      {name: {"gflop_per_image": [value], "step_images_per_second": [value]}}.
    """
    entries = _read_costs(path)
    found: dict[str, Values] = {}
    for run in runs:
        if _is_cost_of(run, entries):
            found[run.name] = {metric: [entries[run.name][metric]] for metric in COSTS}
    return found


def _read_costs(path: buckets.Path) -> dict[str, dict[str, Any]]:
    """{name: what `_measure_cost` returned}; empty where nothing was measured."""
    return json.loads(path.read_text()) if path.exists() else {}


def _is_cost_of(run: Run, entries: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether what `_read_costs` returned has the cost of a run, with its options."""
    return run.name in entries and run.is_command("\n".join(entries[run.name]["command"]))


def _measure_cost(run: Run) -> dict[str, Any]:
    """Benchmark the train step of a run.

    Returns:
      {"command": the words of its command, "device", and the COSTS}.
    """
    log.info("measuring the cost of training %s", run.name)
    command = [sys.executable, "-m", "lmim_jax.cli", "bench", "--what=step"] + run.config_flags
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
        raise UserError(f"measuring the cost of {run.name} failed: {lines[-1]}")
    measured = json.loads(result.stdout)
    return {
        "command": records.hide_folders(run.recorded_command, run.changes).splitlines(),
        "device": measured["device"],
        "gflop_per_image": measured["gflop_per_image"],
        "step_images_per_second": measured["images_per_second"],
    }


def finished_folders(runs: Iterable[Run]) -> dict[str, dict[int, buckets.Path]]:
    """{variant: {seed: folder of its results}} of the runs that are finished."""
    folders: dict[str, dict[int, buckets.Path]] = collections.defaultdict(dict)
    for run in runs:
        if run.results is not None:
            folders[run.name][run.seed] = run.results
    return folders


def recorded(config: ConfigDict, kept: buckets.Pathname) -> list[comparison.Compared]:
    """The groups of a study, from its records alone.

    Args:
      config: of the study.
      kept: the folder of its records.
    """
    absent = buckets.path(kept, "none")  # the folder of the study is not needed
    groups, runs = plan(config, [], [], absent, kept)
    costs = known_costs(runs, buckets.path(kept, COST_FILE))
    descriptions = {name: description for name, description, _, _ in config.runs}
    folders = finished_folders(runs)
    found = []
    for group in groups:
        with_baselines = config.get("baselines", False)
        found.append(comparison.compare(group, descriptions, folders, costs, with_baselines))
    return found


class _Publisher:
    """Writes the pages of a study.

    Args:
      out: the folder of the study.
      title: of the page.
      command: that runs the study.
      groups: its groups.
      runs: its runs.
      descriptions: {name: what it is} of its variants.
      baselines: whether tables have rows for raw pixels and the untrained encoders.
      costs: the file with the costs of training, see `known_costs`.
    """

    def __init__(
        self,
        out: buckets.Path,
        title: str,
        command: str,
        groups: Sequence[Group],
        runs: Sequence[Run],
        descriptions: Mapping[str, str],
        baselines: bool,
        costs: buckets.Path,
    ) -> None:
        self._out = out
        self._title = title
        self._command = command
        self._groups = groups
        self._runs = runs
        self._descriptions = descriptions
        self._baselines = baselines
        self._costs = costs

    def publish(self) -> None:
        """Write the pages with the runs that are finished by now."""
        comparison.publish(
            self._out,
            self._title,
            self._command,
            self._groups,
            self._descriptions,
            finished_folders(self._runs),
            known_costs(self._runs, self._costs),
            self._baselines,
        )


def _command_line(given: Any) -> str:
    """The command that was given, without --out and --parallel."""
    recipe = config_flags.get_config_filename(given["config"])
    parts = ["study", f"--config={recipe}"]
    if given.only:
        parts.append(f"--only={','.join(given.only)}")
    for change in given.set:
        parts.append(f"--set={change}")
    return commands.line(*parts)


def _title(given: Any) -> str:
    """The first line of the study's config, which says what is compared, or its name."""
    name = config_flags.get_config_filename(given["config"])
    path = pathlib.Path(name.partition(":")[0])  # without the argument of its get_config
    text = ast.get_docstring(ast.parse(path.read_text())) or f"Study {path.stem}"
    return text.splitlines()[0].rstrip(".")


def main(arguments: list[str]) -> None:
    """Run the command."""
    if arguments:
        raise UserError(f"unknown argument {arguments[0]!r}; flags look like --out=runs/study")
    jax.config.update("jax_platforms", "cpu")  # this process only: accelerators are for the runs
    log_to_console()
    given = flags.FLAGS
    out = buckets.path(given.out)
    kept = buckets.path(given.records) if given.records else None
    groups, runs = plan(given.config, given.only, given.set, out, kept)
    for run in runs:
        run.keep_records()  # of runs that finished without them
    missing = [run for run in runs if not run.finished]
    for run in missing:
        run.check_folder()
    log.info(
        "%d runs, %d of them finished; results in %s/index.html",
        len(runs),
        len(runs) - len(missing),
        out,
    )
    descriptions = {name: description for name, description, _, _ in given.config.runs}
    costs = (kept or out) / COST_FILE
    publisher = _Publisher(
        out,
        _title(given),
        _command_line(given),
        groups,
        runs,
        descriptions,
        given.config.get("baselines", False),
        costs,
    )
    try:
        failed = execute(missing, given.parallel, given.hours, publisher.publish)
        if given.config.cost and not failed:
            publisher.publish()
            measure_costs(runs, costs)
    except KeyboardInterrupt as interrupt:
        publisher.publish()
        fail(
            " ".join(["stopped", *interrupt.args])
            + "; the states of the runs are saved: re-run the command to resume",
            EXIT_STOPPED,
        )
    publisher.publish()
    log.info("\n%s", (out / "table.md").read_text())
    if failed:
        logs = ", ".join(str(run.folder / LOG_FILE) for run in failed)
        fail(f"{len(failed)} runs failed; see {logs}", code=1)


def define_flags() -> None:
    """Define the flags of the command."""
    config_flags.DEFINE_config_file(
        "config",
        None,
        "Config of the study: its name or a file. Examples: --config=study, --config=compare.",
        lock_config=True,
    )
    flags.DEFINE_string("out", "runs/study", "Folder of the study. Example: --out=runs/compare")
    flags.DEFINE_list(
        "only", [], "Titles of groups; all if not given. Example: --only=ladder,ablations"
    )
    flags.DEFINE_integer(
        "parallel",
        1,
        "Runs at once, each on its share of the CPU cores and of the GPU's memory. "
        "Example: --parallel=2",
    )
    flags.DEFINE_float(
        "hours", 0.0, "Stop after so many hours; re-run the command to resume. 0: never."
    )
    flags.DEFINE_string(
        "records",
        "",
        "Folder for the small files of finished runs: commands, versions, metrics, and logs. A run "
        "with records is not trained again. Example: --records=results/benchmark",
    )
    flags.DEFINE_multi_string(
        "set",
        [],
        "KEY=VALUE of the recipe, for all runs; may be given several times. "
        "Example: --set=epochs=10",
    )
