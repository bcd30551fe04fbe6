"""The environment at fault, and runs that are told to stop: real processes and limits.

In brackets: by default / with --faults.
"""

import errno
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import processes
import pytest
from PIL import Image

from lmim_jax.data.prepare import tfds_writer
from lmim_jax.train import checkpoint_manifest, checkpoints

INJECT = processes.ROOT / "tests" / "faults" / "inject"
LENGTH = ("--config.total_steps=30", "--config.checkpoint_every=1000")
NOT_EVALUATED = (
    "--config.evaluators.knn.every=1000",
    "--config.evaluators.visualization.every=1000",
)


SLOW = "sleep 0.1"  # so that a run is not over before this process comes to look at it


class Injected:
    """Runs whose image files can be made faulty while they train."""

    def __init__(self, folder):
        self._file = folder / "fault"

    def set(self, what):
        """What happens from now on, see inject/sitecustomize.py; "": nothing."""
        other = self._file.with_suffix(".new")
        other.write_text(what)
        other.replace(self._file)

    def start(self, images, workdir, *flags):
        """One process, the leader of its group, as a shell would start it."""
        path = f"{INJECT}:{processes.ROOT}:{processes.ROOT}/tests"
        variables = [f"PYTHONPATH={path}", f"FAULT_FILE={self._file}"]
        launcher = ["setsid", "env", *variables]
        (process,) = processes.start(images, workdir, *LENGTH, *flags, launcher=launcher)
        return process


@pytest.fixture
def injected(tmp_path):
    return Injected(tmp_path)


@pytest.fixture(scope="module")
def undisturbed(images, tmp_path_factory, full):
    """(digest of the last state, losses) of a whole run."""
    if not full:
        pytest.skip("longer than its use by default; ./launch/test.sh --faults")
    workdir = tmp_path_factory.mktemp("undisturbed")
    ((code, output),) = processes.finish(processes.start(images, workdir, *LENGTH, *NOT_EVALUATED))
    assert code == 0, output
    return processes.digest(workdir, 30), processes.losses(workdir)


def equals(undisturbed, workdir):
    """Whether a run has the last state and the losses of the undisturbed one."""
    return (processes.digest(workdir, 30), processes.losses(workdir)) == undisturbed


def saved_step(workdir):
    """The only step of a run, which is good."""
    ((step, path),) = checkpoints.steps(workdir).items()
    assert checkpoint_manifest.verify(path).state == "good"
    return step


def saving_or_saved(workdir):
    """Whether a save has begun."""
    return bool(checkpoints.steps(workdir))


def spawned(process):
    """The process ids of the workers of a run, oldest first."""
    command = ["pgrep", "-P", str(process.pid), "-f", "spawn_main"]
    found = subprocess.run(command, capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1]


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_to_the_group_spares_the_workers(
    number, images, tmp_path, injected, full, request
):
    """[- / all signals, and resumed] The run waits for its data all the time."""
    workers = (*NOT_EVALUATED, "--config.data.workers=2")
    injected.set(SLOW)
    process = injected.start(images, tmp_path / "run", *workers)
    processes.wait_for(lambda: processes.step_of(tmp_path / "run") >= 3, [process])
    injected.set("sleep 3")
    time.sleep(5)  # until no decoded batch is left
    os.killpg(process.pid, number)
    ((code, output),) = processes.finish([process])
    assert code == 75, output
    assert "died" not in output
    assert f"stopped after step {saved_step(tmp_path / 'run')} of 30" in output
    if not full:
        return
    injected.set("")
    ((code, output),) = processes.finish([injected.start(images, tmp_path / "run", *workers)])
    assert code == 0, output
    assert equals(request.getfixturevalue("undisturbed"), tmp_path / "run")


def test_workers_are_safe_from_signals_from_birth(images, tmp_path, injected, full):
    """[- / signals while the workers still import their libraries]"""
    if not full:
        pytest.skip("more of the same; ./launch/test.sh --faults")
    workers = (*NOT_EVALUATED, "--config.data.workers=2")
    process = injected.start(images, tmp_path / "run", *workers)

    processes.wait_for(lambda: len(spawned(process)) >= 2, [process])
    os.killpg(process.pid, signal.SIGUSR1)
    ((code, output),) = processes.finish([process])
    assert code == 75, output
    assert "died" not in output


def test_a_killed_worker_costs_no_bit(images, tmp_path, injected, undisturbed, full):
    """[- / the run saves and names it; resumed, it ends with the same bits]"""
    if not full:
        pytest.skip("two runs; ./launch/test.sh --faults")
    flags = (*NOT_EVALUATED, "--config.data.workers=2")
    injected.set(SLOW)
    process = injected.start(images, tmp_path / "run", *flags)
    processes.wait_for(lambda: processes.step_of(tmp_path / "run") >= 3, [process])
    victim = spawned(process)[-1]
    os.kill(victim, signal.SIGKILL)
    ((code, output),) = processes.finish([process])
    assert code == 1, output
    assert re.search(rf"error: data worker \d of 2 \(pid {victim}\) died \(.*exit code -9", output)
    step = saved_step(tmp_path / "run")
    assert f"the state of step {step} is saved" in output
    injected.set("")
    ((code, output),) = processes.finish([injected.start(images, tmp_path / "run", *flags)])
    assert code == 0, output
    assert f"resuming after step {step} of 30" in output
    assert equals(undisturbed, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("presses", [1, 2])
def test_interrupts(presses, images, tmp_path, injected):
    """[- / once, twice] The first saves; the second aborts, even where a read hangs."""
    injected.set(SLOW)
    process = injected.start(images, tmp_path / "run", *NOT_EVALUATED, "--config.data.threads=2")
    processes.wait_for(lambda: processes.step_of(tmp_path / "run") >= 3, [process])
    injected.set({1: "sleep 0.2", 2: "sleep 1000"}[presses])
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)
    if presses == 2:
        processes.wait_for(lambda: saving_or_saved(tmp_path / "run"), [process])
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
    ((code, output),) = processes.finish([process])
    if presses == 1:
        assert code == 75, output
        assert f"stopped after step {saved_step(tmp_path / 'run')} of 30" in output
        assert "FAILED" not in output
    else:
        assert time.monotonic() - began < 30, output
        assert code in (75, 130), output  # it had saved already, or not
        assert (code == 130) == ("aborted" in output), output


def test_errors_of_the_storage_are_waited_for(images, tmp_path, injected, undisturbed, full):
    """[- / with two workers; the same bits]"""
    if not full:
        pytest.skip("two runs; ./launch/test.sh --faults")
    injected.set(SLOW)
    process = injected.start(images, tmp_path / "run", *NOT_EVALUATED, "--config.data.workers=2")
    for number in (errno.EIO, errno.EMFILE, errno.ESTALE):
        before = processes.step_of(tmp_path / "run")
        processes.wait_for(
            lambda before=before: processes.step_of(tmp_path / "run") >= before + 3, [process]
        )
        injected.set(f"errno {number}")
        time.sleep(4)
        injected.set(SLOW)
    ((code, output),) = processes.finish([process])
    assert code == 0, output
    assert "bad image" not in output
    assert "Input/output error" in output
    assert equals(undisturbed, tmp_path / "run")


@pytest.mark.parametrize("workers", [0, 2])
def test_storage_that_fails_for_too_long_ends_the_run_by_name_and_saved(
    workers, images, tmp_path, injected, undisturbed, full
):
    """[- / also resumed]"""
    if not full:
        pytest.skip("two runs; ./launch/test.sh --faults")
    flags = (*NOT_EVALUATED, f"--config.data.workers={workers}")
    injected.set(SLOW)
    process = injected.start(images, tmp_path / "run", *flags, "--config.data.timeout=20")
    processes.wait_for(lambda: processes.step_of(tmp_path / "run") >= 3, [process])
    injected.set(f"errno {errno.EIO}")
    ((code, output),) = processes.finish([process])
    assert code == 1, output
    assert re.search(r"error: \S+/train/\S+ could not be read for .*Input/output", output), output
    assert f"the state of step {saved_step(tmp_path / 'run')} is saved" in output
    injected.set("")
    ((code, output),) = processes.finish([injected.start(images, tmp_path / "run", *flags)])
    assert code == 0, output
    assert equals(undisturbed, tmp_path / "run")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pipe_that_stops_is_named_and_the_state_saved(workers, images, tmp_path, full):
    """[- / warned about after 30 s, given up after 40]"""
    if not full:
        pytest.skip("a minute of waiting; ./launch/test.sh --faults")
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(32):
        noise = np.random.default_rng(index).integers(0, 255, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{index}.png")
    flags = ("--config.total_steps=1000000", "--config.checkpoint_every=1000000", *NOT_EVALUATED)
    flags += (f"--config.data.workers={workers}",)
    flags += ("--config.data.timeout=40", "--config.data.threads=2")
    running = processes.start(folder, tmp_path / "run", *flags)
    processes.wait_for(lambda: processes.step_of(tmp_path / "run") >= 3, running)
    (folder / "7.png").unlink()
    os.mkfifo(folder / "7.png")
    ((code, output),) = processes.finish(running)
    assert code == 1, output
    assert re.search(r"no image decoded for 3\d s, being read: .*/7\.png", output), output
    assert re.search(r"error: no image decoded for 40 s: .*/7\.png", output), output
    assert f"the state of step {saved_step(tmp_path / 'run')} is saved" in output


def prepared(folder, count):
    """A dataset of a file per image."""
    images = folder / "images"
    images.mkdir()
    for index in range(count):
        Image.new("RGB", (16, 16), (index % 256, index // 256, 0)).save(images / f"{index:04d}.png")
    script = (
        "import pathlib, sys; "
        "from lmim_jax.cli import prepare_data; from lmim_jax.data.prepare import "
        "tfds_writer; tfds_writer.SHARD_BYTES = 1; prepare_data._run_in_parallel = "
        "lambda task, items, *_: map(task, items);"
        "found = prepare_data.open_splits(pathlib.Path(sys.argv[1]));"
        "prepare_data.convert(found, sys.argv[2], 'many', 0, 1)"
    )
    subprocess.run([sys.executable, "-c", script, images, folder], check=True, cwd=processes.ROOT)
    where = "--config.data.source=tfds", "--config.data.name=many", f"--config.data.dir={folder}"
    return (*where, "--config.data.test_split=")


@pytest.mark.parametrize("which", ["soft", "hard"])
def test_300_files_under_a_limit_of_256(which, tmp_path, full):
    """[- / the hard and the soft limit]"""
    if not full:
        pytest.skip("a dataset of 300 files; ./launch/test.sh --faults")
    assert tfds_writer.SHARD_BYTES == 1 << 30
    dataset = prepared(tmp_path, 300)
    option = {"soft": "-Sn", "hard": "-n"}[which]
    launcher = ["bash", "-c", f'ulimit {option} 256; exec "$@"', "bash"]
    flags = (*dataset, *LENGTH, *NOT_EVALUATED, "--config.data.workers=2")
    running = processes.start("", tmp_path / "run", *flags, launcher=launcher)
    ((code, output),) = processes.finish(running)
    if which == "hard":
        assert code == 2, output
        *_, last = output.splitlines()
        assert re.search(r"error: .*300 files.* only 256 .*ulimit.*lmim prepare", last), output
    else:
        assert code == 0, output
        assert "bad image" not in output


@pytest.mark.parametrize("which", range(2))
def test_an_evaluation_stops_between_batches_on_all_processes(which, images, tmp_path, full):
    """[- / the signal goes to either of two processes]"""
    if not full:
        pytest.skip("more of the same; ./launch/test.sh --faults")
    flags = ("--config.total_steps=6", "--config.checkpoint_every=1000", "--heartbeat=300")
    flags += ("--config.evaluators.visualization.every=1000", "--config.evaluators.knn.every=0.5")
    flags += ("--config.evaluators.knn.batch_size=2",)
    program = str(processes.ROOT / "tests" / "faults" / "slow_evaluation.py")
    running = processes.start(images, tmp_path, *flags, processes=2, program=program)
    mark = tmp_path / "evaluating"
    processes.wait_for(mark.exists, running)
    began = time.monotonic()
    running[which].send_signal(signal.SIGTERM)
    ended = processes.finish(running)
    assert time.monotonic() - began < 30, ended
    assert [code for code, _ in ended] == [75, 75], ended
    assert all("stopped after step 3 of 6" in output for _, output in ended), ended
    assert saved_step(tmp_path) == 3
