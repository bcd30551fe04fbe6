"""The kernels of a program compiled for a GPU or a TPU: memory traffic, products, estimated time.

Traffic is the size of every kernel's operands and results, each counted once: what a kernel moves
between the device's memory and its caches if it reads and writes everything in one pass. Not
counted: workspaces of libraries, and collectives. A kernel that reads a part of a large operand is
counted with all of it, unless all that it does is to cut that part out. Of a conditional, all
branches are counted.
"""

import collections
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from lmim_jax.perf import accelerators, hlo, program_stats
from lmim_jax.perf.program_stats import Instruction

# Operations that run no kernel of their own
FREE = (
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "call",
    "conditional",
    "after-all",
    "opt-barrier",
    "partition-id",
    "replica-id",
)
PRODUCTS = ("dot", "convolution")
SLICES = ("slice", "dynamic-slice")  # they read as much as they write
# Custom calls on TPUs that move nothing
FREE_TARGETS = ("ConcatBitcast", "AllocateBuffer", "AssumeGatherIndicesInBound")
WORKSPACES = ("u8", "s8")  # element types of what libraries return besides their results
# Start of a target -> what computes it
LIBRARIES = {"__cublas": "cuBLAS", "__cudnn": "cuDNN", "tpu_custom_call": "Pallas"}

# What kernels reached on an H100 (docs/results/gpu.md), as shares of its data sheet
PRODUCT_SHARE = 650e12 / 989e12  # large bfloat16 products
BANDWIDTH_SHARE = 2.7e12 / 3.35e12  # a copy in memory
PRODUCT_TRAFFIC = 1 / 2  # of the traffic of products, what their arithmetic does not hide
KERNEL_SECONDS = 2e-6  # to start a kernel: an assumption
NOT_ESTIMABLE = "none: the model is so small that starting kernels takes most of the time"


class Kernel(NamedTuple):
    """A kernel of a program.

    Attributes:
      where: JAX's name stack.
      times: how often it runs in one run of the program.
      size: bytes of its operands and results.
      product: what computes its matrix product: "cuBLAS", "cuDNN", "Triton", "XLA"; "": none does.
      is_float32: whether that product reads float32.
    """

    where: str
    times: int
    size: int
    product: str
    is_float32: bool


class _Program:
    """The instructions of a program, by name and by computation."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, dict[str, Instruction]] = collections.defaultdict(dict)
        for instruction in program_stats.instructions(text):
            self.computations[instruction.computation][instruction.name] = instruction
        self.executions = hlo.executions(text)

    def kernels(self) -> list[Kernel]:
        """The kernels, without those of computations that are parts of others."""
        parts = set()
        for computation in self.computations.values():
            for instruction in computation.values():
                if instruction.opcode != "async-start":
                    parts.add(instruction.calls)
                if instruction.opcode != "call":
                    parts.add(instruction.applies)
        found = []
        for name, computation in self.computations.items():
            times = self.executions[name]
            if times and name not in parts:
                for instruction in computation.values():
                    if _is_kernel(instruction):
                        found.append(self._kernel(instruction, times))
        return found

    def _kernel(self, instruction: Instruction, times: int) -> Kernel:
        product = self._product(instruction)
        return Kernel(
            where=_collapse(instruction.where),
            times=times,
            size=self._size(instruction),
            product=product,
            is_float32=bool(product) and self._reads_float32(instruction),
        )

    def _size(self, instruction: Instruction) -> int:
        """Bytes of the operands, each counted once, and of the results."""
        size = 0
        results = hlo.arrays(instruction.type)
        if instruction.opcode == "copy-start":  # (result, operand, counter)
            results = results[:1]
        for result in results:
            workspace = len(results) > 1 and result.startswith(WORKSPACES)
            if not (workspace and instruction.target.startswith(tuple(LIBRARIES))):
                size += hlo.memory_bytes(result)
        if instruction.opcode in SLICES:
            return size + hlo.num_bytes(hlo.shapes(instruction.type))
        siblings = self.computations[instruction.computation]
        for operand in dict.fromkeys(instruction.operands):
            size += hlo.memory_bytes(siblings[operand].type)
        return size

    def _operand_shapes(self, instruction: Instruction, operand: str) -> tuple[str, ...]:
        return hlo.shapes(self.computations[instruction.computation][operand].type)

    def _product(self, instruction: Instruction) -> str:
        """What computes the matrix product of an instruction; "": it has none."""
        for start, library in LIBRARIES.items():
            if instruction.target.startswith(start):
                return library
        if instruction.opcode in PRODUCTS:
            return "XLA"
        if instruction.opcode == "fusion" and self._fused_products(instruction):
            if "cudnn" in instruction.backend:
                return "cuDNN"
            return "Triton" if "triton" in instruction.backend else "XLA"
        return ""

    def _fused_products(self, fusion: Instruction) -> list[Instruction]:
        fused = self.computations[fusion.calls].values()
        return [inner for inner in fused if inner.opcode in PRODUCTS]

    def _reads_float32(self, instruction: Instruction) -> bool:
        """Whether the product of an instruction reads float32."""
        products = [instruction]
        if instruction.opcode == "fusion":
            products = self._fused_products(instruction)
        for product in products:
            for operand in product.operands[:2]:
                if self._operand_shapes(product, operand)[0].startswith("f32"):
                    return True
        return False


def _is_kernel(instruction: Instruction) -> bool:
    opcode = instruction.opcode
    if instruction.target in FREE_TARGETS:
        return False
    if opcode in FREE or opcode.endswith(("-done", "-update")) or opcode.startswith("async-"):
        return False
    return opcode.removesuffix("-start") not in hlo.KINDS


def _collapse(where: str) -> str:
    """A name stack without the outer function, and with one name for all blocks."""
    return re.sub(r"\bblock\d+", "block*", re.sub(r"^jit\(\w+\)/(shard_map/)?", "", where))


def kernels(text: str) -> list[Kernel]:
    """The kernels of a program that was compiled for a GPU or a TPU.

    Args:
      text: `compiled.as_text()`.
    """
    return _Program(text).kernels()


def summarize(text: str) -> dict[str, Any]:
    """Add up the kernels of a program that was compiled for a GPU or a TPU.

    Args:
      text: `compiled.as_text()`.

    Returns:
      Plain values: {"kernels": their number, "bytes": their traffic, "product_bytes": that of
      kernels with matrix products, "products": {what computes them: number}, "float32_products":
      {where: number}, "parts": [{"where", "kernels", "bytes"}], the largest first}, where being
      JAX's name stack with one name for all blocks.
    """
    products: collections.Counter[str] = collections.Counter()
    float32_products: collections.Counter[str] = collections.Counter()
    part_kernels: collections.Counter[str] = collections.Counter()
    part_bytes: collections.Counter[str] = collections.Counter()
    product_bytes = 0
    for kernel in kernels(text):
        part_kernels[kernel.where] += kernel.times
        part_bytes[kernel.where] += kernel.times * kernel.size
        if kernel.product:
            products[kernel.product] += kernel.times
            product_bytes += kernel.times * kernel.size
        if kernel.is_float32:
            float32_products[kernel.where] += kernel.times
    parts = []
    for where, size in part_bytes.most_common():
        parts.append({"where": where, "kernels": part_kernels[where], "bytes": size})
    return {
        "kernels": part_kernels.total(),
        "bytes": part_bytes.total(),
        "product_bytes": product_bytes,
        "products": dict(products),
        "float32_products": dict(float32_products),
        "parts": parts,
    }


def estimate_seconds(
    chip: accelerators.Chip, flops: float, program: Mapping[str, Any]
) -> dict[str, float]:
    """Estimate the time of a program on a GPU.

    The model: products at the rate of large bfloat16 products; then the traffic of other kernels,
    and half of that of products, at the bandwidth of a copy; then a constant for every kernel.
    Both rates were measured on an H100, and are taken to be the same shares of the data sheet on
    other GPUs. The half is fitted to steps of an H100; how far they are from the model is in
    docs/results/gpu.md.

    Args:
      chip: the GPU.
      flops: of one run of the program on one GPU.
      program: see `summarize`.

    Returns:
      {"products", "traffic", "kernel_starts"}, in seconds.
    """
    hidden = (1 - PRODUCT_TRAFFIC) * program["product_bytes"]
    return {
        "products": flops / (PRODUCT_SHARE * chip.flops),
        "traffic": (program["bytes"] - hidden) / (BANDWIDTH_SHARE * chip.bandwidth),
        "kernel_starts": program["kernels"] * KERNEL_SECONDS,
    }


def is_estimable(seconds: Mapping[str, float]) -> bool:
    """Whether an estimate by `estimate_seconds` means something: kernels do more than start."""
    return seconds["kernel_starts"] < seconds["products"] + seconds["traffic"]
