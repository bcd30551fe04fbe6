"""The state dict of data2vec 2.0 in fairseq (examples/data2vec), images; positions are constants.

The teacher is `_ema`, without decoder. The first blocks, `method.prenet_depth` of them, belong to
the modality there, and the others are numbered from 0.
"""

from lmim_jax.convert.official.base import Layout, StateDictSpec, convolution
from lmim_jax.methods.data2vec2 import Method
from lmim_jax.models.layers import sincos_positions

IMAGE = "modality_encoders.IMAGE."
# Our kernel is [k, k, in, out], and theirs [out, in, k, k]
CONVOLUTION = Layout(lambda x: x.transpose(3, 2, 0, 1), lambda x: x.transpose(2, 3, 1, 0))


def describe(method: Method) -> StateDictSpec:
    """Describe the state dict of data2vec 2.0."""
    positions = sincos_positions(method.grid, method.width, integer=True)[None]
    name = f"{IMAGE}fixed_positional_encoder.positions"
    return StateDictSpec(
        renames=_renames(method),
        layouts=(
            (r".*/patch_embed/kernel", convolution(method.patch_size)),
            (r".*/conv\d+/kernel", CONVOLUTION),
        ),
        constants={name: positions, f"_ema.{name}": positions},
    )


def _renames(method: Method) -> tuple[tuple[str, str], ...]:
    """Regexes on our names, and what replaces them."""
    renames = [
        (r"^target\.encoder\.", "_ema.encoder."),
        (r"(^|\.)encoder\.patch_embed\.", rf"\1{IMAGE}local_encoder.proj."),
        (r"(^|\.)encoder\.cls_token$", rf"\1{IMAGE}extra_tokens"),
        (r"(^|\.)encoder\.stem_norm\.", rf"\1{IMAGE}context_encoder.norm."),
        (r"^decoder\.conv(\d+)\.", rf"{IMAGE}decoder.blocks.\1.0."),
        (r"^decoder\.head\.", f"{IMAGE}decoder.proj."),
    ]
    for block in range(method.depth):
        theirs = f"blocks.{block - method.prenet_depth}."
        if block < method.prenet_depth:
            theirs = f"{IMAGE}context_encoder.blocks.{block}."
        renames.append((rf"(^|\.)encoder\.blocks\.{block}\.", rf"\g<1>{theirs}"))
    return tuple(renames)
