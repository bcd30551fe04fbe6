"""Several processes: equal to one, alike or refused, ended together, resumed as others. Real processes."""

import re
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import processes
import pytest

STEPS = 20
FLAGS = f"--config.total_steps={STEPS}", "--config.checkpoint_every=1000"
CUT = "--config.mesh.fsdp=-1", "--config.mesh.data=1", "--config.mesh.min_size=64"


def run(images, workdir, *flags, **how):
    """A finished run: its losses."""
    for code, output in processes.finish(processes.start(images, workdir, *flags, **how)):
        assert code == 0, output
    return processes.losses(workdir)


def close(one, other):
    assert one.keys() == other.keys()
    np.testing.assert_allclose(list(one.values()), list(other.values()), rtol=1e-5)


@pytest.mark.parametrize("cut", [CUT, ()], ids=["cut", "copies"])
def test_two_processes_train_as_one_does(images, tmp_path, cut, full):
    """[state cut over both / also a copy in each]; with both evaluators at the end."""
    if not cut and not full:
        pytest.skip("more of the same; ./launch/test.sh --faults")
    one = run(images, tmp_path / "one", *FLAGS)
    two = run(images, tmp_path / "two", *FLAGS, *cut, processes=2)
    assert len(one) == STEPS
    close(one, two)
    last = [[line for line in processes.lines(tmp_path / name) if "knn/nn1" in line][-1] for name in ("one", "two")]
    assert last[0]["knn/nn1"] == pytest.approx(last[1]["knn/nn1"], abs=15)  # of 16 images, one or two may change side


def test_a_process_that_was_started_otherwise_is_named(images, tmp_path):
    other = ["--config.seed=1", "--config.log_every=3"]
    running = processes.start(images, tmp_path, *FLAGS, processes=2, different=[[], other])
    for code, output in processes.finish(running):
        assert code == 2, output
        assert re.search(r"error: process 1 \(host .*\) differs from process 0 .*config.log_every is 3, not 1", output)
        assert "config.seed is 1, not 0" in output
    assert not (tmp_path / "config.json").exists()


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
    children = subprocess.run(["pgrep", "-P", str(launched.pid), "-f", "main.py"], capture_output=True, text=True)
    pids = [int(pid) for pid in children.stdout.split()]
    commands = {pid: open(f"/proc/{pid}/cmdline").read() for pid in pids}
    (pid,) = [pid for pid, command in commands.items() if f"--process_id={victim}" in command]
    began = time.monotonic()
    subprocess.run(["kill", "-9", str(pid)], check=True)
    output, _ = launched.communicate(timeout=processes.LIMIT)
    seconds = time.monotonic() - began
    print(f"process {victim} killed: the run ended after {seconds:.0f} s")  # shown by -rP
    assert launched.returncode == 137, output
    assert f"process {victim} (pid {pid}) was killed by signal 9 (KILL)" in output
    assert re.search(rf"process {1 - victim} \(pid \d+\) (was killed by signal|ended with exit code)", output)
    assert seconds < 60
