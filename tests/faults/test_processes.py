"""Kills, signals and rivals: real processes. Numbers in brackets: by default / with --faults.

Runs are of 30 steps / 120, with a checkpoint every 3.
"""

import functools
import random
import re
import signal
import time

import processes
import pytest

SELDOM = "--config.checkpoint_every=1000"  # at the end


@pytest.fixture(scope="module")
def last(full):
    """The last step of a run."""
    return 120 if full else 30


@pytest.fixture(scope="module")
def flags(last):
    """Of every run."""
    return f"--config.epochs={last // 6}", "--config.checkpoint_keep=100"


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory, last, flags):
    """The digest of the last state, and the losses, of an uninterrupted run of so many processes: a function."""

    @functools.cache
    def run(number):
        workdir = tmp_path_factory.mktemp("whole")
        for code, output in processes.finish(
            processes.start(images, workdir, *flags, SELDOM, processes=number)
        ):
            assert code == 0, output
        losses = processes.losses(workdir)
        assert len(losses) == last
        return processes.digest(workdir, last), losses

    return run


def equals(whole, workdir):
    """Assert that a run has ended in the same state, by the same losses, as the uninterrupted one."""
    digest, losses = whole
    assert processes.losses(workdir) == losses
    assert processes.digest(workdir, len(losses)) == digest


def moments(number, last):
    """When to kill, given the folder of a run: before the first save, inside a save, or at a random step."""
    before = lambda workdir, first: True
    inside = lambda workdir, first: processes.saving(workdir)
    ahead = lambda steps: (
        lambda workdir, first: processes.step_of(workdir) >= min(first + steps, last - 1)
    )
    some = lambda: random.randrange(1, last // 5)
    return [(before, inside, ahead(some()), ahead(some()))[i % 4] for i in range(number)]


@pytest.mark.parametrize("part", range(5))
def test_kill_9_at_any_moment_changes_no_bit(images, whole, tmp_path, part, full, last, flags):
    """[1 run killed 3 times / 5 runs killed 10 times each]"""
    if part and not full:
        pytest.skip("more of the same; ./launch/test.sh --faults")
    kills = 0
    for now in moments(10 if full else 3, last):
        (process,) = running = processes.start(
            images, tmp_path, *flags, f"--config.data.workers={int(kills % 3 == 2)}"
        )
        first = processes.step_of(tmp_path)
        if first >= last - 2:
            processes.finish(running)
            break
        processes.wait_for(
            lambda now=now, first=first: (tmp_path / "lock").exists() and now(tmp_path, first),
            running,
        )
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=20)
        kills += 1
    ((code, output),) = processes.finish(processes.start(images, tmp_path, *flags))
    assert code == 0, output
    assert kills >= 3
    print(f"killed {kills} times")  # shown by -rP
    equals(whole(1), tmp_path)


@pytest.mark.parametrize("number", (1, 2))
@pytest.mark.parametrize("repetition", range(10))
def test_a_signal_saves_the_step_and_exits_with_75(
    images, whole, tmp_path, number, repetition, full, last, flags
):
    """[1 + 1 runs / 10 with one process and 10 with two]; SIGTERM and SIGUSR1 in turn, to one of the processes.

    [Two processes go on after it only with --faults]
    """
    if repetition and not full:
        pytest.skip("more of the same; ./launch/test.sh --faults")
    running = processes.start(images, tmp_path, *flags, SELDOM, processes=number)
    moment = random.randrange(1, last // 2)
    processes.wait_for(lambda: processes.step_of(tmp_path) >= moment, running)
    began = time.monotonic()
    random.choice(running).send_signal((signal.SIGTERM, signal.SIGUSR1)[repetition % 2])
    ended = processes.finish(running)
    assert time.monotonic() - began < (30 if full else 120), (
        ended
    )  # other tests run beside this one by default
    assert [code for code, _ in ended] == [75] * number, ended
    (step,) = {int(re.search(r"stopped after step (\d+)", output)[1]) for _, output in ended}
    assert moment <= step < last
    assert list(processes.checkpoint.steps(tmp_path)) == [step]
    assert processes.manifest.verify(processes.checkpoint.steps(tmp_path)[step]).state == "good"
    if number > 1 and not full:
        return
    for code, output in processes.finish(
        processes.start(images, tmp_path, *flags, SELDOM, processes=number)
    ):
        assert code == 0, output
        assert number > 1 or f"resuming after step {step} " in output
    equals(whole(number), tmp_path)


def test_no_worker_outlives_a_killed_run(images, tmp_path):
    (process,) = running = processes.start(
        images, tmp_path, "--config.epochs=1000", "--config.data.workers=2"
    )
    processes.wait_for(lambda: processes.step_of(tmp_path) >= 1, running)
    process.send_signal(signal.SIGKILL)
    process.told()  # ends when the last process that holds the pipe is gone


def test_a_second_writer_is_refused_and_a_dead_ones_lock_taken_over(images, tmp_path):
    (first,) = running = processes.start(images, tmp_path, "--config.epochs=1000")
    processes.wait_for(lambda: processes.step_of(tmp_path) >= 3, running)
    ((code, output),) = processes.finish(processes.start(images, tmp_path, "--config.epochs=1000"))
    assert code == 2
    assert f"pid {first.pid}, since 20" in output.splitlines()[-1]
    first.send_signal(signal.SIGKILL)
    first.wait()
    (third,) = running = processes.start(images, tmp_path, "--config.epochs=1000")
    before = processes.step_of(tmp_path)
    processes.wait_for(lambda: processes.step_of(tmp_path) > before, running)
    third.send_signal(signal.SIGTERM)
    ((code, output),) = processes.finish(running)
    assert code == 75
    assert "taking over" in output
    assert not (tmp_path / "lock").exists()
