"""Floating-point operations of a method, counted in its traced program; nothing is compiled or run.

Matrix products and convolutions are counted, with 2 FLOPs per multiply-add, and loops as often as
they run: the model FLOPs that utilization (MFU) refers to. Recomputation that saves memory is not
counted, nor is element-wise work (2 % for ViT-B).
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval


@dataclasses.dataclass(frozen=True)
class FlopCount:
    """FLOPs per image.

    Attributes:
      parts: {module: (forward, backward)}, with modules such as "ViT" (online and target encoder),
        "LatentDecoder", and "loss".
    """

    parts: dict[str, tuple[float, float]]

    @property
    def forward(self) -> float:
        """FLOPs of the loss, online and target branch."""
        return sum(forward for forward, _ in self.parts.values())

    @property
    def backward(self) -> float:
        """FLOPs of the gradient of the loss."""
        return sum(backward for _, backward in self.parts.values())

    @property
    def total(self) -> float:
        """FLOPs of a training step, per image."""
        return self.forward + self.backward


def count_method(method: Any, batch: int = 1) -> FlopCount:
    """Count the FLOPs of `value_and_grad(method.loss_fn)` per image.

    Augmentation and optimizer are not included.

    Args:
      method: see methods/base.py; counted without scan over layers and without rematerialization.
      batch: number of images to trace with; the count is per image all the same.
    """
    params = jax.eval_shape(method.init, jax.random.key(0))
    target = jax.eval_shape(method.target_of, params)
    keys = abstract_keys(batch)
    views = jax.eval_shape(method.sample, jax.random.key(0), keys)
    shape = (batch,) + tuple(method.image_size) + (method.channels,)
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    step = jax.ShapeDtypeStruct((), jnp.int32)

    def loss(params, target, images, views, step):
        return method.loss_fn(params, target, images, views, step)[0]

    gradient = jax.value_and_grad(loss)
    return FlopCount(count_by_module(gradient, params, target, images, views, step, per=batch))


def masks_per_image(method: Any) -> int:
    """How many masks of an image a training step has."""
    return getattr(method, "masks_per_image", 1)


def share_of_masks(giga: float, masks: int) -> str:
    """What a mask costs, " (4 masks, 37.9 each)"; "" of a single one."""
    if masks == 1:
        return ""
    return f" ({masks} masks, {giga / masks:.4g} each)"


def abstract_keys(count: int) -> jax.ShapeDtypeStruct:
    """The shape and dtype of `count` random keys."""

    def split():
        return jax.random.split(jax.random.key(0), count)

    return jax.eval_shape(split)


def count_by_module(
    function: Callable[..., Any], *args: Any, per: int = 1
) -> dict[str, tuple[float, float]]:
    """Count the FLOPs of a function.

    Args:
      function: any function that JAX can trace.
      *args: its abstract or real arguments.
      per: the counts are divided by this number.

    Returns:
      {module: (forward, backward)}; the module is the class of the outermost Linen module, or
      "loss" for what is in none.
    """
    forward: collections.Counter[str] = collections.Counter()
    backward: collections.Counter[str] = collections.Counter()
    modules: dict[str, None] = {}  # in the order of their appearance
    for name_stack, flops in _products(jax.make_jaxpr(function)(*args).jaxpr):
        module = _outermost_module(name_stack)
        modules[module] = None
        if "transpose(" in name_stack:
            backward[module] += flops
        else:
            forward[module] += flops
    return {name: (forward[name] / per, backward[name] / per) for name in modules}


def _outermost_module(name_stack: str) -> str:
    """ "ViT" of "/transpose(jvp(ViT))/block00/attn/qkv"; "loss" where there is no module."""
    module = re.search(r"\b[A-Z]\w*[a-z]\w*", name_stack)
    if module:
        return module[0]
    return "loss"


def _products(jaxpr: Any, outer: str = "", times: int = 1) -> Iterator[tuple[str, int]]:
    """Yield (name stack, FLOPs) of every matrix product whose result is used.

    Args:
      jaxpr: the traced program.
      outer: name stack of what it is part of.
      times: how often it runs.
    """
    jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)
    for equation in jaxpr.eqns:
        name_stack = f"{outer}/{equation.source_info.name_stack}"
        flops = _equation_flops(equation)
        if flops:
            yield name_stack, times * flops
        iterations = equation.params.get("length", 1)  # of a scan
        for program in _inner_programs(equation):
            yield from _products(program, name_stack, times * iterations)


def _equation_flops(equation: Any) -> int:
    """FLOPs of one matrix product or convolution; 0 for anything else."""
    name = equation.primitive.name
    if name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        depth = math.prod(left[axis] for axis in contracted)
        return 2 * depth * math.prod(equation.outvars[0].aval.shape)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        channels = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
        per_output = math.prod(kernel) // channels
        return 2 * per_output * math.prod(equation.outvars[0].aval.shape)
    return 0


def _inner_programs(equation: Any) -> list[Any]:
    """The programs that an equation runs: bodies of loops, jitted functions, branches."""
    leaves = jax.tree.leaves(list(equation.params.values()), is_leaf=_is_program)
    programs = [_open(leaf) for leaf in leaves if _is_program(leaf)]
    name = equation.primitive.name
    if name == "cond":  # one of its branches runs: count the most expensive
        return [max(programs, key=_total_flops)]
    if name == "custom_vjp_call":  # the backward rule is traced where it is used
        return programs[:1]
    return programs


def _total_flops(jaxpr: Any) -> int:
    return sum(flops for _, flops in _products(jaxpr))


def _is_program(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


def _open(program: Any) -> Any:
    """The jaxpr of a closed jaxpr."""
    return getattr(program, "jaxpr", program)
