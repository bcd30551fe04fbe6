"""Runs under launch/restart.py: killed ones go on by themselves, those that get nowhere give up.

In brackets: by default / with --faults.
"""

import errno
import json
import os
import pathlib
import re
import signal
import sys

import processes
import pytest
import soak

from lmim_jax.train import restarts

RESTART = str(processes.ROOT / "launch" / "restart.py")


def launcher(limit, fault_file):
    """The start of a command that restarts, with image files that FAULT_FILE makes faulty."""
    path = f"{processes.ROOT}/tests/faults/inject:{processes.ROOT}:{processes.ROOT}/tests"
    variables = [f"PYTHONPATH={path}", f"FAULT_FILE={fault_file}", "RESTART_PAUSE=0.1"]
    return ["env", *variables, sys.executable, RESTART, str(limit)]


def child(process):
    """The process that a restarter has started, or None."""
    try:
        listed = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    except FileNotFoundError:
        return None
    return int(listed.split()[0]) if listed.split() else None


def test_a_killed_run_goes_on_by_itself(images, tmp_path, full):
    """[- / killed twice; the same bits]"""
    if not full:
        pytest.skip("three starts; ./launch/test.sh --faults")
    flags = ("--config.total_steps=12", "--config.checkpoint_every=2")
    whole = tmp_path / "whole"
    ((code, output),) = processes.finish(processes.start(images, whole, *flags))
    assert code == 0, output
    workdir = tmp_path / "run"
    running = processes.start(images, workdir, *flags, launcher=launcher(1, tmp_path / "fault"))
    for step in (4, 8):
        processes.wait_for(lambda step=step: processes.step_of(workdir) >= step, running)
        os.kill(child(running[0]), signal.SIGKILL)
    ((code, output),) = processes.finish(running)
    assert code == 0, output
    assert "the run was killed by signal 9 (SIGKILL); restart 2 in" in output
    assert re.search(r"restart 2 by the launcher at step \d+, 1 of 1 without progress", output)
    assert [record["restart"] for record in restarts.read(workdir)] == [1, 2]
    assert processes.digest(workdir, 12) == processes.digest(whole, 12)
    assert processes.losses(workdir) == processes.losses(whole)


def test_a_run_that_gets_nowhere_gives_up(images, tmp_path, full):
    """[- / no image can be read any more]"""
    if not full:
        pytest.skip("four starts; ./launch/test.sh --faults")
    flags = ("--config.total_steps=1000", "--config.data.timeout=2", "--config.checkpoint_every=2")
    fault = tmp_path / "fault"
    running = processes.start(images, tmp_path / "run", *flags, launcher=launcher(2, fault))
    processes.wait_for(lambda: processes.step_of(tmp_path / "run") >= 3, running)
    fault.write_text(f"errno {errno.EIO}")
    ((code, output),) = processes.finish(running)
    assert code == 2, output
    *_, last = output.splitlines()
    assert re.search(r"error: .* no checkpoint after step \d+, after 2 restart", last), output
    assert [record["restart"] for record in restarts.read(tmp_path / "run")] == [1, 2]


def test_ten_minutes_of_faults(tmp_path, full):
    """[- / a fault every half minute for ten minutes; see soak.py]"""
    if not full:
        pytest.skip("ten minutes and more; ./launch/test.sh --faults")
    report = soak.soak(tmp_path, minutes=10, every=30, seed=0)
    print(json.dumps(report, indent=1))
    assert soak.problems(report) == []
