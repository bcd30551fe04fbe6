"""FLOPs counted in the traced program, against closed formulas and XLA's own count."""

import importlib

import jax
import jax.numpy as jnp
import pytest
import tiny

from lmim_jax.methods import base
from lmim_jax.perf import flops


def method_of(config):
    return base.from_config(config.method, total_steps=10, steps_per_epoch=5)


def test_vit_b_is_the_closed_formula():
    """From the sizes: D = 768, 12 blocks, 20 visible and 176 masked patches, decoder of 3 blocks of 512."""
    count = flops.count_method(
        method_of(importlib.import_module("lmim_jax.configs.vit_b").get_config())
    )
    d, visible, masked, narrow = 768, 20, 176, 512
    encoder = lambda n: 2 * n * d * d + 12 * ((n + 1) * 2 * 12 * d * d + 4 * (n + 1) ** 2 * d)
    projector = lambda n: (n + 1) * 2 * (2 * d * 4096 + 4096**2)
    block = (masked + 1) * 2 * (4 + 2 + 8) * narrow**2 + (visible + 1) * 2 * 2 * narrow**2
    block += 4 * (masked + 1) * (masked + 1 + visible + 1) * narrow
    decoder = (
        (visible + 1 + masked + 1) * 2 * d * narrow + 4 * masked * visible * narrow + 3 * block
    )
    parts = {
        "ViT": encoder(visible) + encoder(masked),
        "Projector": projector(visible) + projector(masked),
    }
    parts |= {"LatentDecoder": decoder, "loss": 2 * masked**2 * d}
    assert {name: forward for name, (forward, _) in count.parts.items()} == parts
    assert count.total == pytest.approx(66.4e9, rel=1e-3)
    backward = 2 * (encoder(visible) + projector(visible) + decoder) + 2 * masked**2 * d
    assert count.backward == pytest.approx(
        backward, rel=0.01
    )  # neither images nor positions have a gradient
    assert "total" in count.table()[-1]


def test_xla_counts_the_same_and_two_percent_of_element_wise_work():
    """Of the whole ViT-B program, unrolled and without accumulation, before it is optimised: nothing is compiled."""
    method, batch = method_of(importlib.import_module("lmim_jax.configs.vit_b").get_config()), 2
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
    params = jax.eval_shape(method.init, jax.random.key(0))
    views = jax.eval_shape(method.sample, jax.random.key(0), keys)
    images = jax.ShapeDtypeStruct((batch, *method.image_size, 3), jnp.float32)
    args = params, method.target_of(params), images, views, jax.ShapeDtypeStruct((), jnp.int32)
    lowered = jax.jit(jax.value_and_grad(lambda *args: method.loss_fn(*args)[0])).lower(*args)
    counted = lowered.cost_analysis()["flops"] / batch
    assert counted == pytest.approx(flops.count_method(method).total, rel=0.03)


def test_batch_size_changes_nothing_and_loops_count_as_often_as_they_run():
    method = method_of(tiny.get_config())
    assert flops.count_method(method, 1) == flops.count_method(method, 3)

    def loop(x):
        return jax.lax.scan(lambda x, _: (jnp.sin(x @ x), None), x, length=5)[0].sum()

    x = jnp.ones((3, 3))
    assert flops.count_by_module(loop, x) == {"loss": (5 * 54, 0)}
    ((forward, backward),) = flops.count_by_module(jax.value_and_grad(loop), x).values()
    assert (forward, backward) == (5 * 54, 5 * 108)
    assert flops.count_by_module(lambda x: (x @ x, x)[1], x) == {}  # unused
