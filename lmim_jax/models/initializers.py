"""PyTorch-compatible initializers: redraw the linear layers of a parameter tree.

`layers.Dense` itself starts from xavier-uniform kernels and zero biases.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array

Shape = tuple[int, ...]


def torch_default(rng: Array, params: dict[str, Any]) -> dict[str, Any]:
    """Redraw kernels and biases as torch's nn.Linear does: uniform within +-1 / sqrt(in).

    Args:
      rng: random key.
      params: nested dict of parameters; only linear layers are changed.
    """
    return _redraw(rng, params, _torch_kernel, _torch_uniform)


def normal(rng: Array, params: dict[str, Any], stddev: float = 0.02) -> dict[str, Any]:
    """Redraw kernels from a normal distribution with mean 0, and set biases to 0.

    Torch's `trunc_normal_` truncates at +-2, a hundred standard deviations away.

    Args:
      rng: random key.
      params: nested dict of parameters; only linear layers are changed.
      stddev: standard deviation of kernels.
    """
    return _redraw(rng, params, nn.initializers.normal(stddev), _zeros)


def xavier_by_projection(params: dict[str, Any]) -> dict[str, Any]:
    """Rescale fused projections as if queries, keys and values had xavier-uniform kernels each.

    Args:
      params: nested dict of fresh parameters; only the kernels of "qkv" and "kv" are changed.
    """
    flat = flatten_dict(params, keep_empty_nodes=True)
    for path, value in flat.items():
        parts = {"qkv": 3, "kv": 2}.get(path[-2]) if path[-1] == "kernel" else None
        if parts:
            rows, columns = value.shape
            flat[path] = value * ((rows + columns) / (rows + columns / parts)) ** 0.5
    return unflatten_dict(flat)


def _redraw(
    rng: Array,
    params: dict[str, Any],
    init_kernel: Callable[[Array, Shape], Array],
    init_bias: Callable[[Array, Shape, int], Array],
) -> dict[str, Any]:
    """Redraw every kernel [in, out] as init_kernel(key, shape).

    The bias beside it is redrawn as init_bias(key, shape, in).
    """
    flat = flatten_dict(params, keep_empty_nodes=True)
    for i, path in enumerate(sorted(flat)):
        key = jax.random.fold_in(rng, i)
        kernel_path = path[:-1] + ("kernel",)
        if path[-1] == "kernel":
            flat[path] = init_kernel(key, flat[path].shape)
        elif path[-1] == "bias" and kernel_path in flat:
            flat[path] = init_bias(key, flat[path].shape, flat[kernel_path].shape[0])
    return unflatten_dict(flat)


def _torch_uniform(key: Array, shape: Shape, fan_in: int) -> Array:
    bound = fan_in**-0.5
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def _torch_kernel(key: Array, shape: Shape) -> Array:
    return _torch_uniform(key, shape, shape[0])


def _zeros(key: Array, shape: Shape, fan_in: int) -> Array:
    del key, fan_in
    return jnp.zeros(shape)
