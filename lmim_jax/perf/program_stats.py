"""What the train step's program holds: float32 products, transfers to the host, copies, kernels, messages.

Both forms are read operation by operation: StableHLO is what was asked of the compiler, on any device; HLO is what it
made of it for this one (its CPU backend, for one, turns bfloat16 products into float32 ones).
"""

import collections
import re
import typing

from lmim_jax.perf import hlo

PRODUCTS = "stablehlo.dot_general", "stablehlo.convolution"
HOST = {"infeed", "outfeed", "send", "recv"}
OPCODES = {"fusions": ("fusion",), "copies": ("copy", "copy-start"), "host_transfers": tuple(HOST)}


def asked(lowered):
    """Facts of a lowered program (`jitted.lower(...)`), from its StableHLO.

    Returns:
      {"products": how many matrix products and convolutions, "float32_products": {where: how many} of those that read
      float32, where being JAX's name stack without numbers, "host_transfers": how many}.
    """
    products, float32, host = 0, collections.Counter(), 0
    for operation in _operations(lowered.compiler_ir(dialect="stablehlo").operation):
        name = operation.name
        if name in PRODUCTS:
            products += 1
            if any("xf32>" in str(operand.type) for operand in operation.operands):
                float32[_where(operation)] += 1
        elif name.removeprefix("stablehlo.") in HOST:
            host += 1
        elif name == "stablehlo.custom_call":
            host += "callback" in str(operation.attributes["call_target_name"])
    return {"products": products, "float32_products": dict(float32), "host_transfers": host}


def _operations(operation):
    """Yield all operations inside of one."""
    for region in operation.regions:
        for block in region.blocks:
            for inner in block.operations:
                yield inner.operation
                yield from _operations(inner.operation)


def _where(operation):
    """Name stack of an operation, within the jitted function: "jvp(ViT)/block/attn/dot_general"."""
    return re.sub(r"^jit\(\w+\)/|\d+", "", str(operation.location).split('"')[1])


def made(compiled):
    """Facts of a compiled program: how many fusions, copies and host transfers, what it communicates, its memory.

    Counted are operations that run by themselves, not those inside a fusion; what is in a loop counts once.
    """
    text = compiled.as_text()
    program, messages, sizes = instructions(text), hlo.collectives(text), compiled.memory_analysis()
    fused = {one.calls for one in program if one.opcode == "fusion"}
    total = collections.Counter(one.opcode for one in program if one.computation not in fused)
    total["outfeed"] += sum("callback" in one.target for one in program)
    return {
        **{name: sum(total[opcode] for opcode in opcodes) for name, opcodes in OPCODES.items()},
        "collectives": sum(one.times for one in messages),
        "collective_bytes": sum(one.times * one.size for one in messages),
        "memory": {
            "arguments": sizes.argument_size_in_bytes,
            "temporaries": sizes.temp_size_in_bytes,
            "outputs": sizes.output_size_in_bytes,
            "aliased": sizes.alias_size_in_bytes,  # outputs in the place of donated arguments
        },
    }


class Instruction(typing.NamedTuple):
    """A line of HLO: its computation, name and opcode; what a fusion calls, a custom call's target, its name stack."""

    computation: str
    name: str
    opcode: str
    calls: str
    target: str
    where: str


def instructions(text):
    """The list of Instructions of a compiled program (`compiled.as_text()`)."""
    found, computation = [], None
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith((" ", "HloModule")):
            computation = line.removeprefix("ENTRY ").split(" ", 1)[0].lstrip("%")
            continue
        name, equals, rest = line.partition(" = ")
        if equals:
            calls = rest.partition(" calls=")[2].partition(",")[0].strip().lstrip("%")
            target, where = (
                rest.partition(key)[2].partition('"')[0]
                for key in ('custom_call_target="', 'op_name="')
            )
            name = name.strip().removeprefix("ROOT ").lstrip("%")
            found.append(Instruction(computation, name, _opcode(rest), calls, target, where))
    return found


def _opcode(rest):
    """ "copy" of "f32[2,3]{1,0} copy(%x)". The type may be a tuple, with spaces and brackets in it."""
    depth = 0
    for end, character in enumerate(rest):
        depth += (character in "([{") - (character in ")]}")
        if character == " " and not depth:
            return rest[end + 1 :].partition("(")[0]
    return ""
