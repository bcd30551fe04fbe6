"""Floating-point operations of a method, counted in its traced program; nothing is compiled or run.

Counted are matrix products and convolutions, 2 per multiply-add, loops as often as they run: the model's FLOPs, by
which utilisation is stated. What is recomputed to save memory is not counted, nor is element-wise work (2 % at ViT-B).
"""

import collections
import dataclasses
import math
import re

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval


@dataclasses.dataclass(frozen=True)
class Count:
    """FLOPs per image. parts: {module: (forward, backward)}, as "ViT" (online and target), "LatentDecoder", "loss"."""

    parts: dict

    @property
    def forward(self):
        """Of the loss, online and target branch."""
        return sum(forward for forward, _ in self.parts.values())

    @property
    def backward(self):
        """Of its gradient."""
        return sum(backward for _, backward in self.parts.values())

    @property
    def total(self):
        """Of a training step, per image."""
        return self.forward + self.backward

    def table(self):
        """Lines of text, in GFLOP per image."""
        rows = [*self.parts.items(), ("total", (self.forward, self.backward))]
        lines = [f"{'GFLOP per image':<20}{'forward':>10}{'backward':>10}{'total':>10}"]
        return lines + [
            f"{name:<20}{f / 1e9:>10.2f}{b / 1e9:>10.2f}{(f + b) / 1e9:>10.2f}"
            for name, (f, b) in rows
        ]


def of_method(method, batch=1):
    """Count `value_and_grad(method.loss_fn)` per image, augmentation and optimiser left out.

    Args:
      method: see methods/base.py; as it would run unrolled and without rematerialisation.
      batch: images to trace with; the count is per image all the same.
    """
    params = jax.eval_shape(method.init, jax.random.key(0))
    target = jax.eval_shape(method.target_of, params)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
    views = jax.eval_shape(method.sample, jax.random.key(0), keys)
    images = jax.ShapeDtypeStruct((batch, *method.image_size, method.channels), jnp.float32)
    step = jax.ShapeDtypeStruct((), jnp.int32)
    gradient = jax.value_and_grad(lambda *args: method.loss_fn(*args)[0])
    return Count(by_part(gradient, params, target, images, views, step, per=batch))


def by_part(function, *args, per=1):
    """{part: (forward, backward)} of a function of abstract or real arrays, divided by `per`.

    A part is the outermost Linen module (by its class), "loss" for what is in none.
    """
    found = collections.defaultdict(lambda: [0, 0])
    for stack, flops in _products(jax.make_jaxpr(function)(*args).jaxpr):
        module = re.search(
            r"\b[A-Z]\w*[a-z]\w*", stack
        )  # of "/transpose(jvp(ViT))/block00/attn/qkv": ViT
        found[module[0] if module else "loss"]["transpose(" in stack] += flops
    return {name: (forward / per, backward / per) for name, (forward, backward) in found.items()}


def _products(jaxpr, outer="", times=1):
    """Yield (name stack, FLOPs) of every matrix product whose result is used."""
    jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)
    for equation in jaxpr.eqns:
        stack, name = f"{outer}/{equation.source_info.name_stack}", equation.primitive.name
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            depth = math.prod(left[axis] for axis in contracted)
            yield stack, times * 2 * depth * math.prod(equation.outvars[0].aval.shape)
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            out = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
            yield (
                stack,
                times * 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / out,
            )
        inner = [
            p
            for p in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_program)
            if _is_program(p)
        ]
        if name == "cond":  # one of its branches runs: the longest
            inner = [
                max(inner, key=lambda branch: sum(flops for _, flops in _products(_open(branch))))
            ]
        if name == "custom_vjp_call":  # the backward rule is traced where it is used
            inner = inner[:1]
        for program in inner:
            yield from _products(_open(program), stack, times * equation.params.get("length", 1))


def _is_program(value):
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


def _open(program):
    return getattr(program, "jaxpr", program)
