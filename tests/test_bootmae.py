"""BootMAE compared with a numpy version of the released code, and with its mask sampler."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from clu import parameter_overview
from flax.traverse_util import flatten_dict

from lmim_jax.configs import bootmae_vit_b
from lmim_jax.methods import base
from lmim_jax.methods.common import losses, masking
from lmim_jax.models.layers import patchify
from lmim_jax.optim import adamw
from lmim_jax.utils.errors import UserError

GRID = (14, 14)
BLOCKS = {"total": 120, "smallest": 16, "largest": 60, "aspect": 0.3}
STEPS = 625  # per epoch


def published(**change):
    config = {**bootmae_vit_b.get_config().method, **change}
    return base.from_config(config, total_steps=801 * STEPS, steps_per_epoch=STEPS)


def small(**change):
    return base.from_config(
        {**tiny.method("bootmae"), **change}, total_steps=100, steps_per_epoch=5
    )


@functools.cache
def outputs():
    """forward(...) and {step: loss(...)} of the case."""
    method, *arguments = case()
    both = jax.jit(lambda step: (method.forward(*arguments), method.loss_fn(*arguments, step)))
    found = {step: both(step) for step in (0, 4, 5, 12, 20, 24, 25, 99)}
    return found[0][0], {step: loss for step, (_, loss) in found.items()}


@functools.cache
def case():
    """(method, params, target, images, views), where heads do not divide the decoder's width."""
    method = small(depth=2, grid=(4, 5), width=24, heads=3, decoder_width=20, num_visible=6)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(3, *method.image_size, 3)).astype(np.float32)

    def noisy_init(seed):
        params = jax.jit(method.init)(jax.random.key(seed))
        return jax.tree.map(
            lambda leaf: leaf + rng.normal(0, 0.1, leaf.shape).astype(np.float32), params
        )

    params = noisy_init(0)
    target = noisy_init(1)
    views = method.sample(jax.random.key(2), jax.random.split(jax.random.key(3), 3))
    return method, params, method.target_of(target), images, views


# -- the numpy version: full-length sequences, shuffled and put back, and losses of whole images


def dense(p, x):
    return x @ p["kernel"] + p["bias"]


def norm(x, p=None):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x if p is None else x * p["scale"] + p["bias"]


def split_heads(x, heads):
    return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)


def attention(q, k, v, heads):
    q = split_heads(q, heads)
    k = split_heads(k, heads)
    v = split_heads(v, heads)
    scores = np.exp(q @ k.transpose(0, 1, 3, 2) / math.sqrt(q.shape[-1]))
    out = scores / scores.sum(-1, keepdims=True) @ v
    return out.transpose(0, 2, 1, 3).reshape(len(q), q.shape[2], -1)


def self_attention(p, x, heads):
    q, k, v = np.split(x @ p["qkv"]["kernel"], 3, -1)
    q_bias, v_bias = np.split(p["qkv"]["bias"], 2)
    return dense(p["proj"], attention(q + q_bias, k, v + v_bias, heads))


def cross_attention(p, x, context, heads):
    k, v = np.split(context @ p["kv"]["kernel"], 2, -1)
    return dense(p["proj"], attention(dense(p["q"], x), k, v + p["kv"]["bias"], heads))


def mlp(p, x):
    x = dense(p["fc1"], x)
    return dense(p["fc2"], x * np.vectorize(lambda t: 0.5 * (1 + math.erf(t / math.sqrt(2))))(x))


def positions(h, w, width):
    """Integers: sine and cosine of the row, then of the column."""
    frequency = 1 / 10000 ** (np.arange(width // 4) / (width // 4))
    at = [(row, column) for row in range(h) for column in range(w)]
    return np.stack(
        [
            np.concatenate([f(x * frequency) for x in (r, c) for f in (np.sin, np.cos)])
            for r, c in at
        ]
    )


def embed(method, p, images):
    """Convolution of the whole image, CLS in front."""
    h, w = method.grid
    size = method.patch_size
    kernel = p["patch_embed"]["kernel"].reshape(size, size, 3, -1)
    cells = images.reshape(len(images), 3, h, size, w, size)
    x = (
        np.einsum("bchiwj,ijcd->bhwd", cells, kernel).reshape(len(images), h * w, -1)
        + p["patch_embed"]["bias"]
    )
    cls = np.broadcast_to(p["cls_token"], (len(x), 1, method.width))
    return np.concatenate([cls, x + positions(h, w, method.width)], 1)


def encode(method, p, x):
    """Tokens after every block."""
    out = []
    for i in range(method.depth):
        block = p[f"block{i:02d}"]
        x = x + self_attention(block["attn"], norm(x, block["norm1"]), method.heads)
        x = x + mlp(block["mlp"], norm(x, block["norm2"]))
        out.append(x)
    return out


def decode(method, p, tokens, context, order, width):
    """Normalized patch tokens; only mask tokens have positions, and the order is that of raster."""
    rows = np.arange(len(tokens))[:, None]
    masked = order[:, tokens.shape[1] :] - 1
    slots = p["mask_token"] + positions(*method.grid, width)[masked]
    x = np.concatenate([dense(p["embed"], tokens), slots], 1)[rows, np.argsort(order, 1)]
    for i in range(method.decoder_depth):
        block = p[f"block{i:02d}"]
        x = x + self_attention(block["self_attn"], norm(x, block["norm1"]), method.heads)
        queries = norm(x, block["norm2q"])
        keys = norm(context, block["norm2kv"])
        x = x + cross_attention(block["cross_attn"], queries, keys, method.heads)
        x = x + mlp(block["mlp"], norm(x, block["norm3"]))
    return norm(x, p["norm"])[:, 1:]


def numpy_losses():
    """(loss of pixels, loss of features, predictions, targets [B, N, D], pixels [B, 3, H, W])."""
    method, *arrays, views = case()
    params, target, images = jax.tree.map(lambda x: np.asarray(x, float), arrays)
    h, w = method.grid
    size = method.patch_size
    images = images.transpose(0, 3, 1, 2)
    visible = np.asarray(views["visible"])
    masked = np.asarray(views["masked"])
    order = np.concatenate([np.zeros((len(images), 1), int), visible + 1, masked + 1], 1)
    rows = np.arange(len(images))[:, None]
    encoder = params["encoder"]
    regressor = params["regressor"]
    predictor = params["predictor"]
    layers = encode(
        method, encoder, embed(method, encoder, images)[rows, order[:, : 1 + visible.shape[1]]]
    )
    tokens = norm(layers[-1], encoder["norm"])
    x = decode(method, regressor, tokens, layers[0], order, method.decoder_width).reshape(
        len(images), h, w, -1
    )
    kernel = regressor["head"]["kernel"].reshape(-1, size, size, 3)
    pixels = np.einsum("bhwd,dijc->bchiwj", x, kernel).reshape(images.shape)
    pixels += regressor["head"]["bias"].reshape(1, 3, 1, 1)
    predictions = dense(
        predictor["head"], decode(method, predictor, tokens, layers[-1], order, method.width)
    )
    targets = encode(method, target["encoder"], embed(method, target["encoder"], images))[-1][:, 1:]

    mask = np.zeros((len(images), h * w))
    mask[rows, masked] = 1
    mask = mask.reshape(-1, h, w)
    padded = np.pad(mask, ((0, 0), (1, 1), (1, 1)))
    pooled = np.array(
        [[padded[:, i : i + 3, j : j + 3].mean((1, 2)) for j in range(w)] for i in range(h)]
    )
    weight = mask * pooled.transpose(2, 0, 1) + mask
    cells = images.reshape(len(images), 3, h, size, w, size)
    wanted = (cells - cells.mean((3, 5), keepdims=True)) / np.sqrt(
        cells.var((3, 5), keepdims=True) + 1e-5
    )
    pixel_weight = np.repeat(np.repeat(weight, size, 1), size, 2)[:, None]
    pixel_errors = (pixels - wanted.reshape(images.shape)) ** 2
    pixel_loss = np.mean(pixel_weight * pixel_errors) / mask.mean()
    predictions = norm(predictions)
    targets = norm(targets)
    feature_weight = weight.reshape(len(images), -1, 1)
    feature_loss = np.mean(feature_weight * (targets - predictions) ** 2) / mask.mean()
    return pixel_loss, feature_loss, predictions, targets, pixels


def test_losses_and_predictions_equal_those_of_numpy():
    method, _, _, images, views = case()
    pixel_loss, feature_loss, predictions, targets, pixels = numpy_losses()
    forward, losses_at = outputs()
    rows = np.arange(len(images))[:, None]
    masked = np.asarray(views["masked"])
    patches = patchify(
        pixels.transpose(0, 2, 3, 1).astype(np.float32), method.grid, method.patch_size
    )
    for name, expected in (
        ("targets", targets),
        ("predictions", predictions),
        ("pixels", np.asarray(patches)),
    ):
        np.testing.assert_allclose(forward[name], expected[rows, masked], rtol=2e-4, atol=2e-5)
    for step, (loss, metrics) in losses_at.items():
        weight = min(4 * (step // 5 + 1) / 20, 1)  # of 20 epochs of 5 steps
        assert float(metrics["feature_weight"]) == pytest.approx(weight, rel=1e-6)
        np.testing.assert_allclose(metrics["pixel_loss"], pixel_loss, rtol=1e-5)
        np.testing.assert_allclose(metrics["feature_loss"], feature_loss, rtol=1e-5)
        np.testing.assert_allclose(loss, pixel_loss + weight * feature_loss, rtol=1e-5)


def test_a_perfect_regressor_reconstructs_the_image():
    rng = np.random.default_rng(0)
    patches = (rng.normal(size=(2, 5, 12)) * rng.uniform(1, 9, (2, 5, 1)) + 3).astype(np.float32)
    patches[0, 0] = 0.5  # flat
    pixels, mean, deviation = losses.standardize_pixels(patches, 3)
    np.testing.assert_allclose(pixels * deviation + mean, patches, rtol=1e-4, atol=1e-4)
    assert (np.asarray(pixels[0, 0]) == 0).all()
    by_channel = np.asarray(pixels).reshape(2, 5, 4, 3)[1]
    np.testing.assert_allclose(by_channel.mean(1), 0, atol=1e-5)
    np.testing.assert_allclose(by_channel.std(1), 1, rtol=1e-3)


def test_latents_are_what_targets_are_made_of():
    method, params, target, images, views = case()
    latents = np.asarray(jax.jit(method.features)({**params, **target}, images)["latents"])
    targets = outputs()[0]["targets"]
    np.testing.assert_allclose(
        np.take_along_axis(latents, views["masked"][..., None], 1), targets, atol=1e-4
    )


def test_features_of_any_image_size():
    method, params, _, images, _ = case()
    out = jax.jit(method.features)(params, images)
    assert out["cls"].shape == (3, 24)
    np.testing.assert_array_equal(out["block01/tokens"][:, 1:], out["patches_prenorm"])
    assert out["block01/attention"].shape == (3, 3, 21, 21)
    assert method.features(params, images[:, :8])["patches"].shape == (3, 10, 24)


def test_neighbors_of_a_known_mask():
    # X X .
    # X X .    and a mask of all nine
    shares = losses.masked_neighbors(np.array([[0, 1, 3, 4]]), (3, 3))
    np.testing.assert_allclose(shares, [[4 / 9] * 4], rtol=1e-6)
    shares = losses.masked_neighbors(np.arange(9)[None], (3, 3))
    np.testing.assert_allclose(shares[0] * 9, [4, 6, 4, 6, 9, 6, 4, 6, 4], rtol=1e-6)


def test_schedules_are_those_of_the_released_code():
    method = published()
    for epoch in (0, 1, 57, 99, 100, 101, 250, 399, 400, 401, 800):
        if epoch < 100:
            decay = 0.999 + epoch / 100 * (0.9999 - 0.999)
        else:
            decay = 0.9999 + min(300, epoch - 100) / 300 * (0.99999 - 0.9999)
        for step in (epoch * STEPS, epoch * STEPS + STEPS - 1):
            assert float(method.ema_rate(jnp.asarray(step))) == pytest.approx(1 - decay, rel=1e-5)


def test_parameters_are_as_many_as_in_the_released_code():
    params = jax.eval_shape(published().init, jax.random.key(0))
    assert parameter_overview.count_parameters(params) == 115_373_251


def test_decay_spares_what_the_released_code_spares():
    params = jax.eval_shape(published().init, jax.random.key(0))
    rules = bootmae_vit_b.get_config().optimizer.decay_rules
    decayed = flatten_dict(adamw.match_rules(rules, params, ""), sep="/")
    for name, leaf in flatten_dict(params, sep="/").items():
        assert decayed[name] == (leaf.ndim > 1 and name != "encoder/cls_token"), name


def test_initial_spread_is_that_of_the_released_code():
    method = small(width=64, decoder_width=32)
    params = jax.jit(method.init)(jax.random.key(0))
    limits = {
        name: float(jnp.abs(leaf).max()) for name, leaf in flatten_dict(params, sep="/").items()
    }
    expected = {
        "encoder/block00/attn/qkv/kernel": (6 / 128) ** 0.5,
        "encoder/block00/attn/proj/kernel": (6 / 128) ** 0.5,
        "predictor/block00/cross_attn/kv/kernel": (6 / 192) ** 0.5,
        "regressor/head/kernel": 48**-0.5,
    }
    assert {name: limits[name] for name in expected} == pytest.approx(expected, rel=0.01)
    assert 0.015 < limits["regressor/mask_token"] < 0.02
    assert 0 < limits["encoder/cls_token"] < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_total": 148}, "block_total=148 is out of range: it must be 0 .. 147"),
        ({"block_smallest": 170}, "block_smallest=170"),
        ({"block_largest": 8}, "block_largest=8 is out of range: it must be at least 16"),
        ({"block_exposed": 50}, "block_exposed=50"),
        ({"decoder_width": 510}, "decoder_width=510"),
        ({"momentum_epochs": (400, 100)}, "momentum_epochs"),
        ({"momentum": (0.99,)}, "momentum_epochs"),
        ({"gap": 4}, "config.method.gap: bootmae has no such key"),
    ],
)
def test_a_bad_value_is_named(change, message):
    with pytest.raises(UserError, match=message):
        published(**change)


# -- masks


def official_mask(rng, grid, total, smallest, largest, aspect):
    """The released generator, one block at a time, retried until it fits."""
    h, w = grid
    mask = np.zeros(grid, bool)
    while mask.sum() < total:
        limit = min(total - mask.sum(), largest)
        area = smallest + (limit - smallest) * rng.random()  # backwards where limit < smallest
        stretch = math.exp(rng.uniform(math.log(aspect), -math.log(aspect)))
        height = round(math.sqrt(area * stretch))
        width = round(math.sqrt(area / stretch))
        if height >= h or width >= w:
            continue
        top = rng.integers(0, h - height, endpoint=True)
        left = rng.integers(0, w - width, endpoint=True)
        block = np.zeros(grid, bool)
        block[top : top + height, left : left + width] = True
        if 0 < (block & ~mask).sum() <= limit:
            mask |= block
    return mask


def official_order(rng, mask, exposed):
    """Unmasked patches, then masked ones, each in random order, rolled."""
    order = np.concatenate(
        [rng.permutation(np.flatnonzero(mask == value)) for value in (False, True)]
    )
    return np.roll(order, exposed)


COUNT = 3000


@functools.cache
def samples():
    """Masks [COUNT, 14, 14] of blocks and final ones, ours, then official; our visible patches."""
    keys = jax.random.split(jax.random.key(0), (2, COUNT))
    draw = jax.jit(jax.vmap(lambda key: masking.block_mask(key, GRID, **BLOCKS)))
    split = jax.jit(jax.vmap(lambda key, mask: masking.block_split(key, mask, 49, 2)))
    blocks = draw(keys[0])

    def final(masked):
        out = np.zeros((COUNT, 196))
        np.put_along_axis(out, masked, 1, axis=1)
        return out.reshape(-1, *GRID)

    rng = np.random.default_rng(0)
    theirs = np.stack([official_mask(rng, GRID, **BLOCKS) for _ in range(COUNT)])
    order = np.stack([official_order(rng, mask.ravel(), 2) for mask in theirs])
    visible, masked = split(keys[1], blocks)
    return (
        np.asarray(blocks),
        final(np.asarray(masked)),
        theirs,
        final(order[:, 49:]),
        np.asarray(visible),
    )


def deviations(ours, theirs):
    """Difference of two means over samples in standard errors."""
    error = np.sqrt((ours.var(0) + theirs.var(0)) / len(ours))
    return np.abs(ours.mean(0) - theirs.mean(0)) / np.maximum(error, 1e-9)


def test_blocks_cover_the_exact_number_of_patches_and_the_split_is_a_partition():
    blocks, masks, _, _, visible = samples()
    assert (blocks.sum((1, 2)) == BLOCKS["total"]).all()
    assert (masks.sum((1, 2)) == 147).all()
    assert (np.take_along_axis(masks.reshape(COUNT, -1), visible, 1) == 0).all()
    assert (np.diff(np.sort(visible, 1), axis=1) > 0).all()
    assert ((blocks & (masks == 0)).sum((1, 2)) == 2).all()  # exposed


def test_impossible_blocks_are_abandoned():
    key = jax.random.key(0)
    assert (
        masking.block_mask(key, (4, 4), total=8, smallest=9, largest=9, aspect=1.0).sum() == 0
    )  # blocks of 3 x 3 only, each one patch too many


def test_masks_have_the_statistics_of_the_released_sampler():
    blocks, masks, official_blocks, official_masks, _ = samples()
    for ours, theirs in ((blocks, official_blocks), (masks, official_masks)):
        ours = ours.astype(float)
        theirs = theirs.astype(float)
        assert deviations(ours, theirs).max() < 4.5  # of 196 positions
        for shift, axis in (
            (1, 1),
            (1, 2),
            (3, 1),
            (3, 2),
        ):  # how often patches so far apart are masked together
            together = [np.mean(m * np.roll(m, shift, axis), axis=(1, 2)) for m in (ours, theirs)]
            assert deviations(*together) < 4.5
        extent = [
            np.sort(m.sum(1), axis=1) for m in (ours, theirs)
        ]  # masked patches of columns, fullest last
        assert deviations(*extent).max() < 4.5
    share = masks.mean(0)
    assert share[6:8, 6:8].mean() == pytest.approx(0.93, abs=0.01)
    assert share[[0, 0, -1, -1], [0, -1, 0, -1]].mean() == pytest.approx(0.44, abs=0.02)


def test_weights_of_published_masks_average_1_8():
    masks = samples()[1]
    masked = np.argsort(-masks.reshape(COUNT, -1), axis=1, kind="stable")[:, :147]
    assert float(1 + losses.masked_neighbors(masked, GRID).mean()) == pytest.approx(1.80, abs=0.01)


def test_exposed_is_one_draw_for_the_batch_and_uniform():
    method = published()
    keys = jax.random.split(jax.random.key(1), 2)

    @jax.jit
    @jax.vmap
    def exposed(rng):
        """Patches of the blocks of each image that are visible."""
        block_keys = jax.vmap(lambda key: jax.random.split(key)[0])(keys)
        blocks = jax.vmap(lambda key: masking.block_mask(key, GRID, **BLOCKS))(block_keys)
        blocks = blocks.reshape(2, -1)
        return jnp.take_along_axis(blocks, method.sample(rng, keys)["visible"], axis=1).sum(axis=1)

    drawn = np.asarray(exposed(jax.random.split(jax.random.key(0), 400)))
    assert (drawn[:, 0] == drawn[:, 1]).all()
    counts = np.bincount(drawn[:, 0])
    assert len(counts) == 4
    assert (np.abs(counts - 100) < 40).all()
