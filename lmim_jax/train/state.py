"""The training state: one pytree, born sharded."""

import flax.struct
import jax
import jax.numpy as jnp

from lmim_jax.distributed import sharding


@flax.struct.dataclass
class TrainState:
    """All that training needs to go on, and all that a checkpoint holds.

    step: int32 scalar, optimiser steps done. params, target, opt_state: float32 trees.
    rng: the run's key; every draw is a function of it and of the step, so it never changes.
    """

    step: jax.Array
    params: dict
    target: dict
    opt_state: tuple
    rng: jax.Array


def init(method, optimizer, rng):
    """A fresh state; the target starts as a copy of the online weights. Pure."""
    init_rng, run_rng = jax.random.split(rng)
    params = method.init(init_rng)
    target = jax.tree.map(jnp.copy, method.target_of(params))
    return TrainState(jnp.zeros((), jnp.int32), params, target, optimizer.init(params), run_rng)


def create(method, optimizer, seed, mesh, **layout):
    """A fresh state on the devices: shapes first, then placement, then `jit(init)`, so nothing is built on device 0.

    Args:
      layout: `rules` and `min_size` of `sharding.state_sharding`.

    Returns:
      (state, its tree of NamedShardings).
    """
    fresh = lambda: init(method, optimizer, jax.random.key(seed))
    shardings = sharding.state_sharding(jax.eval_shape(fresh), mesh, **layout)
    return jax.jit(fresh, out_shardings=shardings)(), shardings
