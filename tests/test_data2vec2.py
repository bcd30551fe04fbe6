"""data2vec 2.0: masks, targets, decoder, Adam's epsilon, initialization, names."""

import dataclasses
import functools
import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict
from test_reference import given_draws

from lmim_jax.configs import data2vec2_vit_b
from lmim_jax.convert import torch_encoder
from lmim_jax.convert.official import base as official
from lmim_jax.distributed import sharding
from lmim_jax.methods import base
from lmim_jax.methods.data2vec2 import average_layers, visible_blocks
from lmim_jax.models import grid_decoder
from lmim_jax.optim import adamw
from lmim_jax.perf import flops
from lmim_jax.train import step as train_step
from lmim_jax.train.state import init_state
from lmim_jax.utils.errors import UserError


def build(**change):
    section = {**tiny.method("data2vec2"), **change}
    return base.from_config(section, total_steps=100, steps_per_epoch=10)


@functools.cache
def recipe(size):
    """The method of a recipe."""
    section = importlib.import_module(f"lmim_jax.configs.data2vec2_vit_{size}").get_config().method
    return base.from_config(section, total_steps=375_300, steps_per_epoch=5004)


def weights(method, seed=0):
    """Random parameters of a method, without running its initialization."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        return (0.2 * rng.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree.map(draw, jax.eval_shape(method.init, jax.random.key(0)))


def draw_visible(method, images):
    """Visible patches of many masks, [masks, N] bool."""
    small = dataclasses.replace(method, width=64, heads=1, noise=0.0)  # the masks are the same
    keys = jax.random.split(jax.random.key(1), images)
    visible = np.asarray(jax.jit(lambda keys: small.sample(None, keys)["visible"])(keys))
    assert (np.diff(visible) > 0).all()  # raster order
    found = np.zeros((len(visible), small.num_patches), bool)
    np.put_along_axis(found, visible, True, axis=1)
    return found


@pytest.mark.parametrize(("size", "visible", "squares"), [("b", 39, 5), ("l", 49, 7)])
def test_masks_are_the_published_ones(size, visible, squares):
    method = recipe(size)
    assert (method.num_visible, method._num_blocks) == (visible, squares)
    found = draw_visible(method, 20)
    assert len(found) == 20 * 16  # independent masks of an image
    assert (found.sum(axis=1) == visible).all()
    assert len(np.unique(found, axis=0)) == len(found)
    # Squares: the right neighbor of a visible patch is visible more often than any other patch
    grids = found.reshape(-1, 14, 14)
    neighbors = grids[:, :, 1:][grids[:, :, :-1]].mean()
    assert neighbors > 2 * visible / 196
    assert neighbors < 0.8  # they have gaps and edges


@pytest.mark.parametrize("size", [2, 3])
def test_squares_are_centered_on_any_patch_and_may_leave_the_grid(size):
    def draw(key):
        return visible_blocks(key, (5, 7), 1, size)

    found = np.asarray(jax.vmap(draw)(jax.random.split(jax.random.key(0), 2000)))
    expected = set()
    for row in range(5):
        for column in range(7):
            mask = np.zeros((5, 7), bool)
            top = row - size // 2
            left = column - size // 2
            mask[max(top, 0) : top + size, max(left, 0) : left + size] = True
            expected.add(mask.tobytes())
    assert {mask.tobytes() for mask in found} == expected
    assert len(expected) == 35
    assert not visible_blocks(jax.random.key(0), (5, 7), 0, size).any()


def test_holes_are_noise_of_the_given_spread():
    method = build(grid=(8, 8), noise=0.01, masks_per_image=3)
    keys = jax.random.split(jax.random.key(1), 5)
    views = jax.jit(lambda keys: method.sample(None, keys))(keys)
    assert views["noise"].shape == (15, 64, method.width)
    assert float(views["noise"].std()) == pytest.approx(0.01, rel=0.02)
    tokens = jnp.full((15, method.num_visible, method.width), 7.0)
    filled = np.asarray(jax.jit(method._fill)(tokens, views))
    visible = np.asarray(jax.jit(method._is_visible)(views["visible"]))
    assert (filled[visible] == 7).all()
    np.testing.assert_array_equal(filled[~visible], views["noise"][~visible])


def test_targets_are_the_standardized_mean_of_standardized_layers():
    rng = np.random.default_rng(0)
    layers = rng.normal(3.0, 2.0, size=(2, 4, 9, 6)).astype(np.float32)
    total = 0
    for layer in layers.astype(np.float64):
        centered = layer - layer.mean(axis=1, keepdims=True)
        total = total + centered / np.sqrt(layer.var(axis=1, keepdims=True) + 1e-5)
    mean = total / 2
    centered = mean - mean.mean(axis=2, keepdims=True)
    expected = centered / np.sqrt(mean.var(axis=2, keepdims=True) + 1e-5)
    np.testing.assert_allclose(average_layers(list(layers)), expected, atol=1e-5)
    # Padding does not change what is not padding
    padded = np.pad(layers, ((0, 0), (0, 0), (0, 3), (0, 0)), constant_values=9.0)
    mask = np.broadcast_to(np.arange(12) < 9, (4, 12))
    found = average_layers(list(padded), mask)[:, :9]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_weight_of_cls_does_not_depend_on_the_batch():
    method = build(cls_weight=2.56, masks_per_image=1, decoder_depth=0)
    params = weights(method)
    target = method.target_of(weights(method, seed=1))
    keys = jax.random.split(jax.random.key(1), 2)
    views = jax.jit(lambda keys: method.sample(None, keys))(keys)
    images = np.random.default_rng(0).normal(size=(2, *method.image_size, 3)).astype(np.float32)
    twice = {name: jnp.concatenate([view, view]) for name, view in views.items()}
    value = jax.jit(method.loss_fn)
    loss, metrics = value(params, target, images, views, 0)
    again, _ = value(params, target, np.concatenate([images, images]), twice, 0)
    assert float(again) == pytest.approx(float(loss), rel=1e-5)
    expected = metrics["patch_loss"] + 2.56 * metrics["cls_loss"]
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)


def test_products_are_the_convolution_of_accelerators():
    rng = np.random.default_rng(0)
    for kernel_size in (2, 3, 5):
        x = rng.normal(size=(2, 5, 4, 12)).astype(np.float32)
        kernel = rng.normal(size=(kernel_size, kernel_size, 3, 8)).astype(np.float32)
        expected = grid_decoder._convolution(x, kernel, 4)
        found = grid_decoder._sum_of_products(x, kernel, 4)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_fairseqs_adam_adds_epsilon_before_the_correction():
    rng = np.random.default_rng(0)
    grads = rng.normal(size=(3, 5)).astype(np.float32) * 1e-3
    b1, b2, eps = 0.9, 0.95, 1e-3
    optimizer = adamw.scale_by_fairseq_adam(b1=b1, b2=b2, eps=eps)
    state = optimizer.init(jnp.zeros(5))
    mean = square = np.zeros(5)
    for i, grad in enumerate(grads, 1):
        update, state = optimizer.update(grad, state)
        mean = b1 * mean + (1 - b1) * grad
        square = b2 * square + (1 - b2) * grad**2
        expected = math.sqrt(1 - b2**i) / (1 - b1**i) * mean / (np.sqrt(square) + eps)
        np.testing.assert_allclose(update, expected, rtol=1e-5)


def test_networks_start_as_those_of_the_released_code():
    method = build(width=64, heads=4, decoder_width=64, decoder_groups=16, decoder_depth=1)
    params = flatten_dict(jax.jit(method.init)(jax.random.key(0)), sep="/")
    assert np.std(params["encoder/cls_token"]) == pytest.approx(1, abs=0.3)
    for name in ("attn/qkv", "attn/proj", "mlp/fc1", "mlp/fc2"):
        kernel = params[f"encoder/block00/{name}/kernel"]
        assert np.std(kernel) == pytest.approx(0.02, rel=0.1), name
        np.testing.assert_array_equal(params[f"encoder/block00/{name}/bias"], 0)
    bounds = {
        "encoder/patch_embed/kernel": (6 / (method.patch_dim + 64)) ** 0.5,  # xavier
        "encoder/patch_embed/bias": method.patch_dim**-0.5,
        "decoder/conv0/kernel": (9 * 4) ** -0.5,  # 3 x 3 x 64 / 16 inputs
        "decoder/conv0/bias": (9 * 4) ** -0.5,
        "decoder/head/kernel": 64**-0.5,
        "decoder/head/bias": 64**-0.5,
    }
    for path, bound in bounds.items():
        widest = float(np.abs(params[path]).max())
        assert 0.9 * bound < widest <= bound * 1.000001, path


def test_what_has_one_dimension_there_is_not_decayed():
    method = build()
    params = jax.eval_shape(method.init, jax.random.key(0))
    rules = data2vec2_vit_b.get_config().optimizer.decay_rules
    decays = flatten_dict(adamw.match_rules(rules, params, ""), sep="/")
    for name, entry in official.entries(method).items():
        if not name.startswith("_ema."):
            path = entry.path.removeprefix("params/")
            assert decays[path] == (len(entry.shape) > 1), name
    assert decays["encoder/cls_token"]


@pytest.mark.parametrize("size", ["b", "l"])
def test_the_momentum_is_the_published_one(size):
    method = recipe(size)
    last = {"b": 100_000, "l": 150_000}[size]
    for step in (0, 9_999, 49_999, last - 1, last, 375_299):
        t = min((step + 1) / last, 1)
        expected = 0.9998 + (0.99999 - 0.9998) * t
        assert 1 - float(method.ema_rate(step)) == pytest.approx(expected, abs=1e-7)


@pytest.mark.slow
def test_a_step_costs_what_the_method_was_computed_to_cost():
    found = flops.count_method(recipe("b")).total / 1e9
    assert found == pytest.approx(415, rel=0.005)  # 25.9 GFLOP a mask


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder_groups": 3}, "width=16 must be divisible by decoder_groups=3"),
        ({"target_start": 1}, "target_start=1 is out of range: it must be 0 .. 0"),
        ({"mask_block": 5}, "mask_block=5 is out of range"),
        ({"masks_per_image": 0}, "masks_per_image=0 is out of range"),
        (
            {"depth": 2, "target_layers": (0, 1), "target_combine": "concat"},
            "CLS of width 16 cannot predict targets of width 32",
        ),
    ],
)
def test_options_that_cannot_be_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        build(**change)


@pytest.mark.parametrize("target", ["joint", "frozen"])
def test_targets_come_from_other_sources_too(target):
    change = {"target": target}
    if target == "frozen":
        change = {"target": "frozen:RUN", "frozen": {**tiny.method("mae"), "depth": 1}}
    method = build(**change)

    def loss():
        params = method.init(jax.random.key(0))
        views = method.sample(None, jax.random.split(jax.random.key(1), 2))
        images = jnp.zeros((2, *method.image_size, 3))
        return method.loss_fn(params, method.target_of(params), images, views, 0)[0]

    assert jax.eval_shape(loss).shape == ()
    assert method.ema_rate(3) == 0


def test_other_libraries_cannot_hold_the_encoder():
    method = build()
    with pytest.raises(UserError, match="has post-norm blocks, unlike the Vision Transformers"):
        torch_encoder.from_method(method, weights(method))


@pytest.mark.parametrize("prenet_depth", [0, 2, 3])
def test_a_whole_model_returns_from_its_official_names(prenet_depth):
    method = build(depth=3, prenet_depth=prenet_depth)
    params = weights(method)
    target = method.target_of(weights(method, seed=1))
    arrays = official.to_official(method, params, target)
    official.check(method, arrays)
    inside = [name for name in arrays if name.startswith("modality_encoders.IMAGE.context_encoder")]
    assert sum(name.endswith("fc1.weight") for name in inside) == prenet_depth
    assert ("blocks.0.norm1.weight" in arrays) == (prenet_depth < 3)
    back = official.from_official(method, arrays)
    jax.tree.map(np.testing.assert_array_equal, back, {"params": params, "target": target})


@pytest.mark.slow
@pytest.mark.parametrize(("data", "fsdp"), [(8, 1), (2, 4)])
def test_losses_of_training_do_not_depend_on_the_number_of_devices(data, fsdp, monkeypatch):
    monkeypatch.setattr(train_step, "draw", given_draws)
    method = build()
    config = data2vec2_vit_b.get_config().optimizer
    optimizer, _ = adamw.from_config(config, warmup_steps=0, total_steps=9, steps_per_epoch=1)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(3, 16, *method.image_size, 3)).astype(np.float32)
    found = []
    for sizes in ((1, 1), (data, fsdp)):
        mesh = sharding.make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])
        step = jax.jit(train_step.make_train_step(method, None, optimizer, mesh))
        state = init_state(method, optimizer, jax.random.key(0))
        for i in range(3):
            keys = jax.random.split(jax.random.key(i), 16)
            batch = {"image": images[i], **method.sample(jax.random.key(0), keys)}
            state, metrics = step(state, jax.device_get(batch))
            metrics = jax.device_get(metrics)
            found.append([metrics[name] for name in sorted(metrics) if name != "input_mean"])
    np.testing.assert_allclose(found[3:], found[:3], rtol=2e-5)
