"""A profiler trace of the train step, and its operations in the order of the time they take."""

import collections
import operator
import pathlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from lmim_jax.perf import program_stats
from lmim_jax.perf.bench_step import BenchmarkStep
from lmim_jax.perf.program_stats import Instruction
from lmim_jax.utils.errors import UserError

CONTROL_FLOW = ("while", "call", "conditional")  # the trace also contains their parts
PRODUCTS = ("dot", "convolution")
# Parts of the names of custom calls, and of kernels of libraries, that are matrix products
LIBRARIES = ("gemm", "cublas", "cudnn", "matmul", "conv", "dot", "nvjet", "cutlass", "xmma")
KERNEL = "kernel"  # in place of an opcode, for a kernel of a GPU that belongs to no instruction


class Event(NamedTuple):
    """An event of a trace.

    Attributes:
      name: of an HLO instruction, or of a kernel.
      nanoseconds: its duration.
      is_kernel: whether a GPU ran it, which counts even if the program does not name it.
    """

    name: str
    nanoseconds: float
    is_kernel: bool


def record(
    step: BenchmarkStep, folder: str | pathlib.Path, steps: int = 5, rows: int = 10
) -> dict[str, Any]:
    """Trace some steps, and add up the time of their operations.

    Args:
      step: the compiled step.
      folder: where the trace is written, for xprof or Perfetto; earlier traces in it are kept.
      steps: number of steps to trace.
      rows: number of operations to return.

    Returns:
      {"trace": file, "steps": number of steps, "milliseconds": of all operations, "product_share":
      the share of matrix products in them, "operations": the slowest `rows`, [{"name", "opcode",
      "where" (JAX's name stack), "product" (whether it is a matrix product), "times",
      "milliseconds"}]}; times and milliseconds are per step, on the devices of this process.

    Raises:
      UserError: the trace does not name the operations of the step.
    """
    step.timed()
    with jax.profiler.trace(folder):
        for _ in range(steps):
            step.timed()
    traces = pathlib.Path(folder).rglob("*.xplane.pb")
    path = max(traces, key=_modification_time)
    program = program_stats.instructions(step.compiled.as_text())
    operations = _sum_operations(path, program, steps)
    total = 0.0
    product_milliseconds = 0.0
    for operation in operations:
        total += operation["milliseconds"]
        if operation["product"]:
            product_milliseconds += operation["milliseconds"]
    return {
        "trace": str(path),
        "steps": steps,
        "milliseconds": total,
        "product_share": product_milliseconds / total,
        "operations": operations[:rows],
    }


def _modification_time(path: pathlib.Path) -> float:
    return path.stat().st_mtime


def _sum_operations(
    path: pathlib.Path, program: list[Instruction], steps: int
) -> list[dict[str, Any]]:
    """Time and number of every operation in a trace, per step, the slowest first."""
    instruction_of = {}
    for instruction in program:
        instruction_of[instruction.name] = instruction
        instruction_of.setdefault(_kernel_name(instruction.name), instruction)
    nanoseconds: collections.defaultdict[str, float] = collections.defaultdict(float)
    times: collections.Counter[str] = collections.Counter()
    for event in _events(jax.profiler.ProfileData.from_file(str(path))):
        name = event.name
        known = instruction_of.get(name)
        if known is not None:
            name = known.name
        elif not event.is_kernel:
            continue
        if known is None or known.opcode not in CONTROL_FLOW:
            nanoseconds[name] += event.nanoseconds
            times[name] += 1
    if not nanoseconds:
        raise UserError(
            f"{path}: the trace of this device does not name the operations of the step; "
            "open it with xprof"
        )
    operations = []
    for name, duration in sorted(nanoseconds.items(), key=operator.itemgetter(1), reverse=True):
        operation = _describe(name, instruction_of.get(name), program)
        operation["times"] = times[name] / steps
        operation["milliseconds"] = duration / 1e6 / steps
        operations.append(operation)
    return operations


def _kernel_name(name: str) -> str:
    """XLA's name of the GPU kernel of an instruction: "add_fusion.3" -> "add_fusion_3"."""
    return re.sub(r"[^\w]", "_", name)


def _describe(
    name: str, instruction: Instruction | None, program: list[Instruction]
) -> dict[str, Any]:
    """What `record` returns of an operation, but its time; None: only a kernel's name is known."""
    if instruction is None:
        product = _is_of_a_library(name)
        return {"name": name, "opcode": KERNEL, "where": "", "product": product}
    return {
        "name": name,
        "opcode": instruction.opcode,
        "where": instruction.where,
        "product": is_product(instruction, program),
    }


def _events(trace: Any) -> Iterator[Event]:
    """Yield what the devices have computed, with the names of HLO instructions where it has them.

    A GPU's plane has a line for each stream, whose events are kernels. An event says which
    instruction it belongs to in its statistic "hlo_op", except for kernels in CUDA graphs, of which
    only the name is known. CPUs note "hlo_op" in the threads of the host.

    Args:
      trace: a jax.profiler.ProfileData.
    """
    planes = list(trace.planes)
    streams = []
    for plane in planes:
        if plane.name.startswith("/device:GPU"):
            streams += [line for line in plane.lines if line.name.startswith("Stream")]
    if streams:
        for line in streams:
            for event in line.events:
                name = dict(event.stats).get("hlo_op")
                yield Event(name or event.name, event.duration_ns, is_kernel=True)
        return
    for plane in planes:
        for line in plane.lines:
            for event in line.events:
                name = dict(event.stats).get("hlo_op")
                if name:
                    yield Event(name, event.duration_ns, is_kernel=False)


def is_product(instruction: Instruction, program: list[Instruction]) -> bool:
    """Whether an instruction of a program is a matrix product, or a fusion around one."""
    if instruction.opcode == "custom-call":
        return _is_of_a_library(instruction.target)
    if instruction.opcode == "fusion":
        fused = [inner for inner in program if inner.computation == instruction.calls]
        return any(inner.opcode in PRODUCTS for inner in fused)
    return instruction.opcode in PRODUCTS


def _is_of_a_library(name: str) -> bool:
    """Whether the target of a custom call, or a kernel, is a matrix product of a library."""
    return any(part in name.lower() for part in LIBRARIES)


def table(profile: dict[str, Any]) -> list[str]:
    """The slowest operations, as lines of text.

    Args:
      profile: see `record`.
    """
    total = profile["milliseconds"]
    lines = [
        f"from the trace of {profile['steps']} steps, {profile['trace']}: {total:.1f} ms of "
        f"operations per step, {profile['product_share']:.0%} of it in matrix products",
        f"{'ms a step':>10}{'share':>8}{'times':>7}  {'operation':<34} where",
    ]
    for operation in profile["operations"]:
        milliseconds = operation["milliseconds"]
        where = operation["where"].replace("jit(train_step)/", "")
        lines.append(
            f"{milliseconds:>10.3f}{milliseconds / total:>8.1%}{operation['times']:>7.0f}"
            f"  {operation['name']:<34} {where}"
        )
    return lines
