"""Whose lock counts, and the flags passed to XLA."""

import concurrent.futures
import errno
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import time
import types

import pytest
from ml_collections import ConfigDict

from lmim_jax.configs import quickstart
from lmim_jax.train import (
    lock,
    metric_logger,
    metric_storage,
    metric_writer,
    provenance,
    workdir,
)
from lmim_jax.utils import atomic_io
from lmim_jax.utils.errors import UserError

DEAD = {
    "host": "elsewhere",
    "machine": "another boot pid:[1]",
    "pid": 1,
    "start": 12345,
    "since": "2026-01-01T00:00:00+00:00",
    "token": "0",
}


@pytest.fixture
def hurry(monkeypatch):
    """Looks and heartbeats in quick succession."""
    monkeypatch.setattr(lock, "LOOK", 0.02)
    monkeypatch.setattr(lock, "LOOKS", 20)
    monkeypatch.setattr(lock, "HEARTBEAT", 0.02)


def hold(path, **change):
    """Write the lock file of another process of this machine."""
    here = {"machine": lock._machine(), "pid": 1, "start": lock.process_start(1)}
    (path / "lock").write_text(json.dumps(DEAD | here | change) + "\n1\n")


def test_a_lock_is_held_and_released(tmp_path):
    taken = pytest.raises(
        UserError, match=rf"pid {os.getpid()}, since 20.*choose another --workdir"
    )
    with lock.Lock(tmp_path / "run") as held, taken:
        held.confirm()
        lock.Lock(tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(UserError, match=r"run cannot be written: .*File exists"):
        lock.Lock(tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "alive"),
    [
        ({}, True),
        ({"start": 12345}, False),  # another process has this PID now
        ({"pid": 2**22 + 1}, False),
    ],
)
def test_a_holder_of_this_machine_is_judged_by_its_process(tmp_path, change, alive):
    hold(tmp_path, **change)
    if alive:
        with pytest.raises(UserError, match="is being written by another run"):
            lock.Lock(tmp_path)
    else:
        lock.Lock(tmp_path).release()
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [json.dumps(DEAD) + "\n1\n", "cut o", ""])
def test_a_lock_that_does_not_change_is_taken_over(tmp_path, hurry, caplog, content):
    (tmp_path / "lock").write_text(content)
    now = time.time() + 1000  # an age says nothing
    os.utime(tmp_path / "lock", (now, now))
    lock.Lock(tmp_path).release()
    assert "taking over" in caplog.text
    assert not list(tmp_path.iterdir())


def elsewhere(monkeypatch, machine):
    """Let locks that are made from now on look like those of another machine."""
    monkeypatch.setattr(lock, "_machine", lambda: machine)


@pytest.mark.parametrize("machine", ["another boot pid:[1]", None])
def test_a_live_holder_elsewhere_is_found_whatever_the_clock_of_the_files(
    tmp_path, hurry, monkeypatch, machine
):
    elsewhere(monkeypatch, machine)
    flush = lock._flush

    def flush_behind(file, content):
        flush(file, content)
        os.utime(file.fileno(), (time.time() - 130, time.time() - 130))

    monkeypatch.setattr(lock, "_flush", flush_behind)
    with lock.Lock(tmp_path) as held:
        monkeypatch.undo()
        monkeypatch.setattr(lock, "LOOK", 0.05)
        with pytest.raises(UserError, match="is being written by another run"):
            lock.Lock(tmp_path)
        held.confirm()


HOLD = """
import sys
from lmim_jax.train import lock
lock.HEARTBEAT = 0.1
with lock.Lock(sys.argv[1]):
    print("held", lock._machine(), flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("own_proc", [True, False])
def test_a_holder_in_another_pid_namespace_is_not_taken_for_dead(tmp_path, hurry, own_proc):
    """Its PID is that of another process here, and its host and boot are the same."""
    command = ["unshare", "--pid", "--fork"]
    if os.geteuid():
        command.append("--map-root-user")
    if own_proc:
        command.append("--mount-proc")
    if not shutil.which("unshare") or subprocess.run([*command, "true"]).returncode:
        pytest.skip("PID namespaces are not allowed here, or there is no unshare (util-linux)")
    command += [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        seen = holder.stdout.readline().split()
        assert seen[0] == "held"
        assert seen[1:] != lock._machine().split()
        with pytest.raises(UserError, match="is being written by another run"):
            lock.Lock(tmp_path)
        holder.communicate("")
    assert holder.returncode == 0
    lock.Lock(tmp_path).release()


def test_hard_links_are_not_needed(tmp_path, monkeypatch):
    def refuse(*paths, **options):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with lock.Lock(tmp_path), pytest.raises(UserError, match="is being written"):
        lock.Lock(tmp_path)


@pytest.mark.parametrize("dead", [True, False])
def test_of_ten_racing_takers_one_wins(tmp_path, hurry, dead):
    if dead:
        hold(tmp_path, start=12345)
    together = threading.Barrier(10)

    def take(_):
        together.wait()
        try:
            return lock.Lock(tmp_path)
        except UserError:
            return None

    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        (winner,) = filter(None, pool.map(take, range(10)))
    winner.confirm()
    winner.release()
    assert not list(tmp_path.iterdir())


def test_a_taker_that_died_over_it_is_no_obstacle(tmp_path, hurry):
    hold(tmp_path, start=12345)
    claim = lock._LockFile(tmp_path / "lock")._claim_path((tmp_path / "lock").read_bytes())
    claim.touch()
    lock.Lock(tmp_path).release()
    assert not list(tmp_path.iterdir())


def test_a_stolen_lock_stops_the_loser(tmp_path, hurry):
    with lock.Lock(tmp_path) as loser:
        loser.raise_if_lost()
        (tmp_path / "lock").unlink()
        hold(tmp_path)
        stolen = (tmp_path / "lock").read_bytes()
        with pytest.raises(lock.LockLost, match="was taken over by another run"):
            loser.confirm()
        with pytest.raises(lock.LockLost):
            loser.raise_if_lost()
    assert (tmp_path / "lock").read_bytes() == stolen


def test_a_folder_that_is_unavailable_for_a_while_keeps_its_lock(tmp_path, hurry):
    run = tmp_path / "run"
    with lock.Lock(run) as held:
        run.rename(tmp_path / "gone")
        with pytest.raises(FileNotFoundError):
            held.confirm()
        held.raise_if_lost()
        (tmp_path / "gone").rename(run)
        held.confirm()


@pytest.mark.parametrize(("number", "kind"), [(28, lock.LockUnavailable), (30, UserError)])
def test_a_full_disk_is_no_mistake_of_the_user(number, kind, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(lock.Lock, "_wait_until_acquired", fail)
    with pytest.raises(kind, match=r"cannot be written: .*(full|space|Read-only)"):
        lock.Lock(tmp_path)


def test_a_run_of_version_0_1_is_resumed_by_the_same_command(tmp_path):
    stored = pathlib.Path(__file__).parent / "data" / "config_0_1.json"
    (tmp_path / "config.json").write_text(stored.read_text())
    config = quickstart.get_config()
    config.data.range = workdir.stored_ranges(tmp_path)[""]  # as lmim train does with "auto"
    images = json.loads(stored.read_text())["training_images"]
    workdir.check(tmp_path, config.to_dict(), images)
    config.seed = 1
    with pytest.raises(UserError, match=r"another config \(seed 0 -> 1\)"):
        workdir.check(tmp_path, config.to_dict(), images)


def test_metrics_are_cut_in_place_as_the_disk_may_be_full(tmp_path, monkeypatch):
    lines = "".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(5))
    metrics = tmp_path / metric_storage.NAME
    metrics.write_text(lines + '{"step": 5, "lo')
    monkeypatch.setattr(metric_storage.atomic_io, "write", None)  # needs space
    inode = metrics.stat().st_ino
    kept = metric_storage.LocalStorage(tmp_path).keep_lines(2)
    assert [json.loads(line)["step"] for line in kept] == [0, 1, 2]
    assert metrics.read_text() == "".join(line + "\n" for line in kept)
    assert metrics.stat().st_ino == inode


def test_lines_that_a_full_disk_kept_back_are_written_before_the_state(tmp_path, monkeypatch):
    writer = metric_writer.MetricWriter(tmp_path, 0)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr(writer._storage, "append", full)
        writer.write(50, {"loss": 1.0})
    writer.flush()
    assert [line["step"] for line in metric_writer.read_metrics(tmp_path)] == [50]


def test_tables_hold_names_that_are_not_utf8(tmp_path):
    metric_writer.write_picture(tmp_path, "knn/classes", "caf\udce9,1\n")
    assert (tmp_path / "tables" / "knn_classes.csv").read_bytes() == b"caf\xe9,1\n"


def test_the_speed_of_a_run_that_ends_in_an_evaluation_is_that_of_training(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(metric_logger.time, "perf_counter", lambda: now[0])
    lines = []
    writer = types.SimpleNamespace(
        wall_seconds=0.0, write=lambda step, values: lines.append(values)
    )
    config = ConfigDict(
        dict(batch_size=10, log_every=50, on_nonfinite="stop", max_skipped=0, method={})
    )
    logger = metric_logger.MetricLogger(
        writer,
        config,
        start=0,
        total_steps=100,
        steps_per_epoch=10,
        learning_rate=lambda step: 0.1,
        describe_checkpoints=lambda: "",
        process_start=0.0,
    )
    logger.resume()
    for step in range(1, 11):
        now[0] += 0.5
        logger.add(step, {"loss": 1.0})
    logger.pause()
    now[0] += 100  # an evaluation, which is cut short
    logger.flush()
    logger.log_rest()
    assert [line["images_per_second"] for line in lines] == [20.0]


def test_failed_writes_leave_nothing_and_killed_ones_are_removed(tmp_path):
    def fail():
        with atomic_io.open_new(tmp_path / "summary.json") as file:
            file.write(b"{")
            raise OSError(28, os.strerror(28))

    with pytest.raises(OSError, match="space"):
        fail()
    assert list(tmp_path.iterdir()) == []
    old = tmp_path / "metrics.jsonl.123.tmp"
    young = tmp_path / "metrics.jsonl.124.tmp"
    for path in (old, young):
        path.touch()
    os.utime(old, (0, 0))
    workdir.claim(tmp_path, {"seed": 0}, None)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", young.name}


def test_a_folder_in_place_of_a_file_is_an_error_of_the_system(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match=r"directory|busy"):
        atomic_io.write(".", "content")


def test_starts_that_cannot_be_read_are_not_forgotten(tmp_path, monkeypatch, caplog):
    provenance.record_start(tmp_path, [])
    provenance.record_start(tmp_path, [])
    read_text = pathlib.Path.read_text

    def unreadable(path, *_):
        raise OSError(errno.EIO, "input/output error", str(path))

    monkeypatch.setattr(pathlib.Path, "read_text", unreadable)
    provenance.record_start(tmp_path, [])
    assert "environment.json was not written" in caplog.text
    monkeypatch.setattr(pathlib.Path, "read_text", read_text)
    assert len(provenance.read_starts(tmp_path)) == 2
