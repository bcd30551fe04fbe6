"""The train step: one pure function, the same for every method.

augment -> sample -> value_and_grad(loss) -> optimizer -> EMA -> metrics.

Letters: B batch, b rows of the batch on this device and in this micro-batch, H image height,
W image width, C channels.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Key
from ml_collections import ConfigDict

from lmim_jax.distributed import sharding
from lmim_jax.models.layer_stack import with_remat_and_scan
from lmim_jax.optim import schedules
from lmim_jax.train import extension
from lmim_jax.train.state import TrainState
from lmim_jax.utils.platform import current_platform, traced_for
from lmim_jax.utils.prng import image_keys

Batch = dict[str, Array]
Metrics = dict[str, Float[Array, ""]]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def update_target(target: Any, source: Any, rate: Float[Array, ""] | float) -> Any:
    """EMA: target + rate * (source - target), float32.

    `rate` is 1 - momentum, which goes below the resolution of bfloat16.
    """
    return jax.tree.map(lambda old, new: old + rate * (new - old), target, source)


def draw(
    method: Any, augment: Any, rng: Key[Array, ""], keys: Key[Array, " b"], batch: Batch
) -> tuple[Float[Array, "b H W C"], dict[str, Array]]:
    """Make all random choices of a step.

    Returns:
      (augmented images, views), see `sample` in methods/base.py.
    """
    augment_keys, view_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    return augment(augment_keys, batch), method.sample(rng, view_keys)


def gradients(
    method: Any,
    augment: Any,
    micro_batches: int,
    params: Any,
    target: Any,
    rng: Key[Array, ""],
    step: Int[Array, ""],
    batch: Batch,
    schedule_start: int = 0,
) -> tuple[Any, Metrics]:
    """Mean gradient and metrics of the rows on this device, in `micro_batches` equal parts."""

    def gradients_of_part(part: Batch) -> tuple[Any, Metrics]:
        step_rng, keys = image_keys(rng, step, part.pop("position"))
        images, views = draw(method, augment, step_rng, keys, part)
        gradient = jax.grad(method.loss_fn, has_aux=True)
        of_schedules = schedules.since(step, schedule_start)
        grads, metrics = gradient(params, target, images, views, of_schedules)
        return grads, {"input_mean": images.mean(), **metrics}

    if micro_batches == 1:
        return gradients_of_part(dict(batch))

    def add_part(total: Any, part: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradients_of_part(part)), None

    parts = jax.tree.map(lambda x: x.reshape(micro_batches, -1, *x.shape[1:]), batch)
    first_part = jax.tree.map(lambda x: x[0], parts)
    shapes = jax.eval_shape(gradients_of_part, first_part)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = jax.lax.scan(add_part, zeros, parts)
    return jax.tree.map(lambda x: x / micro_batches, total)


def make_train_step(
    method: Any,
    augment: Any,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    micro_batches: int = 1,
    skip_nonfinite: bool = False,
    shardings: Any = None,
    schedule_start: int = 0,
) -> TrainStep:
    """Build `train_step(state, batch) -> (state, metrics)`, to be jitted with the state donated.

    Args:
      method: see methods/base.py.
      augment: (keys [b], rows of the batch) -> images [b, H, W, C].
      optimizer: an optax transformation.
      mesh: see distributed/sharding.py. Every device works on its own rows, and gradients are
        averaged over devices once per step, after the last micro-batch. The loss is a mean over
        images, so that nothing else but scalars is communicated.
      micro_batches: gradient accumulation; the EMA is updated once per step in any case.
      skip_nonfinite: a step whose loss, gradient or new parameters are NaN or infinite changes
        only the step number, and the places in the schedules of the optimizer.
      shardings: of the state; None: those of `sharding.state_sharding`. Arrays sharded over `fsdp`
        are gathered once per step, before the first micro-batch, and their gradients are
        reduce-scattered.
      schedule_start: the step at which the schedules of the method begin.

    The batch is a dict of arrays with a leading batch axis. Metrics are float32 scalars: those of
    the method, and `input_mean`, `grad_norm`, `param_norm`, `target_norm` (and `skipped`, 1 or 0).
    """
    replicated = PartitionSpec()

    def mean_gradients(state: TrainState, batch: Batch) -> tuple[Any, Metrics]:
        """Means over the batch of gradients, sharded as the parameters are, and metrics."""
        specs = jax.tree.map(lambda x: x.spec, shardings or sharding.state_sharding(state, mesh))

        def on_device(
            params: Any, target: Any, rng: Any, step: Any, batch: Batch
        ) -> tuple[Any, Metrics]:
            params, target = sharding.gather_shards((params, target), (specs.params, specs.target))
            grads, metrics = gradients(
                method, augment, micro_batches, params, target, rng, step, batch, schedule_start
            )
            grads = sharding.reduce_scatter_mean(grads, specs.params)
            return grads, jax.lax.pmean(metrics, sharding.AXES)

        return jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(specs.params, specs.target, replicated, replicated, sharding.BATCH),
            out_specs=(specs.params, replicated),
            # Gradients stay per device until they are averaged, not reduced per micro-batch
            check_vma=False,
        )(state.params, state.target, state.rng, state.step, batch)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        positions = sharding.batch_positions(mesh, len(batch["image"]))
        batch = {**batch, "position": jnp.asarray(positions)}
        grads, metrics = mean_gradients(state, batch)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        rate = method.ema_rate(schedules.since(state.step, schedule_start))
        target = state.target
        if not isinstance(rate, float) or rate:  # else, the teacher never changes
            target = update_target(target, method.target_of(params), rate)
        if current_platform() == "cpu":
            # Behind a barrier, so that XLA does not share the squares with Adam's second moments,
            # which would write them to memory
            grads = jax.lax.optimization_barrier(grads)
        metrics["grad_norm"] = optax.tree.norm(grads)
        metrics["param_norm"] = optax.tree.norm(params)
        metrics["target_norm"] = jnp.float32(optax.tree.norm(target))
        if skip_nonfinite:
            # Where these are finite, the whole new state is
            finite = jnp.isfinite(metrics["loss"] + metrics["grad_norm"] + metrics["param_norm"])

            def chosen(new: Any, old: Any) -> Any:
                # Schedules go on, as those of the method do
                return new if _is_schedule(new) else jnp.where(finite, new, old)

            params, target, opt_state = jax.tree.map(
                chosen,
                (params, target, opt_state),
                (state.params, state.target, state.opt_state),
                is_leaf=_is_schedule,
            )
            metrics["skipped"] = 1.0 - finite
        state = state.replace(
            step=state.step + 1, params=params, target=target, opt_state=opt_state
        )
        return state, metrics

    return train_step


def _is_schedule(state: Any) -> bool:
    """Whether a part of the state of optax only counts the steps of a schedule."""
    return getattr(state, "_fields", None) == ("count",)


def jit_train_step(
    config: ConfigDict,
    method: Any,
    augment: Any,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    shardings: Any,
) -> Any:
    """Jit the train step of a recipe, as training and the benchmarks run it.

    Args:
      config: `on_nonfinite`, `micro_batches`, `remat`, `scan_layers` and `extensions` are read.
      method: see `make_train_step`.
      augment: see `make_train_step`.
      optimizer: see `make_train_step`.
      mesh: see `make_train_step`.
      shardings: of the state, which is donated.
    """
    step = make_train_step(
        method,
        augment,
        optimizer,
        mesh,
        micro_batches=config.micro_batches,
        skip_nonfinite=config.on_nonfinite == "skip",
        shardings=shardings,
        schedule_start=extension.schedule_start(config),
    )
    run = with_remat_and_scan(step, config.remat, config.scan_layers)
    return jax.jit(
        traced_for(run, sharding.platform(mesh)),
        donate_argnums=0,
        out_shardings=(shardings, sharding.replicated(mesh)),
    )
