"""XLA's flags: which are set for a run, and why.

XLA reads them from the environment when jax starts its backends: XLA_FLAGS, and LIBTPU_INIT_ARGS
for TPUs. It ends the process when it does not know a flag, and flags come and go with its versions,
so the installed version is asked first. What the environment sets already is left alone.
"""

import importlib.util
import mmap
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

from lmim_jax.utils.errors import UserError

CHOICES = ("auto", "none")  # of config.xla_flags
# Asks the installed XLA: it ends a process with the message UNKNOWN, or accepts the flags
PROBE = "from jaxlib import xla_client; xla_client.CompileOptions()"
UNKNOWN = r"Unknown flags? in XLA_FLAGS: (.*)"
DETERMINISTIC = "xla_gpu_exclude_nondeterministic_ops"
TRUE = ("", "true", "1", "yes", "y", "t")  # values of a flag that mean True, in lower case


class Flag(NamedTuple):
    """A flag that is set by default.

    Attributes:
      name: without dashes.
      value: as text.
      reason: what it is good for.
      measured: its effect; "": not measured.
    """

    name: str
    value: str
    reason: str
    measured: str = ""


GPU = (
    Flag(
        "xla_gpu_enable_triton_gemm",
        "false",
        "matrix products by cuBLAS instead of XLA's Triton kernels",
        "vit_b, batch size 256, one H200: a step takes 61.4 ms instead of 63.1",
    ),
)
# Only with several GPUs: how messages between them are sent. Values of MaxText
# (src/maxtext/configs/gpu/a3/llama_2_7b, its scripts for one machine of 8 H100s).
SEVERAL_GPUS = (
    Flag(
        "xla_gpu_enable_latency_hiding_scheduler",
        "true",
        "operations are ordered so that messages are sent while others compute",
    ),
    Flag(
        "xla_gpu_enable_highest_priority_async_stream",
        "true",
        "messages do not wait behind kernels",
    ),
    Flag(
        "xla_gpu_enable_pipelined_all_reduce",
        "true",
        "in loops (micro-batches, scan_layers): overlaps an iteration's sums with the next one",
    ),
    Flag(
        "xla_gpu_enable_pipelined_all_gather",
        "true",
        "the same for gathered parameters (fsdp)",
    ),
    Flag(
        "xla_gpu_enable_pipelined_reduce_scatter",
        "true",
        "the same for gradients (fsdp)",
    ),
    Flag(
        "xla_gpu_all_reduce_combine_threshold_bytes",
        "134217728",
        "few large messages instead of many small ones: gradients, 128 MiB at a time",
    ),
    Flag(
        "xla_gpu_all_gather_combine_threshold_bytes",
        "134217728",
        "the same for gathered parameters (fsdp)",
    ),
    Flag(
        "xla_gpu_reduce_scatter_combine_threshold_bytes",
        "67108864",
        "the same for gradients (fsdp), 64 MiB at a time",
    ),
)
# In LIBTPU_INIT_ARGS. The set of MaxText's scripts and of CF_FOR_ALL_GATHER and
# DATA_PARALLEL_OVERLAP in its benchmarks/xla_flags_library.py.
TPU = (
    Flag(
        "xla_tpu_enable_async_collective_fusion",
        "true",
        "messages are sent inside of fusions that compute something else",
    ),
    Flag("xla_tpu_enable_async_collective_fusion_fuse_all_gather", "true", "also gathers (fsdp)"),
    Flag(
        "xla_tpu_enable_async_collective_fusion_multiple_steps",
        "true",
        "a message may span several fusions",
    ),
    Flag("xla_tpu_overlap_compute_collective_tc", "true", "the core computes while it sends"),
    Flag("xla_enable_async_all_gather", "true", "gathers (fsdp) start early and end late"),
    Flag(
        "xla_tpu_enable_data_parallel_all_reduce_opt",
        "true",
        "sums of gradients overlap with the backward pass",
    ),
    Flag(
        "xla_tpu_data_parallel_opt_different_sized_ops",
        "true",
        "the same for gradients of different sizes",
    ),
)


def set_for_run(choice: str, gpus: int, tpu: bool, several: bool) -> list[str]:
    """Set the default flags for the devices of a run. Call it before jax looks for devices.

    Args:
      choice: `config.xla_flags`: "auto" or "none".
      gpus: the number of NVIDIA GPUs that this process sees.
      tpu: whether this host has a TPU.
      several: whether the run has several processes.

    Returns:
      Lines for the log: the flags in the environment, and those that were left out.

    Raises:
      UserError: another choice.
    """
    if choice not in CHOICES:
        raise UserError(f"config.xla_flags={choice} must be one of {', '.join(CHOICES)}")
    left_out: list[str] = []
    if choice == "auto" and gpus:
        wanted = list(GPU)
        if gpus > 1 or several:
            wanted += SEVERAL_GPUS
        left_out += _add_known("XLA_FLAGS", wanted)
    if choice == "auto" and tpu:
        left_out += _add_known("LIBTPU_INIT_ARGS", TPU)
    lines = []
    for variable in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"):
        if os.environ.get(variable):
            lines.append(f"{variable}: {os.environ[variable]}")
    if left_out:
        lines.append(f"left out, because the installed XLA has no such flag: {' '.join(left_out)}")
    return lines


def add(variable: str, flags: Sequence[str]) -> None:
    """Append flags to an environment variable, except those that it sets already.

    Args:
      variable: XLA_FLAGS or LIBTPU_INIT_ARGS.
      flags: such as "--xla_gpu_enable_triton_gemm=false".
    """
    present = _values(variable)
    words = os.environ.get(variable, "").split()
    for flag in flags:
        if _split(flag)[0] not in present:
            words.append(flag)
    os.environ[variable] = " ".join(words)


def is_deterministic() -> bool:
    """Whether XLA_FLAGS exclude GPU kernels whose sums depend on timing."""
    values = _values("XLA_FLAGS")
    for name in (DETERMINISTIC, "xla_gpu_deterministic_ops"):
        if name in values and values[name].lower() in TRUE:
            return True
    return False


def unknown_to_xla(flags: Sequence[str]) -> list[str]:
    """Those of the flags that the installed XLA does not know, by asking it in a child process.

    The plugin for GPUs has the same flags: its version is that of jaxlib.

    Args:
      flags: such as "--xla_gpu_enable_triton_gemm=false".
    """
    environment = {**os.environ, "XLA_FLAGS": " ".join(flags)}
    child = subprocess.run(
        [sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True
    )
    if child.returncode == 0:
        return []
    message = re.search(UNKNOWN, child.stderr)
    if message is None:  # it cannot be asked: set none of them
        return list(flags)
    return message.group(1).split()


def unknown_to_libtpu(flags: Sequence[str]) -> list[str]:
    """Those of the flags whose names do not occur in the TPU library; all, if there is none.

    Args:
      flags: such as "--xla_enable_async_all_gather=true".
    """
    library = _libtpu()
    if library is None:
        return list(flags)
    with (
        library.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        return [flag for flag in flags if content.find(_split(flag)[0].encode()) < 0]


def _libtpu() -> pathlib.Path | None:
    """The TPU library that jax will load."""
    given = os.environ.get("TPU_LIBRARY_PATH")
    if given:
        return pathlib.Path(given)
    package = importlib.util.find_spec("libtpu")
    if package is None or package.origin is None:
        return None
    return pathlib.Path(package.origin).with_name("libtpu.so")


def _add_known(variable: str, wanted: Sequence[Flag]) -> list[str]:
    """Set those of the wanted flags that are known and not set yet; the unknown ones."""
    present = _values(variable)
    flags = []
    for flag in wanted:
        if flag.name not in present:
            flags.append(f"--{flag.name}={flag.value}")
    ask = unknown_to_libtpu if variable == "LIBTPU_INIT_ARGS" else unknown_to_xla
    unknown = ask(flags)
    add(variable, [flag for flag in flags if flag not in unknown])
    return unknown


def _values(variable: str) -> dict[str, str]:
    """{name: value} of the flags in an environment variable; the last one wins, as in XLA."""
    values = {}
    for word in os.environ.get(variable, "").split():
        name, value = _split(word)
        values[name] = value
    return values


def _split(flag: str) -> tuple[str, str]:
    """Name and value of "--name=value" or "--name"."""
    name, _, value = flag.lstrip("-").partition("=")
    return name, value
