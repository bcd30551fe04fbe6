"""Other beginnings than the xavier-uniform one of `layers.Dense`: linear layers of a whole tree drawn anew."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict


def _redraw(rng, params, kernel, bias):
    """Replace every kernel [in, out] by kernel(key, shape), and its bias by bias(key, shape, in)."""
    flat = flatten_dict(params, keep_empty_nodes=True)
    for i, path in enumerate(sorted(flat)):
        key, beside = jax.random.fold_in(rng, i), (*path[:-1], "kernel")
        if path[-1] == "kernel":
            flat[path] = kernel(key, flat[path].shape)
        elif path[-1] == "bias" and beside in flat:
            flat[path] = bias(key, flat[path].shape, flat[beside].shape[0])
    return unflatten_dict(flat)


def torch_default(rng, params):
    """As torch's nn.Linear: kernels and biases uniform on +-1 / sqrt(in)."""
    uniform = lambda key, shape, size: jax.random.uniform(
        key, shape, minval=-(size**-0.5), maxval=size**-0.5
    )
    return _redraw(rng, params, lambda key, shape: uniform(key, shape, shape[0]), uniform)


def normal(rng, params, deviation=0.02):
    """Kernels normal with mean 0, biases 0 (torch's `trunc_normal_` cuts at +-2, a hundred deviations away)."""
    zeros = lambda key, shape, size: jnp.zeros(shape)
    return _redraw(rng, params, nn.initializers.normal(deviation), zeros)
