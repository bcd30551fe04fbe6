"""A profiler trace of the train step, and its operations in the order of the time they take."""

import collections
import pathlib
from collections.abc import Iterator
from typing import Any

import jax

from lmim_jax.perf import program_stats
from lmim_jax.perf.bench_step import BenchmarkStep
from lmim_jax.perf.program_stats import Instruction
from lmim_jax.utils.errors import UserError

CONTROL_FLOW = ("while", "call", "conditional")  # the trace also contains their parts
PRODUCTS = ("dot", "convolution")
# Parts of the names of custom calls that are matrix products
LIBRARIES = ("gemm", "cublas", "cudnn", "matmul", "conv", "dot")


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
    instruction_of = {instruction.name: instruction for instruction in program}
    nanoseconds: collections.Counter[str] = collections.Counter()
    times: collections.Counter[str] = collections.Counter()
    for name, duration in _events(path):
        instruction = instruction_of.get(name)
        if instruction and instruction.opcode not in CONTROL_FLOW:
            nanoseconds[name] += duration
            times[name] += 1
    if not nanoseconds:
        raise UserError(
            f"{path}: the trace of this device does not name the operations of the step; "
            "open it with xprof"
        )
    operations = []
    for name, duration in nanoseconds.most_common():
        instruction = instruction_of[name]
        operations.append(
            {
                "name": name,
                "opcode": instruction.opcode,
                "where": instruction.where,
                "product": is_product(instruction, program),
                "times": times[name] / steps,
                "milliseconds": duration / 1e6 / steps,
            }
        )
    return operations


def _events(path: pathlib.Path) -> Iterator[tuple[str, int]]:
    """Yield (name of the HLO instruction, nanoseconds) of every event in a trace."""
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        for line in plane.lines:
            for event in line.events:
                name = dict(event.stats).get("hlo_op")
                if name:
                    yield name, event.duration_ns


def is_product(instruction: Instruction, program: list[Instruction]) -> bool:
    """Whether an instruction of a program is a matrix product, or a fusion around one."""
    if instruction.opcode == "custom-call":
        return any(part in instruction.target.lower() for part in LIBRARIES)
    if instruction.opcode == "fusion":
        fused = [inner for inner in program if inner.computation == instruction.calls]
        return any(inner.opcode in PRODUCTS for inner in fused)
    return instruction.opcode in PRODUCTS


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
