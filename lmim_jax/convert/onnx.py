"""ONNX files, which ONNX Runtime and other inference engines run.

The graph is built from the tensors themselves, so that exporting needs the package `onnx` alone.

Letters: B batch, H W image height and width, C channels, N patches, T tokens, D width, A heads.
"""

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lmim_jax.convert.torch_encoder import TorchEncoder

FILE = "model.onnx"
DATA_FILE = "model.onnx.data"  # holds the weights where they are too large for a protobuf
OPSET = 17  # the first with LayerNormalization
IR_VERSION = 8  # of the ONNX release that brought this opset
MAX_INLINE_BYTES = 1 << 30  # of weights; a protobuf can have 2 GiB
MEAN, CLS, PATCHES = "mean", "cls", "patches"  # outputs


def write(path: pathlib.Path, encoder: TorchEncoder, images: Mapping[str, Any]) -> None:
    """Write the encoder as a graph.

    Its input is `images`, float32 [B, C, H, W], normalized; its outputs, all after the last norm:
    `mean` [B, D] over the patches, `cls` [B, D], if there is a CLS token, and `patches` [B, N, D].
    B is free.

    Args:
      path: of the file; large weights are written beside it.
      encoder: the encoder to export.
      images: how images are prepared, stored as metadata: "mean", "std", "interpolation", "resize"
        (the short side in pixels before the center crop).
    """
    import onnx

    model = _Graph(encoder).build(images)
    size = sum(tensor.nbytes for tensor in encoder.tensors.values())
    external = size > MAX_INLINE_BYTES
    onnx.save_model(
        model, path, save_as_external_data=external, location=DATA_FILE, size_threshold=1024
    )
    onnx.checker.check_model(str(path), full_check=True)


class _Graph:
    """Builds the nodes of an encoder one after the other."""

    def __init__(self, encoder: TorchEncoder) -> None:
        """Start an empty graph."""
        self._encoder = encoder
        self._nodes: list[Any] = []
        self._initializers: dict[str, Any] = {}

    def build(self, images: Mapping[str, Any]) -> Any:
        """The model, see `write`."""
        from onnx import TensorProto, helper

        encoder = self._encoder
        height, width = encoder.image_size
        num_patches = math.prod(encoder.image_size) // encoder.patch_size**2
        shapes: dict[str, list[str | int | None]] = {MEAN: ["batch", encoder.width]}
        if encoder.cls:
            shapes[CLS] = ["batch", encoder.width]
        shapes[PATCHES] = ["batch", num_patches, encoder.width]
        self._add_outputs(self._add_encoder())
        outputs = []
        for name, shape in shapes.items():
            outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        image_shape: list[str | int | None] = ["batch", encoder.channels, height, width]
        graph = helper.make_graph(
            self._nodes,
            "encoder",
            [helper.make_tensor_value_info("images", TensorProto.FLOAT, image_shape)],
            outputs,
            list(self._initializers.values()),
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="lmim_jax",
        )
        helper.set_model_props(model, {name: json.dumps(value) for name, value in images.items()})
        return model

    def _add_encoder(self) -> str:
        """All tokens [B, T, D] after the last norm."""
        x = self._add_embedding()
        for i in range(self._encoder.depth):
            block = f"blocks.{i}"
            normed = self._norm(x, f"{block}.norm1", self._encoder.norm_eps)
            x = self._op("Add", [x, self._attention(normed, f"{block}.attn")])
            normed = self._norm(x, f"{block}.norm2", self._encoder.norm_eps)
            x = self._op("Add", [x, self._mlp(normed, f"{block}.mlp")])
        return self._norm(x, "norm", self._encoder.final_norm_eps)

    def _add_embedding(self) -> str:
        """Patches and CLS with their positions, [B, T, D]."""
        size = self._encoder.patch_size
        weights = [self._weight("patch_embed.proj.weight"), self._weight("patch_embed.proj.bias")]
        x = self._op("Conv", ["images", *weights], kernel_shape=[size, size], strides=[size, size])
        x = self._op("Reshape", [x, self._shape(0, self._encoder.width, -1)])
        x = self._op("Transpose", [x], perm=[0, 2, 1])
        if self._encoder.cls:
            batch = self._op("Shape", [x], start=0, end=1)
            ends = self._shape(1, self._encoder.width)
            cls_shape = self._op("Concat", [batch, ends], axis=0)
            cls = self._op("Expand", [self._weight("cls_token"), cls_shape])
            x = self._op("Concat", [cls, x], axis=1)
        return self._op("Add", [x, self._weight("pos_embed")])

    def _attention(self, x: str, name: str) -> str:
        """Self-attention of tokens [B, T, D]."""
        width = self._encoder.width
        heads = self._encoder.heads
        qkv = self._linear(x, f"{name}.qkv")
        qkv = self._op("Reshape", [qkv, self._shape(0, 0, 3, heads, width // heads)])
        qkv = self._op("Transpose", [qkv], perm=[2, 0, 3, 1, 4])  # [3, B, A, T, D / A]
        parts = []
        for i in range(3):
            index = self._constant(f"index{i}", np.array(i, np.int64))
            parts.append(self._op("Gather", [qkv, index], axis=0))
        query, key, value = parts
        scale = self._constant("scale", np.array((width // heads) ** -0.5, np.float32))
        query = self._op("Mul", [query, scale])
        key = self._op("Transpose", [key], perm=[0, 1, 3, 2])
        weights = self._op("Softmax", [self._op("MatMul", [query, key])], axis=-1)
        x = self._op("MatMul", [weights, value])
        x = self._op("Transpose", [x], perm=[0, 2, 1, 3])
        x = self._op("Reshape", [x, self._shape(0, 0, width)])
        return self._linear(x, f"{name}.proj")

    def _mlp(self, x: str, name: str) -> str:
        """Linear layer, exact GELU, linear layer."""
        x = self._linear(x, f"{name}.fc1")
        root = self._constant("root2", np.array(math.sqrt(2), np.float32))
        one = self._constant("one", np.array(1, np.float32))
        half = self._constant("half", np.array(0.5, np.float32))
        error = self._op("Erf", [self._op("Div", [x, root])])
        x = self._op("Mul", [x, self._op("Add", [error, one])])
        return self._linear(self._op("Mul", [x, half]), f"{name}.fc2")

    def _add_outputs(self, tokens: str) -> None:
        """Name the parts of the tokens [B, T, D]."""
        axis = self._shape(1)
        first_patch = int(self._encoder.cls)
        end = self._shape(np.iinfo(np.int64).max)
        self._op("Slice", [tokens, self._shape(first_patch), end, axis], output=PATCHES)
        self._op("ReduceMean", [PATCHES], output=MEAN, axes=[1], keepdims=0)
        if self._encoder.cls:
            index = self._constant("index0", np.array(0, np.int64))
            self._op("Gather", [tokens, index], output=CLS, axis=1)

    def _linear(self, x: str, name: str) -> str:
        """A linear layer, with a bias if it has one."""
        weight = self._encoder.tensors[f"{name}.weight"]
        x = self._op("MatMul", [x, self._constant(f"{name}.weight", weight.T)])
        if f"{name}.bias" in self._encoder.tensors:
            x = self._op("Add", [x, self._weight(f"{name}.bias")])
        return x

    def _norm(self, x: str, name: str, epsilon: float) -> str:
        """A LayerNorm over D."""
        weights = [self._weight(f"{name}.weight"), self._weight(f"{name}.bias")]
        return self._op("LayerNormalization", [x, *weights], axis=-1, epsilon=epsilon)

    def _op(self, kind: str, inputs: Sequence[str], output: str = "", **attributes: Any) -> str:
        """Add a node; the name of its output."""
        from onnx import helper

        output = output or f"{kind}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def _weight(self, name: str) -> str:
        """The name of one of the encoder's tensors."""
        return self._constant(name, self._encoder.tensors[name])

    def _shape(self, *sizes: int) -> str:
        """The name of a vector of integers."""
        name = "ints_" + "_".join(map(str, sizes))
        return self._constant(name, np.array(sizes, np.int64))

    def _constant(self, name: str, array: np.ndarray) -> str:
        """The name of an array, which is stored once."""
        from onnx import numpy_helper

        if name not in self._initializers:
            contiguous = np.ascontiguousarray(array).reshape(array.shape)
            self._initializers[name] = numpy_helper.from_array(contiguous, name)
        return name
