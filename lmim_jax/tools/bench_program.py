"""What the train step's program holds: float32 products, transfers to the host, copies, kernels, messages.

Both forms are read operation by operation: StableHLO is what was asked of the compiler, on any device; HLO is what it
made of it for this one (its CPU backend, for one, turns bfloat16 products into float32 ones).
"""

import collections
import re

from lmim_jax import hlo

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
    """Name stack of an operation: "jit(train_step)/jvp(ViT)/block/attn/dot_general"."""
    return re.sub(r"\d+", "", str(operation.location).split('"')[1])


def made(compiled):
    """Facts of a compiled program: how many fusions, copies and host transfers, what it communicates, its memory.

    Counted are operations that run by themselves, not those inside a fusion; what is in a loop counts once.
    """
    text = compiled.as_text()
    found, fused, computation = collections.defaultdict(collections.Counter), set(), None
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith((" ", "HloModule")):
            computation = line.removeprefix("ENTRY ").split(" ", 1)[0].lstrip("%")
            continue
        opcode = _opcode(line)
        found[computation][opcode] += 1
        if opcode == "fusion":
            fused.add(line.partition(" calls=")[2].partition(",")[0].strip().lstrip("%"))
        elif opcode == "custom-call":
            found[computation]["outfeed"] += "callback" in line.partition('custom_call_target="')[2].partition('"')[0]
    total = sum((counts for name, counts in found.items() if name not in fused), collections.Counter())
    messages = hlo.collectives(text)
    sizes = compiled.memory_analysis()
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


def _opcode(line):
    """ "copy" of "  %copy.1 = f32[2,3]{1,0} copy(%x)"; "" where there is none. Tuple types hold spaces and brackets."""
    _, _, rest = line.partition(" = ")
    if rest.startswith("("):
        depth = 0
        for end, character in enumerate(rest):
            depth += (character == "(") - (character == ")")
            if not depth:
                break
        rest = rest[end + 1 :]
    else:
        rest = rest.partition(" ")[2]
    return rest.strip().partition("(")[0]
