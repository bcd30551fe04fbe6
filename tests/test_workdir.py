"""Whose lock counts, and the flags passed to XLA."""

import json
import os
import shutil
import socket
import time

import pytest

from lmim_jax.train import lock, workdir
from lmim_jax.utils.errors import UserError


def hold(path, **change):
    """Write the lock file of another process."""
    holder = {
        "host": socket.gethostname(),
        "pid": 1,
        "start": lock.process_start(1),
        "since": "2026-01-01T00:00:00+00:00",
    }
    (path / "lock").write_text(json.dumps(holder | change))


def test_a_lock_is_held_and_released(tmp_path):
    taken = pytest.raises(
        UserError, match=rf"pid {os.getpid()}, since 20.*choose another --workdir"
    )
    with lock.Lock(tmp_path / "run"), taken:
        lock.Lock(tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize(
    ("change", "alive"),
    [
        ({}, True),
        ({"start": 12345}, False),  # another process has this PID now
        ({"pid": 2**22 + 1}, False),
        ({"host": "elsewhere"}, True),  # by the age of the file
    ],
)
def test_whose_lock_counts(tmp_path, change, alive):
    hold(tmp_path, **change)
    if alive:
        with pytest.raises(UserError, match="is being written by another run"):
            lock.Lock(tmp_path)
    else:
        lock.Lock(tmp_path).release()


def test_an_old_lock_of_another_host_is_taken_over(tmp_path, caplog):
    hold(tmp_path, host="elsewhere")
    long_ago = time.time() - 10 * lock.STALE
    os.utime(tmp_path / "lock", (long_ago, long_ago))
    lock.Lock(tmp_path).release()
    assert "taking over" in caplog.text
    (tmp_path / "lock").write_text("cut o")
    lock.Lock(tmp_path).release()


def test_kernels_are_pinned_where_there_is_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--mine")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    workdir.pin_kernels(tmp_path / "run", True)
    assert os.environ["XLA_FLAGS"] == "--mine"
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    file = tmp_path / "run" / "gpu_kernels_0.textproto"
    workdir.pin_kernels(tmp_path / "run", True)
    expected = [
        "--mine",
        f"--xla_gpu_dump_autotune_results_to={file}",
        "--xla_gpu_exclude_nondeterministic_ops=true",
    ]
    assert os.environ["XLA_FLAGS"].split() == expected
    file.touch()
    monkeypatch.setenv("XLA_FLAGS", "")
    workdir.pin_kernels(tmp_path / "run", False)
    assert os.environ["XLA_FLAGS"] == f"--xla_gpu_load_autotune_results_from={file}"
