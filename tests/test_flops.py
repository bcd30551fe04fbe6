"""FLOPs counted in the traced program, against closed formulas and XLA's own count."""

import importlib

import jax
import jax.numpy as jnp
import pytest
import tiny

from lmim_jax.methods import base
from lmim_jax.perf import flops

WIDTH = 768  # of configs/vit_b.py, like the numbers below
DEPTH = 12
VISIBLE = 20
MASKED = 176
DECODER_WIDTH = 512
DECODER_DEPTH = 3
PROJECTOR_WIDTH = 4096


def method_of(config):
    return base.from_config(config.method, total_steps=10, steps_per_epoch=5)


def vit_b():
    return method_of(importlib.import_module("lmim_jax.configs.vit_b").get_config())


def encoder_flops(patches):
    """Patch embedding, and in each block projections and attention, of patches and CLS."""
    tokens = patches + 1
    embedding = 2 * patches * WIDTH**2
    projections = tokens * 2 * 12 * WIDTH**2
    attention = 4 * tokens**2 * WIDTH
    return embedding + DEPTH * (projections + attention)


def projector_flops(patches):
    """A multi-layer perceptron with two hidden layers, on patches and CLS."""
    return (patches + 1) * 2 * (2 * WIDTH * PROJECTOR_WIDTH + PROJECTOR_WIDTH**2)


def decoder_flops():
    """Embedding of both sets of tokens, visual cues, and blocks with self- and cross-attention."""
    queries = MASKED + 1
    keys = VISIBLE + 1
    embedding = (keys + queries) * 2 * WIDTH * DECODER_WIDTH
    cues = 4 * MASKED * VISIBLE * DECODER_WIDTH
    projections = queries * 2 * (4 + 2 + 8) * DECODER_WIDTH**2 + keys * 2 * 2 * DECODER_WIDTH**2
    attention = 4 * queries * (queries + keys) * DECODER_WIDTH
    return embedding + cues + DECODER_DEPTH * (projections + attention)


def test_vit_b_is_the_closed_formula():
    count = flops.count_method(vit_b())
    similarities = 2 * MASKED**2 * WIDTH  # of the loss
    assert {name: forward for name, (forward, _) in count.parts.items()} == {
        "ViT": encoder_flops(VISIBLE) + encoder_flops(MASKED),
        "Projector": projector_flops(VISIBLE) + projector_flops(MASKED),
        "LatentDecoder": decoder_flops(),
        "loss": similarities,
    }
    assert count.total == pytest.approx(66.4e9, rel=1e-3)
    online = encoder_flops(VISIBLE) + projector_flops(VISIBLE) + decoder_flops()
    # Not exactly: neither images nor positions have a gradient
    assert count.backward == pytest.approx(2 * online + similarities, rel=0.01)


def test_xla_counts_the_same_and_two_percent_of_element_wise_work():
    """Of the whole ViT-B program before it is optimized: nothing is compiled."""
    method = vit_b()
    batch = 2
    params = jax.eval_shape(method.init, jax.random.key(0))
    views = jax.eval_shape(method.sample, jax.random.key(0), flops.abstract_keys(batch))
    height, width = method.image_size
    images = jax.ShapeDtypeStruct((batch, height, width, 3), jnp.float32)
    step = jax.ShapeDtypeStruct((), jnp.int32)

    def loss(params, target, images, views, step):
        return method.loss_fn(params, target, images, views, step)[0]

    gradient = jax.jit(jax.value_and_grad(loss))
    lowered = gradient.lower(params, method.target_of(params), images, views, step)
    counted = lowered.cost_analysis()["flops"] / batch
    assert counted == pytest.approx(flops.count_method(method).total, rel=0.03)


def test_batch_size_changes_nothing_and_loops_count_as_often_as_they_run():
    method = method_of(tiny.get_config())
    assert flops.count_method(method, 1) == flops.count_method(method, 3)

    def body(x, _):
        return jnp.sin(x @ x), None

    def loop(x):
        return jax.lax.scan(body, x, length=5)[0].sum()

    x = jnp.ones((3, 3))
    assert flops.count_by_module(loop, x) == {"loss": (5 * 54, 0)}
    assert flops.count_by_module(jax.value_and_grad(loop), x) == {"loss": (5 * 54, 5 * 108)}


def test_unused_products_do_not_count():
    def function(x):
        _ = x @ x
        return x

    assert flops.count_by_module(function, jnp.ones((3, 3))) == {}
