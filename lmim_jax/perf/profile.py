"""Where the time of a train step goes: a profiler trace, and its operations by the time they took."""

import collections
import pathlib

import jax

from lmim_jax.perf import program_stats
from lmim_jax.utils.errors import UserError

AROUND = "while", "call", "conditional"  # of which the trace also has the parts
PRODUCTS = "dot", "convolution"
LIBRARIES = (
    "gemm",
    "cublas",
    "cudnn",
    "matmul",
    "conv",
    "dot",
)  # parts of names of custom calls that are products


def record(step, folder, steps=5, rows=10):
    """Trace some steps into `folder` (to be opened with xprof or Perfetto), and add up their operations.

    Args:
      step: a bench_step.Step. folder: a new trace is put beside those that are there.

    Returns:
      {"trace": file, "steps": how many, "milliseconds" of all operations, "product_share", of matrix products in them,
      "operations": the slowest `rows`, [{"name", "opcode", "where" (JAX's name stack), "product" (is it a matrix
      product), "times", "milliseconds"}]}; times and milliseconds are per step, on this process's devices.
    """
    step.timed()
    with jax.profiler.trace(folder):
        for _ in range(steps):
            step.timed()
    path = max(pathlib.Path(folder).rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    program = program_stats.instructions(step.compiled.as_text())
    known = {one.name: one for one in program}
    times, count = collections.Counter(), collections.Counter()
    for name, nanoseconds in _events(path):
        if name in known and known[name].opcode not in AROUND:
            times[name] += nanoseconds
            count[name] += 1
    if not times:
        raise UserError(
            f"{path}: this device's trace names no operations of the step; open it with xprof"
        )
    operations = [
        {
            "name": name,
            "opcode": known[name].opcode,
            "where": known[name].where,
            "product": is_product(known[name], program),
            "times": count[name] / steps,
            "milliseconds": nanoseconds / 1e6 / steps,
        }
        for name, nanoseconds in times.most_common()
    ]
    total = sum(one["milliseconds"] for one in operations)
    products = sum(one["milliseconds"] for one in operations if one["product"])
    shares = {"milliseconds": total, "product_share": products / total}
    return {"trace": str(path), "steps": steps, **shares, "operations": operations[:rows]}


def _events(path):
    """Yield (name of the HLO operation, nanoseconds)."""
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        for line in plane.lines:
            for event in line.events:
                if name := dict(event.stats).get("hlo_op"):
                    yield name, event.duration_ns


def is_product(one, program):
    """Whether an instruction of a program (see bench_program.py) is a matrix product, or a fusion around one."""
    if one.opcode == "custom-call":
        return any(part in one.target.lower() for part in LIBRARIES)
    if one.opcode == "fusion":
        return any(inner.opcode in PRODUCTS for inner in program if inner.computation == one.calls)
    return one.opcode in PRODUCTS


def table(found):
    """The slowest operations, as lines of text."""
    told = f"{found['milliseconds']:.1f} ms of operations a step, {found['product_share']:.0%} of it in matrix products"
    lines = [f"from the trace of {found['steps']} steps, {found['trace']}: {told}"]
    lines += [f"{'ms a step':>10}{'share':>8}{'times':>7}  {'operation':<34} where"]
    for one in found["operations"]:
        share = one["milliseconds"] / found["milliseconds"]
        where = one["where"].replace("jit(train_step)/", "")
        lines.append(
            f"{one['milliseconds']:>10.3f}{share:>8.1%}{one['times']:>7.0f}  {one['name']:<34} {where}"
        )
    return lines
