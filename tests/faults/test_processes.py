"""Kills, signals and second writers: real processes. In brackets: by default / with --faults.

Runs are of 30 steps / 120, with a checkpoint every 3.
"""

import functools
import random
import re
import signal
import time

import processes
import pytest

from lmim_jax.train import checkpoint_manifest, checkpoints

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
    """A function of the number of processes: digest of the last state and losses of a whole run."""

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
    """Check that a run has the same losses and the same last state as the uninterrupted one."""
    digest, losses = whole
    assert processes.losses(workdir) == losses
    assert processes.digest(workdir, len(losses)) == digest


def moments(number, last):
    """When to kill: functions (workdir, first step) -> whether it is time.

    In turn before the first save, during a save, and at random steps.
    """

    def immediately(workdir, first):
        return True

    def during_a_save(workdir, first):
        return processes.saving(workdir)

    def after_some_steps(workdir, first, steps):
        return processes.step_of(workdir) >= min(first + steps, last - 1)

    found = []
    for i in range(number):
        if i % 4 == 0:
            found.append(immediately)
        elif i % 4 == 1:
            found.append(during_a_save)
        else:
            steps = random.randrange(1, last // 5)
            found.append(functools.partial(after_some_steps, steps=steps))
    return found


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
    """[1 run / 10 with one process and 10 with two]

    SIGTERM and SIGUSR1 in turn, to one of the processes.
    """
    if (repetition or number > 1) and not full:
        pytest.skip("more of the same; ./launch/test.sh --faults")
    running = processes.start(images, tmp_path, *flags, SELDOM, processes=number)
    moment = random.randrange(1, last // 2)
    processes.wait_for(lambda: processes.step_of(tmp_path) >= moment, running)
    began = time.monotonic()
    random.choice(running).send_signal((signal.SIGTERM, signal.SIGUSR1)[repetition % 2])
    ended = processes.finish(running)
    limit = 30 if full else 120  # by default, other tests run beside this one
    assert time.monotonic() - began < limit, ended
    assert [code for code, _ in ended] == [75] * number, ended
    (step,) = {int(re.search(r"stopped after step (\d+)", output)[1]) for _, output in ended}
    assert moment <= step < last
    assert list(checkpoints.steps(tmp_path)) == [step]
    assert checkpoint_manifest.verify(checkpoints.steps(tmp_path)[step]).state == "good"
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
    process.output()  # returns when the last process that holds the pipe has ended


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


BUCKET_RUN = "gs://bkt/run"
RARELY = "--config.checkpoint_every=10"


def stored_steps(bucket):
    """{step: whether it is committed} of the run in the bucket, without a request."""
    names = bucket.names("bkt", "run/checkpoints/")
    found = {}
    for name in names:
        step = name.split("/")[2]
        if step.isdigit():
            found[int(step)] = f"run/checkpoints/{step}/manifest.json" in names
    return found


def newest(bucket):
    """The newest committed step of the run in the bucket, 0 before the first."""
    return max((step for step, committed in stored_steps(bucket).items() if committed), default=0)


@pytest.mark.parametrize("part", range(2))
def test_kill_9_of_a_run_in_a_bucket_changes_no_bit(images, whole, bucket, part, full, last, flags):
    """[none / 2 runs killed 10 times each]"""
    if not full:
        pytest.skip("a bucket needs twice the time; ./launch/test.sh --faults")
    kills = 0
    for i in range(10):
        first = newest(bucket)
        if first >= last - 10:
            break
        (process,) = running = processes.start(images, BUCKET_RUN, *flags, RARELY)
        until = first + 10 * random.randrange(1, 3)
        conditions = (
            lambda: True,
            lambda: not all(stored_steps(bucket).values()),
            lambda until=until: newest(bucket) >= min(until, last - 10),
        )
        before = bucket.objects["bkt"].get("run/lock")
        processes.wait_for(
            lambda before=before: bucket.objects["bkt"].get("run/lock") != before, running
        )
        processes.wait_for(conditions[i % 3], running)
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=20)
        kills += 1
    ((code, output),) = processes.finish(processes.start(images, BUCKET_RUN, *flags, RARELY))
    assert code == 0, output
    assert kills >= 3
    print(f"killed {kills} times")  # shown by -rP
    equals(whole(1), BUCKET_RUN)


@pytest.mark.parametrize("number", (1, 2))
@pytest.mark.parametrize("repetition", range(2))
def test_a_signal_saves_one_good_step_in_a_bucket(
    images, whole, bucket, number, repetition, full, last, flags
):
    """[none / 2 with one process and 2 with two, SIGTERM to either]"""
    if not full:
        pytest.skip("a bucket needs twice the time; ./launch/test.sh --faults")
    running = processes.start(images, BUCKET_RUN, *flags, RARELY, processes=number)
    processes.wait_for(lambda: newest(bucket) >= 10, running)
    running[repetition % number].send_signal(signal.SIGTERM)
    ended = processes.finish(running)
    assert [code for code, _ in ended] == [75] * number, ended
    (step,) = {int(re.search(r"stopped after step (\d+)", output)[1]) for _, output in ended}
    assert newest(bucket) == step < last
    assert checkpoint_manifest.verify(checkpoints.steps(BUCKET_RUN)[step]).state == "good"
    for code, output in processes.finish(
        processes.start(images, BUCKET_RUN, *flags, RARELY, processes=number)
    ):
        assert code == 0, output
    equals(whole(number), BUCKET_RUN)


def test_two_writers_of_a_bucket_and_a_stolen_lock(images, bucket, full):
    """[none / once]"""
    if not full:
        pytest.skip("a bucket needs twice the time; ./launch/test.sh --faults")
    forever = "--config.epochs=1000"
    (first,) = running = processes.start(images, BUCKET_RUN, forever, RARELY)
    processes.wait_for(lambda: newest(bucket) >= 10, running)
    ((code, output),) = processes.finish(processes.start(images, BUCKET_RUN, forever, RARELY))
    assert code == 2
    assert f"pid {first.pid}, since 20" in output.splitlines()[-1]
    first.send_signal(signal.SIGKILL)
    first.wait()
    running = processes.start(images, BUCKET_RUN, forever, RARELY)
    before = newest(bucket)
    processes.wait_for(lambda: newest(bucket) > before, running)
    bucket.write("bkt", "run/lock", b'{"host": "h", "pid": 1, "start": 1, "since": "now"}\n1\n')
    ((code, output),) = processes.finish(running)
    assert code == 1
    assert "was taken over by another run" in output.splitlines()[-1]
    assert newest(bucket) >= before
