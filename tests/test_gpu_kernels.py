"""XLA's choice of kernels, kept with a run: published whole, and used where it is valid."""

import os
import pathlib

import pytest

from lmim_jax.distributed import multihost
from lmim_jax.train import gpu_kernels
from lmim_jax.utils import xla_flags

CHOICES = b"version: 3\nresults { }\n"
LOAD = "--xla_gpu_load_autotune_results_from="
DUMP = "--xla_gpu_dump_autotune_results_to="


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """A machine with an H100, and a function that changes what it is."""
    programs = tmp_path / "programs"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    monkeypatch.setenv("XLA_FLAGS", "--mine=1")
    monkeypatch.setattr(multihost, "visible_gpus", lambda: 1)
    for name in ("_folder", "_dumped"):
        monkeypatch.setattr(gpu_kernels, name, None)

    def change(gpu):
        script = programs / "nvidia-smi"
        script.write_text(f"#!/bin/sh\necho {gpu}; echo {gpu}\n")
        script.chmod(0o755)
        gpu_kernels._valid_for.cache_clear()

    change("H100")
    yield change
    gpu_kernels._valid_for.cache_clear()


def pin(workdir, process=0):
    """(file that XLA reads, file that it writes, lines for the log) of a new process."""
    os.environ["XLA_FLAGS"] = "--mine=1"
    lines = gpu_kernels.pin(workdir, process)
    found = dict.fromkeys((LOAD, DUMP))
    mine, *words = os.environ["XLA_FLAGS"].split()
    assert mine == "--mine=1"
    for word in words:
        name, _, value = word.partition("=")
        found[f"{name}="] = pathlib.Path(value)
    return found[LOAD], found[DUMP], lines


def publish(workdir):
    """Make `workdir` a run with published choices."""
    _, dumped, _ = pin(workdir)
    dumped.write_bytes(CHOICES)
    gpu_kernels.publish(workdir)
    return workdir / gpu_kernels.NAME


def test_without_a_gpu_nothing_happens(tmp_path, monkeypatch):
    monkeypatch.setattr(multihost, "visible_gpus", lambda: 0)
    assert pin(tmp_path / "run") == (None, None, [])
    gpu_kernels.publish(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_choices_are_published_once_they_exist_and_used_by_all_processes(tmp_path):
    workdir = tmp_path / "my run"  # XLA_FLAGS are divided at spaces
    chosen, dumped, lines = pin(workdir)
    assert (chosen, lines) == (None, [])
    assert not dumped.is_relative_to(workdir)
    gpu_kernels.publish(workdir)  # XLA has compiled nothing
    assert not workdir.exists()
    dumped.write_bytes(CHOICES)
    gpu_kernels.publish(workdir)
    file = workdir / gpu_kernels.NAME
    assert file.read_bytes().startswith(b"# {")  # a comment in a textproto
    assert file.read_bytes().endswith(b"\n" + CHOICES)
    for process in (0, 1):
        chosen, dumped, lines = pin(workdir, process)
        assert (chosen.read_bytes(), lines) == (CHOICES, [])
        assert (dumped is None) == (process != 0)
        assert file.parent not in chosen.parents


def test_choices_for_more_programs_are_added(tmp_path):
    file = publish(tmp_path)
    _, dumped, _ = pin(tmp_path)  # such as with another mesh
    before = file.stat().st_mtime_ns
    dumped.write_bytes(CHOICES)
    gpu_kernels.publish(tmp_path)
    assert file.stat().st_mtime_ns == before
    dumped.write_bytes(CHOICES + b"results { }\n")
    gpu_kernels.publish(tmp_path)
    chosen, _, _ = pin(tmp_path)
    assert chosen.read_bytes() == CHOICES + b"results { }\n"


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_a_file_that_is_cut_off_is_left_out_with_a_warning(tmp_path, keep):
    file = publish(tmp_path)
    file.write_bytes(file.read_bytes()[:keep])
    chosen, dumped, (line,) = pin(tmp_path)
    assert chosen is None
    assert f"{file} is damaged" in line
    dumped.write_bytes(CHOICES)
    gpu_kernels.publish(tmp_path)  # and replaced
    chosen, _, _ = pin(tmp_path)
    assert chosen.read_bytes() == CHOICES


def test_every_flipped_bit_is_noticed(tmp_path):
    file = publish(tmp_path)
    content = file.read_bytes()
    for index in range(content.index(b"\n"), len(content)):
        changed = bytearray(content)
        changed[index] ^= 1
        file.write_bytes(changed)
        assert pin(tmp_path)[0] is None


def test_choices_of_another_gpu_or_jaxlib_are_left_out(tmp_path, machine, monkeypatch):
    publish(tmp_path)
    machine("H200")
    chosen, _, (line,) = pin(tmp_path)
    assert chosen is None
    assert "gpus ['H100'] -> ['H200']" in line
    machine("H100")
    assert pin(tmp_path)[0] is not None
    monkeypatch.setattr(gpu_kernels.importlib.metadata, "version", lambda name: "0.1")
    gpu_kernels._valid_for.cache_clear()
    chosen, _, (line,) = pin(tmp_path)
    assert chosen is None
    assert "jaxlib" in line
    assert "-> 0.1" in line


def test_a_full_disk_costs_only_the_choices(tmp_path, monkeypatch, caplog):
    _, dumped, _ = pin(tmp_path)
    dumped.write_bytes(CHOICES)

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(gpu_kernels.atomic_io, "write", fail)
        gpu_kernels.publish(tmp_path)
    assert "No space left" in caplog.text
    gpu_kernels.publish(tmp_path)
    assert (tmp_path / gpu_kernels.NAME).is_file()


def test_a_temporary_folder_with_a_space(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_kernels.tempfile, "tempdir", str(tmp_path / "a b"))
    _, dumped, _ = pin(tmp_path)
    assert dumped.parent.is_dir()


def test_choices_are_kept_in_buckets(bucket):
    del bucket
    _, dumped, _ = pin("gs://bkt/run")
    dumped.write_bytes(CHOICES)
    gpu_kernels.publish("gs://bkt/run")
    assert pin("gs://bkt/run")[0].read_bytes() == CHOICES


def test_the_installed_xla_knows_the_flags():
    assert xla_flags.unknown_to_xla([f"{LOAD}/nothing", f"{DUMP}/nothing"]) == []
