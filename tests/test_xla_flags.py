"""Which flags are set for XLA, and that the installed XLA knows them."""

import importlib.util
import os

import pytest
import tiny

from lmim_jax.distributed import multihost
from lmim_jax.train import gpu_kernels, workdir
from lmim_jax.utils import xla_flags
from lmim_jax.utils.errors import UserError

TRITON = "--xla_gpu_enable_triton_gemm=false"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "")


@pytest.fixture
def known(monkeypatch):
    """An XLA that knows all flags but one."""
    unknown = ["--xla_gpu_enable_pipelined_all_gather=true", "--xla_enable_async_all_gather=true"]
    for name in ("unknown_to_xla", "unknown_to_libtpu"):
        monkeypatch.setattr(xla_flags, name, lambda flags: [f for f in flags if f in unknown])
    return unknown


def text(flags):
    return [f"--{flag.name}={flag.value}" for flag in flags]


@pytest.mark.parametrize(
    "flags", [xla_flags.GPU, xla_flags.SEVERAL_GPUS, xla_flags.TPU], ids=["gpu", "gpus", "tpu"]
)
def test_every_flag_has_a_reason(flags):
    for flag in flags:
        assert flag.reason
        assert flag.name.startswith("xla_")


def test_the_installed_xla_knows_the_flags():
    flags = text(xla_flags.GPU + xla_flags.SEVERAL_GPUS) + [f"--{xla_flags.DETERMINISTIC}=true"]
    assert xla_flags.unknown_to_xla(flags) == []
    nonsense = ["--xla_gpu_nonsense=true", "--xla_other=1"]
    assert xla_flags.unknown_to_xla([*flags, *nonsense]) == nonsense


def test_no_flag_is_known_to_an_xla_that_cannot_be_asked(monkeypatch):
    monkeypatch.setattr(xla_flags, "PROBE", "import nothing_of_this_name")
    assert xla_flags.unknown_to_xla([TRITON]) == [TRITON]


def test_the_tpu_library_is_searched_for_the_flags(tmp_path, monkeypatch):
    library = tmp_path / "libtpu.so"
    library.write_bytes(b"\0xla_tpu_overlap_compute_collective_tc\0")
    monkeypatch.setenv("TPU_LIBRARY_PATH", str(library))
    unknown = xla_flags.unknown_to_libtpu(text(xla_flags.TPU))
    assert len(unknown) == len(xla_flags.TPU) - 1
    assert "--xla_tpu_overlap_compute_collective_tc=true" not in unknown


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed")
def test_the_installed_libtpu_knows_the_flags():
    assert xla_flags.unknown_to_libtpu(text(xla_flags.TPU)) == []


def test_one_gpu_several_gpus_and_tpus(known, monkeypatch):
    assert xla_flags.set_for_run("auto", gpus=0, tpu=False, several=True) == []
    assert os.environ["XLA_FLAGS"] == os.environ["LIBTPU_INIT_ARGS"] == ""
    assert xla_flags.set_for_run("none", gpus=8, tpu=True, several=True) == []
    lines = xla_flags.set_for_run("auto", gpus=1, tpu=False, several=False)
    assert lines == [f"XLA_FLAGS: {TRITON}"]
    for gpus, several in ((2, False), (1, True)):
        monkeypatch.setenv("XLA_FLAGS", "--mine=1")
        lines = xla_flags.set_for_run("auto", gpus=gpus, tpu=False, several=several)
        expected = text(xla_flags.GPU + xla_flags.SEVERAL_GPUS)
        expected.remove(known[0])
        assert os.environ["XLA_FLAGS"].split() == ["--mine=1", *expected]
        assert lines[-1].endswith(f"no such flag: {known[0]}")
    monkeypatch.setenv("XLA_FLAGS", "")
    lines = xla_flags.set_for_run("auto", gpus=0, tpu=True, several=False)
    assert len(os.environ["LIBTPU_INIT_ARGS"].split()) == len(xla_flags.TPU) - 1
    assert len(lines) == 2


def test_flags_of_the_environment_win(known, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=true")
    xla_flags.set_for_run("auto", gpus=1, tpu=False, several=False)
    assert os.environ["XLA_FLAGS"] == "--xla_gpu_enable_triton_gemm=true"


def test_an_unknown_choice_is_a_mistake():
    with pytest.raises(UserError, match=r"config\.xla_flags=fast must be one of auto, none"):
        xla_flags.set_for_run("fast", gpus=0, tpu=False, several=False)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", False),
        ("--xla_gpu_exclude_nondeterministic_ops=true", True),
        ("--other --xla_gpu_deterministic_ops", True),
        ("--xla_gpu_deterministic_ops=1 --xla_gpu_deterministic_ops=false", False),
        ("--xla_gpu_exclude_nondeterministic_ops=False", False),
    ],
)
def test_deterministic_kernels_are_found_in_the_environment(monkeypatch, flags, expected):
    monkeypatch.setenv("XLA_FLAGS", flags)
    assert xla_flags.is_deterministic() == expected


def test_the_flags_of_a_recipe(known, tmp_path, monkeypatch):
    monkeypatch.setattr(multihost, "visible_gpus", lambda: 1)
    monkeypatch.setattr(multihost, "visible_tpu_chips", lambda: 0)
    monkeypatch.setattr(gpu_kernels, "pin", lambda *which: [f"pinned {which}"])
    config = tiny.get_config()
    lines = workdir.set_xla_flags(config, tmp_path, process=3)
    assert lines == [f"pinned {(tmp_path, 3)}", f"XLA_FLAGS: {TRITON}"]
    monkeypatch.setenv("XLA_FLAGS", "")
    config.deterministic = True
    config.xla_flags = "none"
    workdir.set_xla_flags(config, tmp_path, coordinator="host:1")
    assert os.environ["XLA_FLAGS"] == f"--{xla_flags.DETERMINISTIC}=true"
    assert xla_flags.is_deterministic()
