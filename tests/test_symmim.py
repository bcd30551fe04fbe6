"""After SymMIM: masks, the loss against a numpy version, images compared over all devices."""

import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import tiny
from jax.sharding import PartitionSpec
from test_reference import given_draws

from lmim_jax.configs import compare, symmim_vit_b, tiny_imagenet
from lmim_jax.distributed import sharding
from lmim_jax.methods import base
from lmim_jax.methods.common import contrast
from lmim_jax.methods.common.masking import checkerboard
from lmim_jax.models.layers import patchify, sincos_positions
from lmim_jax.optim import adamw
from lmim_jax.train import build as train_build
from lmim_jax.train import step as train_step
from lmim_jax.train.state import init_state
from lmim_jax.utils.errors import UserError


def build(**change):
    section = {**tiny.method("symmim"), **change}
    return base.from_config(section, total_steps=100, steps_per_epoch=10)


def weights(method, seed=0):
    """Random parameters of a method, without running its initialization."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        return (0.3 * rng.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree.map(draw, jax.eval_shape(method.init, jax.random.key(0)))


def inputs(method, batch=6):
    """(params, weights of the momentum branch, images, views), all at random."""
    images = np.random.default_rng(2).normal(size=(batch, *method.image_size, 3))
    views = method.sample(jax.random.key(0), jax.random.split(jax.random.key(1), batch))
    target = method.target_of(weights(method, seed=1))
    return weights(method), target, images.astype(np.float32), views


# Masks


def test_checkerboards_are_the_published_ones():
    fine = ["0101", "1010"] * 2
    coarse = ["0011", "0011", "1100", "1100"]
    for cell, rows in ((1, fine), (2, coarse)):
        drawn = checkerboard((4, 4), cell).reshape(4, 4).astype(int)
        assert ["".join(map(str, row)) for row in drawn] == rows


def mirrors_are_visible(grid, cell):
    """Whether half is hidden, and the mirror image of it, left-right and up-down, is visible."""
    hidden = checkerboard(grid, cell).reshape(grid)
    return (hidden ^ hidden[:, ::-1]).all() and (hidden ^ hidden[::-1]).all()


@pytest.mark.parametrize("cell", [1, 2])
@pytest.mark.parametrize("grid", [(16, 16), (8, 8), (4, 12)])
def test_half_is_hidden_and_every_mirror_image_of_it_visible(grid, cell):
    assert 2 * checkerboard(grid, cell).sum() == math.prod(grid)
    assert mirrors_are_visible(grid, cell)


def test_nothing_of_this_holds_for_cells_of_two_on_a_grid_of_14():
    hidden = checkerboard((14, 14), 2).reshape(14, 14)
    assert hidden.sum() == 96  # 49 %
    np.testing.assert_array_equal(hidden, hidden[:, ::-1])


@pytest.mark.parametrize("grid", [(14, 14), (8, 10), (10, 8), (6, 6), (5, 4), (8, 8), (2, 2)])
def test_grids_where_a_mirror_image_is_hidden_are_refused(grid):
    if mirrors_are_visible(grid, 1) and mirrors_are_visible(grid, 2):
        build(grid=grid)
        return
    with pytest.raises(UserError, match=r"cell=[12]: rows and columns must be divisible by [24]"):
        build(grid=grid)


def test_a_grid_of_14_is_refused_in_one_line_that_says_what_to_give():
    with pytest.raises(UserError) as error:
        build(grid=(14, 14))
    assert str(error.value) == (
        "config.method.grid=(14, 14) with momentum_cell=2: rows and columns must be divisible by "
        "4, so that half of the patches are hidden and their mirror images are not; give another "
        "grid, such as (16, 16), 256 pixels in patches of 16"
    )


def test_views_are_the_fine_checkerboard_of_every_image():
    method = build()
    hidden = checkerboard((4, 4), 1)
    views = method.sample(jax.random.key(3), jax.random.split(jax.random.key(4), 5))
    for i in range(5):
        np.testing.assert_array_equal(views["masked"][i], np.flatnonzero(hidden))
        np.testing.assert_array_equal(views["visible"][i], np.flatnonzero(~hidden))


# The loss, in numpy


def layer_norm(x, params):
    centered = x - x.mean(-1, keepdims=True)
    scaled = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-6)
    return scaled * params["scale"] + params["bias"]


def linear(x, params):
    return x @ params["kernel"] + params.get("bias", 0)


def gelu(x):
    return x * (1 + scipy.special.erf(x / np.sqrt(2))) / 2


def attention(x, params, heads):
    batch, tokens, width = x.shape
    qkv = linear(x, params["qkv"]).reshape(batch, tokens, 3, heads, -1).transpose(2, 0, 3, 1, 4)
    scores = qkv[0] @ qkv[1].swapaxes(-1, -2) / np.sqrt(width / heads)
    mixed = scipy.special.softmax(scores, axis=-1) @ qkv[2]
    return linear(mixed.transpose(0, 2, 1, 3).reshape(batch, tokens, width), params["proj"])


def encode(method, tree, patches, hidden):
    """Tokens of all patches; the embedding of a hidden patch is the mask token."""
    params = tree["encoder"]
    x = linear(patches, params["patch_embed"])
    x[:, hidden] = tree["mask"]["token"][0, 0]
    x = x + sincos_positions(method.grid, method.width, integer=True)
    for i in range(method.depth):
        block = params[f"block{i:02d}"]
        x = x + attention(layer_norm(x, block["norm1"]), block["attn"], method.heads)
        inner = gelu(linear(layer_norm(x, block["norm2"]), block["mlp"]["fc1"]))
        x = x + linear(inner, block["mlp"]["fc2"])
    return layer_norm(x, params["norm"])


def batch_norm_mlp(x, params, depth):
    for i in range(depth):
        x = linear(x, params[f"linear{i}"])
        x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
        if i < depth - 1:
            x = np.maximum(x * params[f"norm{i}"]["scale"] + params[f"norm{i}"]["bias"], 0)
    return x


def expected_losses(method, params, target, images):
    """(pixel loss, contrast, share of images that are found), float64."""
    params, target = jax.tree.map(np.float64, (params, target))
    patches = np.float64(patchify(images, method.grid, method.patch_size))
    rows, columns = np.divmod(np.arange(math.prod(method.grid)), method.grid[1])
    hidden = (rows + columns) % 2 == 1
    hidden_there = (rows // 2 + columns // 2) % 2 == 1
    tokens = encode(method, params, patches, hidden)
    pixels = tokens
    for i in range(method.decoder_depth):
        pixels = linear(gelu(pixels) if i else pixels, params["decoder"][f"linear{i}"])
    pixel_loss = np.abs(pixels - patches)[:, hidden].mean()
    queries = batch_norm_mlp(tokens.mean(1), params["projector"], method.projector_depth)
    queries = batch_norm_mlp(queries, params["predictor"], method.predictor_depth)
    keys = encode(method, target, patches, hidden_there).mean(1)
    keys = batch_norm_mlp(keys, target["projector"], method.projector_depth)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    logits = queries @ keys.T / method.tau
    own = np.diag(scipy.special.log_softmax(logits, axis=1))
    found = logits.argmax(1) == np.arange(len(logits))
    return pixel_loss, -2 * method.tau * own.mean(), found.mean()


@pytest.mark.parametrize(("decoder_depth", "weight"), [(1, 1.0), (3, 0.25)])
def test_the_loss_is_that_of_numpy(decoder_depth, weight):
    method = build(
        depth=2,
        decoder_depth=decoder_depth,
        contrast_weight=weight,
        projector_depth=decoder_depth,
        grid=(4, 8),
    )
    params, target, images, views = inputs(method)
    loss, metrics = jax.jit(method.loss_fn)(params, target, images, views, 0)
    pixel_loss, contrast_loss, found = expected_losses(method, params, target, images)
    assert float(metrics["pixel_loss"]) == pytest.approx(pixel_loss, rel=1e-5)
    assert float(metrics["contrast_loss"]) == pytest.approx(contrast_loss, rel=1e-4)
    assert float(loss) == pytest.approx(pixel_loss + weight * contrast_loss, rel=1e-4)
    assert float(metrics["image_accuracy"]) == pytest.approx(found)
    assert float(metrics["image_chance"]) == pytest.approx(1 / 6)


# Both branches


def test_the_momentum_branch_has_no_gradient_and_its_own_mask():
    method = build()
    params, target, images, views = inputs(method)

    def total(params, target, images):
        return (method.forward(params, target, images, views)["keys"][:, 0] ** 3).sum()

    of_params, of_target, of_images = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(
        params, target, images
    )
    assert not any(leaf.any() for leaf in jax.tree.leaves((of_params, of_target)))
    seen = np.abs(patchify(of_images, method.grid, method.patch_size)).sum((0, 2)) > 0
    np.testing.assert_array_equal(seen, ~checkerboard(method.grid, 2))


def test_all_of_the_online_branch_is_trained_and_the_rest_follows():
    method = build()
    params, target, images, views = inputs(method)
    gradient = jax.jit(jax.grad(lambda p: method.loss_fn(p, target, images, views, 0)[0]))(params)
    for name, tree in gradient.items():
        assert any(np.abs(leaf).max() > 1e-6 for leaf in jax.tree.leaves(tree)), name
    assert set(target) == {"encoder", "mask", "projector"}
    rates = [float(method.ema_rate(step)) for step in (0, 49, 99)]
    expected = [0.01 * (1 + math.cos(math.pi * s / 100)) / 2 for s in (1, 50, 100)]
    np.testing.assert_allclose(rates, expected, atol=1e-8)


def test_pictures_keep_visible_patches_and_show_predictions_elsewhere():
    method = build()
    params, target, images, views = inputs(method)
    shown = jax.jit(method.reconstruct)(params, images, views)
    pixels = jax.jit(method.forward)(params, target, images, views)["pixels"]
    found = np.asarray(patchify(shown, method.grid, method.patch_size))
    given = np.asarray(patchify(images, method.grid, method.patch_size))
    hidden = checkerboard(method.grid, 1)
    np.testing.assert_array_equal(found[:, ~hidden], given[:, ~hidden])
    np.testing.assert_allclose(found[:, hidden], pixels, atol=1e-5)


# The whole batch


def contrast_of(x, layers, params, tau=0.2):
    """Loss of some images whose keys are other features of them."""
    queries = layers.apply({"params": params}, x[:, :8])
    logits, own = contrast.image_logits(queries, x[:, 8:], tau)
    return contrast.image_infonce(logits, own, tau)


def test_norms_and_contrast_are_those_of_the_whole_batch_on_any_number_of_devices():
    layers = contrast.BatchNormMLP(depth=2, hidden=12, features=8, dtype=jnp.float32)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(16, 16)).astype(np.float32) + np.arange(16)[:, None]  # unlike elsewhere
    params = layers.init(jax.random.key(0), x[:, :8])["params"]

    def mean(params, x):
        grads, accuracy = jax.grad(lambda params: contrast_of(x, layers, params), has_aux=True)(
            params
        )
        loss, _ = contrast_of(x, layers, params)
        return jax.lax.pmean((loss, accuracy, grads), sharding.AXES)

    found = []
    for count in (1, 8):
        mesh = sharding.make_mesh(devices=jax.devices()[:count])
        whole = PartitionSpec()
        specs = (whole, PartitionSpec(sharding.AXES))
        run = jax.shard_map(mean, mesh=mesh, in_specs=specs, out_specs=whole, check_vma=False)
        found.append(jax.jit(run)(params, x))
    for one, eight in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(eight, one, rtol=1e-4, atol=1e-5)
    # What each device would compute by itself is another number
    alone = np.mean([contrast_of(part, layers, params)[0] for part in np.split(x, 8)])
    assert abs(alone - float(found[0][0])) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize(("data", "fsdp"), [(8, 1), (2, 4)])
def test_losses_of_training_do_not_depend_on_the_number_of_devices(data, fsdp, monkeypatch):
    monkeypatch.setattr(train_step, "draw", given_draws)
    method = build(projector_depth=2)
    config = symmim_vit_b.get_config().optimizer
    optimizer, _ = adamw.from_config(config, warmup_steps=0, total_steps=9, steps_per_epoch=1)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(3, 16, *method.image_size, 3)).astype(np.float32)
    views = method.sample(jax.random.key(0), jax.random.split(jax.random.key(0), 16))
    found = []
    for sizes in ((1, 1), (data, fsdp)):
        mesh = sharding.make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])
        step = jax.jit(train_step.make_train_step(method, None, optimizer, mesh))
        state = init_state(method, optimizer, jax.random.key(0))
        for i in range(3):
            state, metrics = step(state, jax.device_get({"image": images[i], **views}))
            names = ("pixel_loss", "contrast_loss", "grad_norm", "image_chance")
            found.append([float(metrics[name]) for name in names])
    np.testing.assert_allclose(found[3:], found[:3], rtol=1e-4)
    assert found[0][3] == 1 / 16


def test_micro_batches_are_refused():
    config = symmim_vit_b.get_config()
    config.micro_batches = 2
    with pytest.raises(UserError, match=r"micro_batches=2: symmim compares the images of a"):
        train_build.build(config, 10)


# Recipes


@pytest.mark.parametrize("size", ["micro", "small"])
@pytest.mark.parametrize("name", ["symmim", "capi"])
def test_methods_of_the_whole_batch_train_on_tiny_imagenet(name, size):
    config = tiny_imagenet.get_config(f"{name},{size}")
    assert config.micro_batches == 1
    assert train_build.build(config, 10).method.grid == (8, 8)


def test_small_twins_are_compared():
    for dataset in ("shapes", "cifar10"):
        names = [name for name, *_ in compare.get_config(dataset).runs]
        assert "symmim" in names
        config = importlib.import_module("lmim_jax.configs.small").get_config(f"symmim,{dataset}")
        method = train_build.build(config, 10).method
        assert (method.decoder_depth, method.projector_width) == (1, 256)
