"""Train many variants of a recipe, over seeds, and put them side by side.

    lmim study --config=configs/study.py --out=runs/study [--only=ladder] [--parallel=2]
                                   [--set=KEY=VALUE ...]

A study's config has `seeds`, `runs` (name, what it is, recipe, changes to the recipe), `groups` (title, what a row is
compared with, names of runs) and `cost` (whether to measure what training costs). Every run is a process of main.py in
OUT/NAME/seedS, with its own log; the same command goes on where it stopped. After every run there are OUT/index.html,
OUT/table.md and OUT/results.json.
"""

import collections
import dataclasses
import json
import logging
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
from absl import flags
from ml_collections import config_flags

from lmim_jax.report import comparison
from lmim_jax.utils import atomic_io
from lmim_jax.utils.errors import UserError, fail
from lmim_jax.utils.logging import duration, log_to_console

log = logging.getLogger("lmim_jax.cli.study")

RECIPES: dict[str, str | None] = {"config": "study"}


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run of a study."""

    name: str
    seed: int
    recipe: str
    changes: tuple[str, ...]
    folder: pathlib.Path

    @property
    def command(self):
        """Arguments of main.py."""
        changes = [f"--config.{change}" for change in (*self.changes, f"seed={self.seed}")]
        return [
            "main.py",
            f"--config={self.recipe}",
            *changes,
            f"--workdir={self.folder.absolute()}",
        ]

    @property
    def finished(self):
        """Whether this very command has been run to its end."""
        noted = self.folder / "command.txt"
        return (
            (self.folder / "summary.json").exists()
            and noted.exists()
            and noted.read_text() == self._noted
        )

    @property
    def _noted(self):
        return "\n".join(
            ["python", *self.command[:-1], ""]
        )  # without the folder: a study may be moved

    def start(self, cores, share):
        """Start it on some CPU cores, with a share of an accelerator's memory; its process."""
        self.folder.mkdir(parents=True, exist_ok=True)
        atomic_io.write(self.folder / "command.txt", self._noted)
        # seeds share compiled programs
        environment = {
            "JAX_COMPILATION_CACHE_DIR": str(self.folder.parents[1].absolute() / "compiled"),
            **os.environ,
        }
        if share < 1:
            environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.9 * share:.3f}"
        mine = os.sched_getaffinity(0)
        os.sched_setaffinity(0, cores)  # which the child inherits
        try:
            with (self.folder / "log.txt").open("ab") as output:
                to = dict(stdout=output, stderr=subprocess.STDOUT)
                return subprocess.Popen(
                    [sys.executable, "-m", "lmim_jax.cli", "train", *self.command[1:]],
                    env=environment,
                    **to,
                )
        finally:
            os.sched_setaffinity(0, mine)

    def last_words(self):
        """Why it failed: the last line of its log that names an error, or just the last."""
        lines = (self.folder / "log.txt").read_text(errors="replace").strip().splitlines() or [
            "no output"
        ]
        return next(
            (
                line
                for line in reversed(lines)
                if re.match(r"[\w.]*(error|exception|killed)\b", line, re.I)
            ),
            lines[-1],
        )


def plan(config, only, changes, out):
    """(groups, runs) of a study.

    Args:
      config: see above. only: titles of groups; empty: all. changes: of all runs. out: the study's folder.

    Raises:
      UserError: no such group.
    """
    titles = [title for title, *_ in config.groups]
    if unknown := sorted(set(only) - set(titles)):
        raise UserError(f"--only={unknown[0]}: no such group; there are: {', '.join(titles)}")
    groups = [group for group in config.groups if not only or group[0] in only]
    wanted = {name for *_, names in groups for name in names}
    folder = lambda name: pathlib.Path(out, re.sub(r"[^\w.=+-]", "_", name))
    runs = [
        Run(name, seed, recipe, (*run_changes, *changes), folder(name) / f"seed{seed}")
        for seed in config.seeds
        for name, _, recipe, run_changes in config.runs
        if name in wanted
    ]
    return groups, runs


def execute(runs, parallel, done):
    """Train `runs`, `parallel` at once, each on its share of the CPU cores; `done(run)` after each.

    Returns:
      The runs that failed. An interrupt or SIGTERM stops them all (their states are saved) and is raised again.
    """
    cores = sorted(os.sched_getaffinity(0))
    if not 1 <= parallel <= len(cores):
        raise UserError(f"--parallel={parallel} must be 1 .. {len(cores)}, the number of CPU cores")
    queue, running, failed = collections.deque(runs), {}, []
    free, began, count = list(range(parallel)), time.perf_counter(), 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while queue or running:
            while queue and free:
                slot, run = free.pop(), queue.popleft()
                running[slot] = (
                    run,
                    run.start(cores[slot::parallel], 1 / parallel),
                    time.perf_counter(),
                )
            time.sleep(0.3)
            for slot, (run, process, since) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[slot]
                free.append(slot)
                count += 1
                left = (time.perf_counter() - began) / count * (len(runs) - count)
                if process.returncode:
                    failed.append(run)
                    log.error("%s, seed %d FAILED: %s", run.name, run.seed, run.last_words())
                    continue
                words = (
                    run.name,
                    run.seed,
                    duration(time.perf_counter() - since),
                    comparison.line(run.folder),
                )
                log.info(
                    "[%d/%d, ETA %s]  %s, seed %d (%s): %s",
                    count,
                    len(runs),
                    duration(left),
                    *words,
                )
                done(run)
    except KeyboardInterrupt:
        for _, process, _ in running.values():
            process.terminate()
        for _, process, _ in running.values():
            process.wait()
        raise
    return failed


def costs(runs, out):
    """What training costs, measured run by run with nothing beside it, and kept in OUT/cost.json.

    Returns:
      {name: {"gflop_per_image": [x], "step_images_per_second": [y]}}.
    """
    path = out / "cost.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    for run in {run.name: run for run in reversed(runs)}.values():  # one seed of each
        if run.name in known:
            continue
        log.info("measuring what training %s costs", run.name)
        bench = [sys.executable, "-m", "lmim_jax.cli", "bench", "--what=step", *run.command[1:-1]]
        result = subprocess.run(bench, capture_output=True, text=True)
        if result.returncode:
            raise UserError(
                f"measuring {run.name} failed: {result.stderr.strip().splitlines()[-1]}"
            )
        found = json.loads(result.stdout)
        known[run.name] = {"gflop_per_image": [found["gflop_per_image"]]}
        known[run.name]["step_images_per_second"] = [found["images_per_second"]]
        atomic_io.write(path, json.dumps(known, indent=2) + "\n")
    return known


def main(arguments):
    """Run the command."""
    jax.config.update("jax_platforms", "cpu")  # this process only: accelerators are for the runs
    log_to_console()
    flag, out = flags.FLAGS, pathlib.Path(flags.FLAGS.out)
    recipe = config_flags.get_config_filename(flag["config"])
    groups, runs = plan(flag.config, flag.only, flag.set, out)
    missing = [run for run in runs if not run.finished]
    log.info(
        "%d runs, %d of them finished; results in %s/index.html",
        len(runs),
        len(runs) - len(missing),
        out,
    )

    def publish(_=None, cost=None):
        described = {name: what for name, what, *_ in flag.config.runs}
        folders = collections.defaultdict(dict)
        for run in runs:
            if run.finished:
                folders[run.name][run.seed] = run.folder
        only = [f"--only={','.join(flag.only)}"] if flag.only else []
        command_line = " ".join(
            [f"--config={recipe}", *only, *(f"--set={change}" for change in flag.set)]
        )
        comparison.publish(
            out,
            f"lmim study {command_line}",
            groups,
            described,
            folders,
            cost or {},
        )

    try:
        failed = execute(missing, flag.parallel, publish)
    except KeyboardInterrupt:
        fail("stopped; the states of the runs are saved, run the same command again to go on", 75)
    publish(cost=costs(runs, out) if flag.config.cost and not failed else None)
    log.info("\n%s", (out / "table.md").read_text())
    if failed:
        fail(
            f"{len(failed)} runs failed; their logs are {', '.join(str(run.folder / 'log.txt') for run in failed)}",
            1,
        )


def define_flags():
    """Define the flags of the command."""
    config_flags.DEFINE_config_file(
        "config", None, "Study; default: configs/study.py.", lock_config=True
    )
    flags.DEFINE_string("out", "runs/study", "Folder of the study.")
    flags.DEFINE_list("only", [], "Titles of groups; default: all.")
    flags.DEFINE_integer(
        "parallel", 1, "Runs at once, each on its share of the CPU cores and of the GPU's memory."
    )
    flags.DEFINE_multi_string(
        "set", [], "KEY=VALUE of the recipe, for all runs; may be given several times."
    )
