"""Several processes: equal to one, alike or refused, ended together, resumed as others. Real processes."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import processes
import pytest

STEPS = 20
FLAGS = (
    f"--config.total_steps={STEPS}",
    "--config.checkpoint_every=1000",
    "--heartbeat=300",
)  # on a busy machine
RESTORE = "tests/faults/restore.py"
CUT = "--config.mesh.fsdp=-1", "--config.mesh.data=1", "--config.mesh.min_size=64"


def run(images, workdir, *flags, **how):
    """A finished run: its losses."""
    for code, output in processes.finish(processes.start(images, workdir, *flags, **how)):
        assert code == 0, output
    return processes.losses(workdir)


def close(one, other, same_rows):
    """Equal but for rounding.

    same_rows: a device has as many rows in both, so that its crops are the same to the bit. Where it has not, a pixel
    of a crop now and then falls to the other side of a level, which shows in the loss of that step.
    """
    assert one.keys() == other.keys()
    off = np.array([abs(one[step] / other[step] - 1) for step in one])
    print(
        f"largest relative difference of a loss {off.max():.1e}, median {np.median(off):.1e}"
    )  # shown by -rP
    assert np.sort(off)[-1 if same_rows else -3] < 1e-5, off
    assert off.max() < 1e-4, off


@pytest.mark.parametrize("cut", [CUT, ()], ids=["cut", "copies"])
def test_two_processes_train_as_one_does(images, tmp_path, cut, full):
    """[state cut over both, without evaluators / also a copy in each, with both evaluators at the end]"""
    if not cut and not full:
        pytest.skip("more of the same; ./launch/test.sh --faults")
    flags = (
        FLAGS
        if full
        else (
            *FLAGS,
            *(f"--config.evaluators.{name}.every=1000" for name in ("knn", "visualization")),
        )
    )
    one = run(images, tmp_path / "one", *flags, devices=2)
    two = run(images, tmp_path / "two", *flags, *cut, processes=2)
    assert len(one) == STEPS
    close(one, two, same_rows=True)
    if not full:
        return
    last = [
        [line for line in processes.lines(tmp_path / name) if "knn/nn1" in line][-1]
        for name in ("one", "two")
    ]
    assert last[0]["knn/nn1"] == pytest.approx(
        last[1]["knn/nn1"], abs=15
    )  # of 16 images, one or two may change side


def test_a_process_that_was_started_otherwise_is_named(images, tmp_path):
    other = ["--config.seed=1", "--config.log_every=3"]
    running = processes.start(images, tmp_path, *FLAGS, processes=2, different=[[], other])
    for code, output in processes.finish(running):
        assert code == 2, output
        assert re.search(
            r"error: process 1 \(host .*\) differs from process 0 .*config.log_every is 3, not 1",
            output,
        )
        assert "config.seed is 1, not 0" in output
    assert not (tmp_path / "config.json").exists()


BARRIERS = """
import sys
from lmim_jax.distributed import multihost
me = int(sys.argv[2])
multihost.initialize(sys.argv[1], 2, me, 10)
multihost.barrier("save/1/folder", "failed/1", 60)
if me == 1:
    multihost.abort("failed/1", "disk full")
else:
    try:
        multihost.barrier("save/1/written", "failed/1", 60)
    except OSError as error:
        print("failed:", error)
multihost.barrier("save/2/folder", "failed/2", 60)
if me == 0:
    try:
        multihost.barrier("save/2/written", "failed/2", 1)
    except TimeoutError as error:
        print("failed:", error)
print("all:", multihost.gather_json({"me": me}))
"""


def test_processes_wait_for_each_other_and_learn_who_failed():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = {**os.environ, "PYTHONPATH": str(processes.ROOT), "JAX_PLATFORMS": "cpu"}
    both = [
        processes.Process([sys.executable, "-c", BARRIERS, address, str(me)], env=environment)
        for me in (0, 1)
    ]
    ended = processes.finish(both)
    assert [code for code, _ in ended] == [0, 0], ended
    assert re.search(
        r"failed: process 1: .*: disk full\nfailed: not all processes reached save/2/written",
        ended[0][1],
    )
    assert all("all: [{'me': 0}, {'me': 1}]" in output for _, output in ended)


@pytest.mark.parametrize("victim", [1, 0])
def test_a_lost_process_ends_the_run_and_is_named(images, tmp_path, victim, full):
    """[process 1 / also process 0, which the others are connected to]"""
    if not victim and not full:
        pytest.skip("more of the same; ./launch/test.sh --faults")
    launcher = [str(processes.ROOT / "launch" / "processes.sh"), "2"]
    (launched,) = running = processes.start(
        images, tmp_path, "--config.epochs=1000", "--heartbeat=10", processes=2, launcher=launcher
    )
    processes.wait_for(lambda: processes.step_of(tmp_path) >= 3, running)
    children = subprocess.run(
        ["pgrep", "-P", str(launched.pid), "-f", "main.py"], capture_output=True, text=True
    )
    pids = [int(pid) for pid in children.stdout.split()]
    commands = {pid: pathlib.Path(f"/proc/{pid}/cmdline").read_text() for pid in pids}
    (pid,) = [pid for pid, command in commands.items() if f"--process_id={victim}" in command]
    began = time.monotonic()
    subprocess.run(["kill", "-9", str(pid)], check=True)
    ((code, output),) = processes.finish(running)
    seconds = time.monotonic() - began
    print(f"process {victim} killed: the run ended after {seconds:.0f} s")  # shown by -rP
    assert code == 137, output
    assert f"process {victim} (pid {pid}) was killed by signal 9 (KILL)" in output
    assert re.search(
        rf"process {1 - victim} \(pid \d+\) (was killed by signal|ended with exit code)", output
    )
    assert seconds < 60


TOPOLOGIES = [  # (processes, devices of each, flags of the mesh)
    (2, 4, ["--config.mesh.fsdp=4", "--config.mesh.min_size=64"]),
    (1, 2, []),
    (2, 1, CUT),
]


def test_a_run_goes_on_with_other_processes_and_devices(images, tmp_path, full):
    """[only with --faults] 2 x 4 devices, cut in 4; then 1 x 2, whole; then 2 x 1, cut in 2; against 1 x 1."""
    if not full:
        pytest.skip("five runs; ./launch/test.sh --faults")
    expected = run(images, tmp_path / "one", *FLAGS)
    workdir, step = tmp_path / "moved", 0
    for number, devices, mesh in TOPOLOGIES:
        topology = dict(processes=number, devices=devices)
        if step:  # loaded on these devices, the state is the saved one, bit by bit
            loaded = processes.finish(
                processes.start(images, workdir, *FLAGS, *mesh, **topology, program=RESTORE)
            )
            assert [code for code, _ in loaded] == [0] * number, loaded
            assert f"step {step} {processes.digest(workdir, step)}" in loaded[0][1]
        running = processes.start(images, workdir, *FLAGS, *mesh, **topology)
        if (number, devices) != TOPOLOGIES[-1][:2]:
            processes.wait_for(lambda step=step: processes.step_of(workdir) >= step + 3, running)
            running[0].send_signal(signal.SIGTERM)
        ended = processes.finish(running)
        assert {code for code, _ in ended} == {
            75 if (number, devices) != TOPOLOGIES[-1][:2] else 0
        }, ended
        *_, step = processes.checkpoint.steps(workdir)
    assert step == STEPS
    close(
        expected, processes.losses(workdir), same_rows=False
    )  # so the data came in the same order, too


def test_a_save_that_fails_on_one_process_fails_on_all_and_is_tried_again(images, tmp_path, full):
    """[only with --faults] Process 1 may write no more files for a while: the others are told, and nobody hangs."""
    if not full:
        pytest.skip("a minute; ./launch/test.sh --faults")
    flags = "--config.epochs=1000", "--config.checkpoint_max_failures=1000", "--heartbeat=300", *CUT
    running = processes.start(images, tmp_path, *flags, processes=2)
    saved = lambda: max(processes.checkpoint.steps(tmp_path), default=0)
    processes.wait_for(lambda: saved() >= 3, running)
    limit = lambda size: subprocess.run(
        ["prlimit", "--pid", str(running[1].pid), f"--fsize={size}:"], check=True
    )
    limit(100)
    first = processes.step_of(tmp_path)
    processes.wait_for(lambda: processes.step_of(tmp_path) >= first + 12, running)
    limit("unlimited")
    recovered = processes.step_of(tmp_path)
    good = lambda path: processes.manifest.verify(path).state == "good"
    steps = lambda: processes.checkpoint.steps(tmp_path).items()
    processes.wait_for(
        lambda: any(good(path) for step, path in steps() if step > recovered + 3), running
    )
    running[0].send_signal(signal.SIGTERM)
    ended = processes.finish(running)
    assert [code for code, _ in ended] == [75, 75], ended
    assert re.search(r"SAVING STEP \d+ FAILED \(1 of 1000 .*: process 1: ", ended[0][1])
    assert "SAVING STEP" in ended[1][1]


def test_two_processes_evaluate_as_one_does(images, tmp_path, full):
    """[only with --faults] The same figures; features are written by the first process, and read by both."""
    if not full:
        pytest.skip("four processes; ./launch/test.sh --faults")
    run(images, tmp_path, *FLAGS)
    script = [str(processes.ROOT / "launch" / "processes.sh"), "2"]
    tool = [
        sys.executable,
        "-m",
        "lmim_jax.cli",
        "evaluate",
        f"--workdir={tmp_path}",
        "--evaluators=knn,logistic_regression",
    ]
    tool += ["--config.knn.batch_size=16", "--config.logistic_regression.batch_size=16"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    figures, cache = [], tmp_path / "evaluations" / "cache"
    for name, launcher in (("two", script), ("again", script), ("one", [])):
        command = [*launcher, *tool, f"--out={tmp_path / name}.json"]
        told = subprocess.run(
            command, cwd=processes.ROOT, env=environment, capture_output=True, text=True
        )
        assert told.returncode == 0, told.stdout + told.stderr
        figures.append(json.loads((tmp_path / f"{name}.json").read_text())["figures"])
        assert len(list(cache.iterdir())) == 2
        assert ("knn/nn1" in told.stdout) and told.stdout.count("knn/nn1") == 1
        reads = (told.stderr + told.stdout).count(f"from {cache}")
        assert reads == (
            2 if name == "two" else 4
        )  # of two splits, by the second evaluator; by both
    assert figures[0] == figures[1] == figures[2]
