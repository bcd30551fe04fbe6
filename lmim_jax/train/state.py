"""The training state: one pytree, initialized with its sharding."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, Key

from lmim_jax.distributed import sharding


class TrainState(flax.struct.PyTreeNode):
    """All that training needs to resume, and all that a checkpoint holds.

    Attributes:
      step: optimizer steps done.
      params: float32 tree of the method's parameters.
      target: float32 tree of what the EMA tracks; see `target_of` in methods/base.py.
      opt_state: of the optimizer, float32.
      rng: the run's key; every draw is a function of it and of the step, so it never changes.
    """

    step: Int[Array, ""]
    params: Any
    target: Any
    opt_state: Any
    rng: Key[Array, ""]


def init_state(
    method: Any, optimizer: optax.GradientTransformation, rng: Key[Array, ""]
) -> TrainState:
    """A fresh state; the target starts as a copy of the online weights. Pure."""
    init_rng, run_rng = jax.random.split(rng)
    params = method.init(init_rng)
    target = jax.tree.map(jnp.copy, method.target_of(params))
    step = jnp.zeros((), jnp.int32)
    return TrainState(step, params, target, optimizer.init(params), run_rng)


def initial_params(method: Any, seed: int) -> Any:
    """The parameters of `init_state(method, optimizer, jax.random.key(seed))`."""
    init_rng, _ = jax.random.split(jax.random.key(seed))
    return method.init(init_rng)


def jit_init(
    method: Any,
    optimizer: optax.GradientTransformation,
    seed: int,
    mesh: jax.sharding.Mesh,
    rules: tuple[tuple[str, str | int], ...] = ((".*", "largest"),),
    min_size: int = 1 << 16,
) -> tuple[Any, Any]:
    """The jitted function without arguments that makes a fresh state on the devices.

    The order is shapes, then shardings, then `jit(init)`, so that no device ever holds all of it.

    Args:
      method: see methods/base.py.
      optimizer: an optax transformation.
      seed: of the run.
      mesh: where the state is placed.
      rules: see `sharding.state_sharding`.
      min_size: see `sharding.state_sharding`.

    Returns:
      (function, the tree of NamedShardings of its state).
    """

    def init() -> TrainState:
        return init_state(method, optimizer, jax.random.key(seed))

    abstract = jax.eval_shape(init)
    shardings = sharding.state_sharding(abstract, mesh, rules=rules, min_size=min_size)
    return jax.jit(init, out_shardings=shardings), shardings
