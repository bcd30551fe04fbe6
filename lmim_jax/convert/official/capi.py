"""The state dict of facebookresearch/capi: `student`, `student_ema` and `teacher.head`.

The backbone of its teacher is `student_ema.backbone`. A published file holds one backbone, whose
names begin with `backbone.`: it is read as the student's, and the teacher starts as a copy of it.
"""

import numpy as np

from lmim_jax.convert.official.base import Arrays, Layout, StateDictSpec, convolution
from lmim_jax.methods.capi import Method
from lmim_jax.models.rope import angular_frequencies

RENAMES = (
    (r"^clustering\.", "teacher.head.layer."),
    (r"^target\.(encoder|predictor)\.", r"student_ema.backbone.\1."),
    (r"^target\.head\.", "student_ema.head.last_layer."),
    (r"^(encoder|predictor)\.", r"student.backbone.\1."),
    (r"^head\.", "student.head.last_layer."),
    (r"\.last_layer\.weight$", ".last_layer.weight_v"),
    (r"\.last_layer\.gain$", ".last_layer.weight_g"),
    (r"\.backbone\.predictor\.", ".backbone.decoder."),
    (r"\.(encoder|decoder)\.(patch_embed|registers|mask_token)", r".\2"),
    (r"\.norm([12])\.", r".residual\1.norm."),
    (r"\.attn\.", ".residual1.fn."),
    (r"\.mlp\.", ".residual2.fn."),
    (r"\.fn\.q\.", ".fn.q_proj."),
)
# Our mask token is [1, 1, d] and theirs [1, d]; our gains are [K] and theirs [K, 1]
MASK_TOKEN = Layout(lambda x: x[0], lambda x: x[None])
GAIN = Layout(lambda x: x[:, None], lambda x: x[:, 0])


def describe(method: Method) -> StateDictSpec:
    """Describe the state dict of CAPI."""
    return StateDictSpec(
        renames=RENAMES,
        layouts=(
            (r".*/patch_embed/kernel", convolution(method.patch_size)),
            (r".*/mask_token", MASK_TOKEN),
            (r".*/gain", GAIN),
        ),
        constants=_frequencies(method),
        # They are parameters there: averages in float32, which drift
        relative_tolerance=1e-2,
        splits=(
            (r"\.qkv\.weight$", (".q_proj.weight", ".k_proj.weight", ".v_proj.weight")),
            (r"\.kv\.weight$", (".k_proj.weight", ".v_proj.weight")),
        ),
        aliases=((r"^backbone\.", "student.backbone."),),
    )


def _frequencies(method: Method) -> Arrays:
    """The frequencies of the rotary embeddings of every block."""
    networks = {
        "encoder": (method.depth, method.width // method.heads),
        "decoder": (method.decoder_depth, method.decoder_width // method.decoder_heads),
    }
    constants: dict[str, np.ndarray] = {}
    for model in ("student", "student_ema"):
        for network, (depth, head_width) in networks.items():
            for block in range(depth):
                name = f"{model}.backbone.{network}.blocks.{block}.residual1.fn.rope.freqs"
                constants[name] = angular_frequencies(head_width, method.rope_frequencies)
    return constants
