"""Statistics of the train step's program: float32 products, host transfers, copies, collectives.

Two forms of the program are read, operation by operation. StableHLO is the input of the compiler
and the same on any device. HLO is what the compiler made of it for this device; its CPU backend,
for example, turns bfloat16 products into float32 ones.
"""

import collections
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from lmim_jax.perf import hlo

PRODUCTS = ("stablehlo.dot_general", "stablehlo.convolution")
HOST_OPCODES = ("infeed", "outfeed", "send", "recv")
_END_OF_CALL = re.compile(r"\)(?:,|$)")
_OPERAND = re.compile(r"%([\w.\-]+)")


class Instruction(NamedTuple):
    """A line of HLO.

    Attributes:
      computation: that it is part of.
      name: unique in the program.
      type: of the result, with layouts: "f32[2,3]{1,0}", or a tuple of such.
      opcode: "fusion", "copy", "dot", ...
      operands: their names.
      calls: the computation that a fusion calls; "" for other instructions.
      applies: the computation that a reduction, sort or call applies; "" for other instructions.
      target: of a custom call; "" for other instructions.
      backend: of a fusion on a GPU, what makes its kernel: "__triton_gemm", ...; "" if not named.
      where: JAX's name stack.
    """

    computation: str
    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    calls: str
    applies: str
    target: str
    backend: str
    where: str


def lowered_stats(lowered: jax.stages.Lowered) -> dict[str, Any]:
    """Statistics of a lowered program (`jitted.lower(...)`), from its StableHLO.

    Returns:
      {"products": number of matrix products and convolutions, "float32_products": {where: number}
      of those that read float32, where being JAX's name stack without numbers,
      "imprecise_products": {where: number} of those among them that name no highest precision, and
      so are TF32 on NVIDIA GPUs and bfloat16 on TPUs, "host_transfers": number}.
    """
    products = 0
    float32_products: collections.Counter[str] = collections.Counter()
    imprecise_products: collections.Counter[str] = collections.Counter()
    host_transfers = 0
    module: Any = lowered.compiler_ir(dialect="stablehlo")
    for operation in _operations(module.operation):
        if operation.name in PRODUCTS:
            products += 1
            if _reads_float32(operation):
                float32_products[_name_stack(operation)] += 1
                if not _is_highest_precision(operation):
                    imprecise_products[_name_stack(operation)] += 1
        elif _is_host_transfer(operation):
            host_transfers += 1
    return {
        "products": products,
        "float32_products": dict(float32_products),
        "imprecise_products": dict(imprecise_products),
        "host_transfers": host_transfers,
    }


def _operations(operation: Any) -> Iterator[Any]:
    """Yield all operations inside of one."""
    for region in operation.regions:
        for block in region.blocks:
            for inner in block.operations:
                yield inner.operation
                yield from _operations(inner.operation)


def _reads_float32(operation: Any) -> bool:
    """Whether an operand of a StableHLO operation is a float32 array."""
    return any("xf32>" in str(operand.type) for operand in operation.operands)


def _is_highest_precision(operation: Any) -> bool:
    """Whether a StableHLO product names the highest precision for both operands."""
    if "precision_config" not in operation.attributes:
        return False
    return str(operation.attributes["precision_config"]).count("HIGHEST") == 2


def _is_host_transfer(operation: Any) -> bool:
    """Whether a StableHLO operation exchanges data with the host."""
    if operation.name == "stablehlo.custom_call":
        return "callback" in str(operation.attributes["call_target_name"])
    return operation.name.removeprefix("stablehlo.") in HOST_OPCODES


def _name_stack(operation: Any) -> str:
    """Name stack of an operation within the jitted function: "jvp(ViT)/block/attn/dot_general"."""
    return re.sub(r"^jit\(\w+\)/|\d+", "", str(operation.location).split('"')[1])


def compiled_stats(compiled: jax.stages.Compiled) -> dict[str, Any]:
    """Statistics of a compiled program.

    Operations inside a fusion are not counted; those in a loop are counted once.

    Returns:
      {"fusions", "copies", "host_transfers": numbers of operations, "collectives": number,
      "collective_bytes": in bytes, "memory": {"arguments", "temporaries", "outputs", "aliased"} in
      bytes, "aliased" being outputs that take the place of donated arguments}.
    """
    text = compiled.as_text()
    counts = _count_opcodes(instructions(text))
    collectives = hlo.collectives(text)
    memory: Any = compiled.memory_analysis()
    return {
        "fusions": counts["fusion"],
        "copies": counts["copy"] + counts["copy-start"],
        "host_transfers": counts["callback"] + sum(counts[opcode] for opcode in HOST_OPCODES),
        "collectives": sum(collective.times for collective in collectives),
        "collective_bytes": sum(collective.times * collective.size for collective in collectives),
        "memory": {
            "arguments": memory.argument_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "outputs": memory.output_size_in_bytes,
            "aliased": memory.alias_size_in_bytes,
        },
    }


def _count_opcodes(program: list[Instruction]) -> collections.Counter[str]:
    """Number of instructions outside of fusions by opcode, and of host callbacks as "callback"."""
    fused = {instruction.calls for instruction in program if instruction.opcode == "fusion"}
    counts: collections.Counter[str] = collections.Counter()
    for instruction in program:
        if instruction.computation not in fused:
            counts[instruction.opcode] += 1
        if "callback" in instruction.target:
            counts["callback"] += 1
    return counts


def instructions(text: str) -> list[Instruction]:
    """The instructions of a compiled program.

    Args:
      text: `compiled.as_text()`.
    """
    found = []
    computation = ""
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith((" ", "HloModule")):
            computation = line.removeprefix("ENTRY ").split(" ", 1)[0].lstrip("%")
            continue
        name, equals, definition = line.partition(" = ")
        if equals:
            result, call = _split_definition(definition)
            opcode, _, arguments = call.partition("(")
            instruction = Instruction(
                computation=computation,
                name=name.strip().removeprefix("ROOT ").lstrip("%"),
                type=result,
                opcode=opcode,
                operands=tuple(_OPERAND.findall(_END_OF_CALL.split(arguments, maxsplit=1)[0])),
                calls=_between(call, " calls=", ",").strip().lstrip("%"),
                applies=_between(call, " to_apply=", ",").strip().lstrip("%"),
                target=_between(call, 'custom_call_target="', '"'),
                backend=_between(_between(call, "backend_config=", "\n"), '"kind":"', '"'),
                where=_between(call, 'op_name="', '"'),
            )
            found.append(instruction)
    return found


def _between(text: str, start: str, end: str) -> str:
    """The text from `start` to the next `end`, without these; "" if there is no `start`."""
    return text.partition(start)[2].partition(end)[0]


def _split_definition(definition: str) -> tuple[str, str]:
    """Split "f32[2,3]{1,0} copy(%x), ..." behind the type, a tuple of which can contain spaces."""
    depth = 0
    for end, character in enumerate(definition):
        if character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif character == " " and not depth:
            return definition[:end], definition[end + 1 :]
    return "", ""
