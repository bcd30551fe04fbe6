"""An encoder in PyTorch layout: the ViT that `method.features` runs, with timm's names.

Letters: B batch, N patches, D width, C channels, p patch size.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float

from lmim_jax.convert.official.base import convolution, layout_of, torch_name, with_cls
from lmim_jax.methods.base import Method, Params
from lmim_jax.models.vit import ViT
from lmim_jax.utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class TorchEncoder:
    """The sizes and the weights of a ViT, as other libraries need them.

    Attributes:
      image_size: (height, width) in pixels that its positions belong to.
      patch_size: p.
      channels: C.
      width: D.
      depth: number of blocks.
      heads: attention heads.
      hidden: width of the MLPs.
      norm_eps: epsilon of the norms of the blocks.
      final_norm_eps: epsilon of the last norm.
      cls: whether it has a CLS token.
      qkv_bias: whether queries, keys or values have a bias; those without have a bias of 0 here.
      tensors: {name: float32 array}, named as in timm: `patch_embed.proj.weight` [D, C, p, p],
        `pos_embed` [1, 1 + N, D] with CLS in front (or [1, N, D]), ...
    """

    image_size: tuple[int, int]
    patch_size: int
    channels: int
    width: int
    depth: int
    heads: int
    hidden: int
    norm_eps: float
    final_norm_eps: float
    cls: bool
    qkv_bias: bool
    tensors: dict[str, np.ndarray]

    def require_equal_norms(self, library: str) -> None:
        """Check that the last norm has the epsilon of the others.

        Args:
          library: which has one for all norms.

        Raises:
          UserError: it has another one.
        """
        if self.final_norm_eps != self.norm_eps:
            raise UserError(
                f"config.method.norm_eps={self.norm_eps} and final_norm_eps={self.final_norm_eps} "
                f"differ, but {library} has one for all norms; --format=onnx, flax and safetensors "
                "can hold this encoder"
            )


def from_method(method: Method, params: Params) -> TorchEncoder:
    """Convert the encoder of a method.

    Args:
      method: the method.
      params: contains "encoder" and what else `method.features` needs.

    Raises:
      UserError: no Vision Transformer of other libraries has this architecture.
    """
    vit, positions = _capture_vit(method, params)
    _check_blocks(vit)
    if vit.width % vit.heads:
        raise UserError(
            f"config.method.heads={vit.heads} must divide width={vit.width} for other libraries"
        )
    return TorchEncoder(
        image_size=method.feature_size,
        patch_size=method.patch_size,
        channels=method.channels,
        width=vit.width,
        depth=vit.depth,
        heads=vit.heads,
        hidden=params["encoder"]["block00"]["mlp"]["fc1"]["kernel"].shape[1],
        norm_eps=vit.norm_eps,
        final_norm_eps=vit.final_norm_eps or vit.norm_eps,
        cls=vit.cls,
        qkv_bias=bool(np.any(vit.qkv_bias)),
        tensors=_torch_tensors(vit, positions, params["encoder"], method.patch_size),
    )


def _check_blocks(vit: ViT) -> None:
    """Raise a UserError for blocks that are not those of the original Vision Transformer."""
    problems = {
        f"registers={vit.registers}": vit.registers > 0,
        f"rope={vit.rope}": vit.rope != "none",
        f"norm={vit.norm}": vit.norm != "layer",
        "post-norm blocks": vit.post_norm,
        "several modalities (--modalities=NAME chooses one)": bool(vit.modalities),
    }
    listed = ", ".join(name for name, found in problems.items() if found)
    if listed:
        raise UserError(
            f"this encoder has {listed}, unlike the Vision Transformers of other libraries; "
            "--format=flax can hold it"
        )


def _capture_vit(method: Method, params: Params) -> tuple[ViT, Float[np.ndarray, "N D"]]:
    """Find the ViT and the positions with which `method.features` calls it.

    Whatever a method does to its positions, these are the ones its encoder gets.
    """
    captured: dict[str, Any] = {}

    def interceptor(call, args, kwargs, context):
        if isinstance(context.module, ViT) and context.method_name == "__call__":
            captured["vit"] = context.module
            captured["positions"] = args[1]
        return call(*args, **kwargs)

    @jax.jit
    def compute_positions(params: Params) -> Array:
        images = jnp.zeros((1, *method.feature_size, method.channels))
        with nn.intercept_methods(interceptor):
            method.features(params, images)
        return captured["positions"][0]

    positions = np.asarray(compute_positions(params), np.float32)
    return captured["vit"], positions


def _torch_tensors(
    vit: ViT, positions: Float[np.ndarray, "N D"], encoder: Params, patch_size: int
) -> dict[str, np.ndarray]:
    """Convert the parameters of an encoder to {timm's name: float32 array}."""
    if vit.cls:
        positions = with_cls(positions)
    tensors = {"pos_embed": positions[None]}
    layouts = ((r"patch_embed/kernel", convolution(patch_size)),)
    for path, leaf in flatten_dict(encoder, sep="/").items():
        if path == "positions":  # learned ones, which are in pos_embed already
            continue
        array = np.asarray(leaf, np.float32)
        if path.endswith("qkv/bias"):
            array = _full_qkv_bias(array, vit)
        name = torch_name(path).replace("patch_embed.", "patch_embed.proj.")
        tensors[name] = np.ascontiguousarray(layout_of(path, layouts).to_official(array))
    return tensors


def _full_qkv_bias(bias: Float[np.ndarray, " biases"], vit: ViT) -> Float[np.ndarray, " 3*D"]:
    """Fill the biases of queries, keys or values that have none with zeros."""
    has_bias = np.repeat(np.broadcast_to(vit.qkv_bias, 3), vit.width)
    full = np.zeros(3 * vit.width, np.float32)
    full[has_bias] = bias
    return full
