"""The train step: one pure function, the same for every method.

augment -> sample -> value_and_grad(loss) -> optimiser -> EMA -> metrics.
"""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from lmim_jax.distributed import sharding
from lmim_jax.models.layer_stack import with_remat_and_scan
from lmim_jax.utils.prng import image_keys


def update_target(target, source, rate):
    """EMA: target + rate * (source - target), in float32 (1 - momentum goes below bfloat16's resolution)."""
    return jax.tree.map(lambda old, new: old + rate * (new - old), target, source)


def draw(method, augment, rng, keys, batch):
    """Images and views of a batch: all randomness of a step. Returns (images [B, H, W, C], views)."""
    augment_keys, view_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    return augment(augment_keys, batch), method.sample(rng, view_keys)


def gradients(method, augment, micro_batches, params, target, rng, step, batch):
    """Mean gradient and metrics of the rows of `batch` on this device, in `micro_batches` equal parts."""

    def of_part(part):
        step_rng, keys = image_keys(rng, step, part.pop("position"))
        images, views = draw(method, augment, step_rng, keys, part)
        grads, metrics = jax.grad(method.loss_fn, has_aux=True)(params, target, images, views, step)
        return grads, {"input_mean": images.mean(), **metrics}

    if micro_batches == 1:
        return of_part(dict(batch))
    parts = jax.tree.map(lambda x: x.reshape(micro_batches, -1, *x.shape[1:]), batch)
    shapes = jax.eval_shape(of_part, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    add = lambda total, part: (jax.tree.map(jnp.add, total, of_part(part)), None)
    total, _ = jax.lax.scan(add, zeros, parts)
    return jax.tree.map(lambda x: x / micro_batches, total)


def make_train_step(
    method, augment, optimizer, mesh, micro_batches=1, skip_nonfinite=False, shardings=None
):
    """Build `train_step(state, batch) -> (state, metrics)`, to be jitted with the state donated.

    Args:
      method: see methods/base.py.
      augment: (keys [b], rows of the batch) -> images [b, H, W, C].
      optimizer: an optax transformation.
      mesh: see sharding.py; every device works on its own rows, and gradients are averaged over devices once per
        step, after the last micro-batch. The loss is per image: nothing else but scalars is communicated.
      micro_batches: gradient accumulation; the EMA moves once per step all the same.
      skip_nonfinite: a step whose loss, gradient or new parameters are NaN or infinite changes the step number only.
      shardings: of the state; None: as `sharding.state_sharding` has it. What is cut over `fsdp` is put together once per
        step, before the first micro-batch, and its gradient arrives cut.

    The batch is a dict of arrays with a leading batch axis; metrics are float32 scalars, those of the method and
    `input_mean`, `grad_norm`, `param_norm`, `target_norm` (and `skipped`, 1 or 0).
    """
    whole = PartitionSpec()

    def reduced(state, batch):
        """Gradients, cut as the parameters are, and metrics; means over the batch."""
        specs = jax.tree.map(lambda x: x.spec, shardings or sharding.state_sharding(state, mesh))

        def on_device(params, target, rng, step, batch):
            params, target = sharding.gather_shards((params, target), (specs.params, specs.target))
            grads, metrics = gradients(
                method, augment, micro_batches, params, target, rng, step, batch
            )
            return sharding.reduce_scatter_mean(grads, specs.params), jax.lax.pmean(
                metrics, sharding.AXES
            )

        return jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(specs.params, specs.target, whole, whole, sharding.BATCH),
            out_specs=(specs.params, whole),
            check_vma=False,  # gradients stay per device until they are averaged, not reduced per micro-batch
        )(state.params, state.target, state.rng, state.step, batch)

    def train_step(state, batch):
        batch = {**batch, "position": jnp.asarray(sharding.batch_positions(mesh, len(batch["image"])))}
        grads, metrics = reduced(state, batch)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        target = update_target(state.target, method.target_of(params), method.ema_rate(state.step))
        # Behind a barrier, so that the squares are not shared with Adam's, which would write them to memory on a CPU
        metrics |= {"grad_norm": optax.tree.norm(jax.lax.optimization_barrier(grads))}
        metrics |= {
            "param_norm": optax.tree.norm(params),
            "target_norm": jnp.float32(optax.tree.norm(target)),
        }
        new, old = (params, target, opt_state), (state.params, state.target, state.opt_state)
        if skip_nonfinite:
            # Where these are finite, so is the new state: nothing else can spoil a checkpoint.
            finite = jnp.isfinite(metrics["loss"] + metrics["grad_norm"] + metrics["param_norm"])
            new = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)
            metrics |= {"skipped": 1.0 - finite}
        params, target, opt_state = new
        return state.replace(
            step=state.step + 1, params=params, target=target, opt_state=opt_state
        ), metrics

    return train_step


def jit_step(config, method, augmentation, optimizer, mesh, shardings):
    """The train step as it runs here and in benchmarks; `shardings` are those of the state, which is donated."""
    skip = config.on_nonfinite == "skip"
    step = make_train_step(
        method, augmentation, optimizer, mesh, config.micro_batches, skip, shardings
    )
    return jax.jit(
        with_remat_and_scan(step, config.remat, config.scan_layers),
        donate_argnums=0,
        out_shardings=(shardings, sharding.replicated(mesh)),
    )
