"""An encoder on its way out: the Vision Transformer that `method.features` runs, in PyTorch's names and layouts."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from lmim_jax.convert.official.base import convolution, layout_of, torch_name, with_cls
from lmim_jax.models.vit import ViT
from lmim_jax.utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class Encoder:
    """What other libraries need to know of it.

    image_size: (height, width) in pixels that its positions are for. hidden: width of the MLPs. qkv_bias: whether
    queries, keys and values have a bias; where only some have, the others' is 0. tensors: {name: float32 array}, named
    as in timm: `patch_embed.proj.weight` [D, C, p, p], `pos_embed` [1, 1 + N, D] with CLS in front (or [1, N, D]).
    """

    image_size: tuple[int, int]
    patch_size: int
    channels: int
    width: int
    depth: int
    heads: int
    hidden: int
    norm_eps: float
    cls: bool
    qkv_bias: bool
    tensors: dict


def of(method, params):
    """The Encoder of a method.

    Raises:
      UserError: it has what no other library's Vision Transformer has.
    """
    vit, positions = _as_called(method, params)
    if vit.final_norm_eps not in (None, vit.norm_eps):
        raise UserError(
            f"config.method.norm_eps={vit.norm_eps} and final_norm_eps={vit.final_norm_eps} differ, and timm and "
            "transformers have one for all norms; only --format=flax | safetensors can hold this encoder"
        )
    if vit.width % vit.heads:
        raise UserError(
            f"config.method.heads={vit.heads} must divide width={vit.width} for timm and transformers"
        )
    patch_embed = (r"patch_embed/kernel", convolution(method.patch_size))
    tensors = {"pos_embed": (with_cls(positions) if vit.cls else positions)[None]}
    for path, value in flatten_dict(params["encoder"], sep="/").items():
        if path == "positions":  # learned ones: in pos_embed already
            continue
        name = torch_name(path).replace("patch_embed.", "patch_embed.proj.")
        value = np.asarray(value, np.float32)
        if path.endswith("qkv/bias"):
            value = _whole_bias(value, vit)
        tensors[name] = np.ascontiguousarray(layout_of(path, (patch_embed,)).theirs(value))
    return Encoder(
        image_size=method.feature_size,
        patch_size=method.patch_size,
        channels=method.channels,
        width=vit.width,
        depth=vit.depth,
        heads=vit.heads,
        hidden=params["encoder"]["block00"]["mlp"]["fc1"]["kernel"].shape[1],
        norm_eps=vit.norm_eps,
        cls=vit.cls,
        qkv_bias=bool(np.any(vit.qkv_bias)),
        tensors=tensors,
    )


def _as_called(method, params):
    """(the ViT, its positions [N, D]) as `method.features` calls it: whatever a method does, this is what it gives."""
    seen = {}

    def catch(call, arguments, options, context):
        if isinstance(context.module, ViT) and context.method_name == "__call__":
            seen.update(vit=context.module, positions=arguments[1])
        return call(*arguments, **options)

    def positions(params):
        with nn.intercept_methods(catch):
            method.features(params, jnp.zeros((1, *method.feature_size, method.channels)))
        return seen["positions"][0]

    return (lambda found: (seen["vit"], np.asarray(found, np.float32)))(jax.jit(positions)(params))


def _whole_bias(bias, vit):
    """Bias [3 D] of queries, keys and values from that of those which have one."""
    on = np.repeat(np.broadcast_to(vit.qkv_bias, 3), vit.width)
    whole = np.zeros(3 * vit.width, np.float32)
    whole[on] = bias
    return whole
