"""Switches of latent prediction: each against independent numpy, and off unless asked for."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec

from lmim_jax.configs import vit_b
from lmim_jax.distributed import sharding
from lmim_jax.evaluators import visualization
from lmim_jax.methods import base
from lmim_jax.methods.common import context_loss, losses, sigreg
from lmim_jax.models import decoders
from lmim_jax.perf import flops
from lmim_jax.train import build
from lmim_jax.utils.errors import UserError

SLOW = pytest.mark.slow
WHOLE = PartitionSpec()  # of what every device has
METHODS = ("latent_mim", pytest.param("ijepa", marks=SLOW), pytest.param("pilamim", marks=SLOW))
RNG = np.random.default_rng(0)
DIRECTIONS = np.asarray(sigreg.random_directions(jax.random.key(5), 8, 64))


def method(name, **change):
    """A tiny method; Latent MIM with all patches as targets."""
    options = tiny.method(name)
    if name == "latent_mim":
        options["target_patches"] = "all"
    return base.from_config({**options, **change}, total_steps=10, steps_per_epoch=5)


def batch(found, count=2):
    """Noise images, and the views of them."""
    keys = jax.random.split(jax.random.key(1), count)
    images = jax.random.normal(jax.random.key(2), (count, *found.image_size, 3))
    return images, found.sample(jax.random.key(3), keys)


@functools.cache
def jitted(found, name):
    """A jitted function of a method."""
    return jax.jit(getattr(found, name))


def on_devices(function, in_specs, out_specs, count=8):
    """A jitted function that each of some devices applies to its part of the arguments."""
    mesh = sharding.make_mesh(devices=jax.devices()[:count])
    assert mesh.size == count
    return jax.jit(
        jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    )


def evaluate(found, params, images, views, step=5):
    """(loss, metrics) of a method, jitted."""
    return jitted(found, "loss_fn")(params, found.target_of(params), images, views, step)


# SIGReg


def statistic(x):
    """Epps-Pulley of samples, as written: a trapezoidal rule on 17 knots, both signs at once."""
    total = 0.0
    for j in range(17):
        t = 3 * j / 16
        phi = math.exp(-t * t / 2)
        weight = phi * (3 / 16) * (1 if j in (0, 16) else 2)
        real = np.mean([math.cos(t * value) for value in x]) - phi
        imaginary = np.mean([math.sin(t * value) for value in x])
        total += weight * (real**2 + imaginary**2)
    return len(x) * total


def epps_pulley(x):
    """That of `sigreg`, of one column."""
    x = jnp.asarray(x, jnp.float32)[:, None]
    return float(sigreg.epps_pulley(x, jnp.ones(len(x)))[0])


def test_the_statistic_has_its_known_values():
    assert np.sum(sigreg.WEIGHTS) == pytest.approx(2.49967, abs=1e-5)
    assert epps_pulley(np.linspace(-2, 2, 17)) == pytest.approx(1.432267, abs=1e-5)
    assert epps_pulley(np.zeros(256)) == pytest.approx(102.924, abs=1e-3)
    expected = sigreg.EXPECTED
    assert expected == pytest.approx(1.05246, abs=1e-5)
    samples = jnp.asarray(RNG.normal(size=(256, 512)), jnp.float32)
    found = sigreg.epps_pulley(samples, jnp.ones(256))
    assert float(found.mean()) == pytest.approx(expected, abs=0.1)
    wide = RNG.normal(size=20_000)
    for scale, share in ((0.5, 0.1512), (2.0, 0.2361)):
        assert epps_pulley(scale * wide) / len(wide) == pytest.approx(share, abs=0.005)


def test_sigreg_is_the_mean_statistic_of_projections_without_padding():
    features = RNG.normal(size=(6, 8)).astype(np.float32)
    expected = np.mean([statistic(column) for column in (features @ DIRECTIONS).T])
    assert float(sigreg.sigreg(features, DIRECTIONS)) == pytest.approx(expected, rel=1e-5)
    padded = np.concatenate([features, 9 * np.ones((3, 8), np.float32)])
    weight = np.float32([1] * 6 + [0] * 3)
    assert float(sigreg.sigreg(padded, DIRECTIONS, weight)) == pytest.approx(expected, rel=1e-5)
    hinge = np.mean(np.maximum(0, 1 - features.std(0, ddof=1)))
    assert float(sigreg.variance_hinge(features)) == pytest.approx(hinge, rel=1e-5)
    assert float(sigreg.variance_hinge(padded, weight)) == pytest.approx(hinge, rel=1e-5)


def test_directions_are_unit_vectors_fresh_in_each_step():
    np.testing.assert_allclose(np.linalg.norm(DIRECTIONS, axis=0), 1, rtol=1e-5)
    first = np.asarray(sigreg.step_directions(0, 8, 64))
    np.testing.assert_array_equal(first, sigreg.step_directions(jnp.int32(0), 8, 64))
    assert np.abs(first - sigreg.step_directions(1, 8, 64)).max() > 0.1


@pytest.mark.parametrize("spread", [0.0, 1e-6])
def test_at_collapse_the_hinge_pulls_where_sigreg_does_not(spread):
    features = jnp.asarray(spread * RNG.normal(size=(16, 8)), jnp.float32)
    of_sigreg = jax.grad(sigreg.sigreg)(features, DIRECTIONS)
    of_hinge = jax.grad(sigreg.variance_hinge)(jnp.asarray(features))
    assert np.isfinite(of_sigreg).all()
    assert np.isfinite(of_hinge).all()
    if spread == 0:
        assert float(jnp.abs(of_sigreg).max()) == 0
        return
    assert float(jnp.abs(of_sigreg).max()) < 1e-5
    # A step against it moves samples apart
    moved = features - of_hinge
    assert float(moved.std(0).min()) > 10 * float(features.std(0).max())


def test_samples_are_those_of_all_devices():
    features = jnp.asarray(RNG.normal(size=(16, 8)), jnp.float32)
    weight = jnp.ones(16).at[3].set(0)

    def penalty(features, weight):
        return sigreg.sigreg(features, DIRECTIONS, weight) + sigreg.variance_hinge(features, weight)

    def on_device(features, weight):
        loss, gradient = jax.value_and_grad(penalty)(features, weight)
        return jax.lax.pmean(loss, sharding.AXES), gradient

    divided = on_devices(on_device, (sharding.BATCH,) * 2, (WHOLE, sharding.BATCH))
    loss, gradient = divided(features, weight)
    expected, whole = jax.jit(jax.value_and_grad(penalty))(features, weight)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    np.testing.assert_allclose(gradient / 8, whole, atol=1e-6)  # the step averages them


@pytest.mark.parametrize(
    ("name", "regularized"),
    [
        ("ijepa", "patches"),
        pytest.param("ijepa", "images", marks=SLOW),
        pytest.param("latent_mim", "images", marks=SLOW),
        pytest.param("latent_mim", "patches", marks=SLOW),
        pytest.param("pilamim", "images", marks=SLOW),
    ],
)
def test_regularizers_take_the_encoders_tokens(name, regularized):
    plain = method(name)
    found = method(
        name,
        sigreg_weight=0.3,
        sigreg_directions=16,
        variance_weight=0.2,
        regularized=regularized,
    )
    params = jitted(plain, "init")(jax.random.key(0))
    images, views = batch(plain)
    _, metrics = evaluate(found, params, images, views)
    forward = jitted(plain, "forward")(params, plain.target_of(params), images, views)
    tokens = forward["visible"]
    rows = []
    for k, row in enumerate(np.asarray(tokens, np.float64)):
        patches = row[views["visible_mask"][k]] if name == "ijepa" else row[1:]
        rows.append(patches if regularized == "patches" else patches.mean(0, keepdims=True))
    features = np.concatenate(rows)
    directions = np.asarray(sigreg.step_directions(5, 16, 16))
    expected = np.mean([statistic(column) for column in (features @ directions).T])
    assert float(metrics["sigreg"]) == pytest.approx(expected, rel=1e-4)
    hinge = np.mean(np.maximum(0, 1 - features.std(0, ddof=1)))
    assert float(metrics["variance_hinge"]) == pytest.approx(hinge, rel=1e-3, abs=1e-5)


def test_terms_are_weighted():
    found = method("ijepa", sigreg_weight=0.3, variance_weight=0.2, context_weight=0.5)
    assert found.context_warmup * found.total_steps == 1.5
    terms = {"sigreg": 7.0, "variance_hinge": 11.0, "context_loss": 13.0}
    for step, weight in ((0, 0), (1, 0.5 / 1.5), (2, 0.5)):
        loss = found.add_terms(jnp.float32(2), terms, jnp.int32(step))
        assert float(loss) == pytest.approx(2 + 0.3 * 7 + 0.2 * 11 + weight * 13)
    assert found.add_terms(2.0, {}, 0) == 2


# Several masks per image


def rows_of(views, images, masks, m):
    """Views of mask m of each image; those of images are as they are."""
    return {
        name: value[m::masks] if len(value) == images * masks else value
        for name, value in views.items()
    }


@pytest.mark.parametrize("name", METHODS)
def test_the_loss_of_several_masks_is_the_mean_of_their_losses(name):
    change = {"similarity_weight": 0.0} if name == "latent_mim" else {}
    found = method(name, masks_per_image=3, position_noise=0.25, context_weight=0.5, **change)
    single = dataclasses.replace(found, masks_per_image=1)
    params = jitted(found, "init")(jax.random.key(0))
    images, views = batch(found)
    assert len(views["visible"]) == 6
    assert len({tuple(row) for row in np.asarray(views["visible"]).tolist()}) > 3
    loss, metrics = evaluate(found, params, images, views)
    parts = [evaluate(single, params, images, rows_of(views, 2, 3, m)) for m in range(3)]
    assert float(loss) == pytest.approx(np.mean([part[0] for part in parts]), rel=1e-5)
    for key in set(metrics) - {"similarity_targets"}:
        values = [part[1][key] for part in parts]
        assert float(metrics[key]) == pytest.approx(np.mean(values), rel=1e-4, abs=1e-6), key


@pytest.mark.parametrize("name", METHODS)
def test_one_mask_is_the_draw_of_before_and_several_are_independent(name):
    keys = jax.random.split(jax.random.key(1), 64)
    several = method(name, masks_per_image=2)
    views = jax.jit(several.sample)(jax.random.key(3), keys)
    visible = np.asarray(views["visible"])
    pairs = np.sort(visible, axis=1).reshape(64, 2, -1)
    assert (pairs[:, 0] != pairs[:, 1]).any(axis=1).mean() > 0.5
    assert several.mask_keys(keys).shape == (128,)
    assert method(name).mask_keys(keys) is keys


@pytest.mark.slow
def test_the_teacher_runs_once_for_all_masks():
    """ViT-B costs 27 + 44 / M GFLOP per mask, all patches being targets."""
    section = vit_b.get_config().method
    section.target_patches = "all"
    section.masks_per_image = 4
    found = base.from_config(section, total_steps=10, steps_per_epoch=5)
    assert flops.count_method(found).total == pytest.approx((44.2 + 4 * 26.8) * 1e9, rel=0.005)


# Position noise


@pytest.mark.parametrize("kind", ["token", "cross", pytest.param("self", marks=SLOW)])
def test_noise_takes_the_place_of_mask_tokens(kind):
    rng = jax.random.key(0)
    shape = {"width": 8, "depth": 1, "heads": 2, "out_width": 4, "mlp_ratio": 2.0}
    shape |= {"norm_eps": 1e-6, "dtype": jnp.float32, "attention": "xla"}
    latent = {**shape, "visual_cues": False, "predict_visible": False}
    tokens = jax.random.normal(rng, (2, 4, 6))
    masked = jax.random.normal(jax.random.key(1), (2, 5, 8))
    noise = jax.random.normal(jax.random.key(2), (2, 5, 6))
    if kind == "token":
        decoder = decoders.TokenDecoder(**shape)
        inputs = (tokens, jax.random.normal(rng, (2, 4, 8)), masked)
    else:
        decoder = decoders.LatentDecoder(kind=kind, **latent)
        inputs = (tokens, jax.random.normal(rng, (2, 3, 8)), masked)
    variables = jax.jit(decoder.init)(jax.random.key(3), *inputs)
    apply = jax.jit(decoder.apply)
    params = variables["params"]
    found = apply(variables, *inputs, noise=noise)
    # The same with the embedded noise added to positions, and a mask token of 0
    embedded = np.asarray(noise) @ np.asarray(params["embed"]["kernel"])
    embedded = embedded + np.asarray(params["embed"]["bias"])
    blank = {**params, "mask_token": jnp.zeros_like(params["mask_token"])}
    expected = apply({"params": blank}, *inputs[:2], masked + embedded)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    another = {**params, "mask_token": jnp.ones_like(params["mask_token"])}
    again = apply({"params": another}, *inputs, noise=noise)
    np.testing.assert_array_equal(found, again)  # the learned one is not used


@pytest.mark.parametrize("name", METHODS)
def test_noise_is_drawn_for_every_masked_patch(name):
    found = method(name, position_noise=0.25)
    keys = jax.random.split(jax.random.key(1), 64)
    views = jax.jit(found.sample)(jax.random.key(3), keys)
    plain = jax.jit(method(name).sample)(jax.random.key(3), keys)
    for key, value in plain.items():  # the other draws are those of before
        np.testing.assert_array_equal(views[key], value)
    noise = np.asarray(views["noise"])
    predicted = views["targets"][0].size if name == "ijepa" else views["masked"].shape[1]
    assert noise.shape == (64, predicted, 16)
    assert noise.std() == pytest.approx(0.25, rel=0.05)
    assert len(np.unique(noise)) > 0.99 * noise.size
    params = jitted(found, "init")(jax.random.key(0))
    images, views = batch(found)
    loss, _ = evaluate(found, params, images, views)
    without, _ = evaluate(found, params, images, {k: v for k, v in views.items() if k != "noise"})
    assert float(loss) != float(without)


# The loss on visible patches


def nearest(visible, masked, grid):
    """Distance of a patch to the nearest of some others, one pair at a time."""
    found = []
    for patch in masked:
        rows = visible // grid[1] - patch // grid[1]
        columns = visible % grid[1] - patch % grid[1]
        found.append(math.hypot(rows, columns))
    return max(min(found), 1)


def test_errors_weigh_by_distance_to_the_nearest_masked_patch():
    grid = (3, 5)
    visible = np.int32([[0, 1, 14], [7, 2, 3]])
    masked = np.int32([[13, 4, 3, 0], [0, 7, 1, 1]])
    mask = np.array([[True, True, True, False], [True] * 4])
    expected = np.zeros((2, 3))
    for b in range(2):
        for v in range(3):
            expected[b, v] = nearest(visible[b, v], masked[b][mask[b]], grid)
    found = context_loss.nearest_masked(visible, masked, grid, mask)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert not np.isfinite(context_loss.nearest_masked(visible, masked, grid, mask & False)).any()

    predictions = RNG.normal(size=(2, 3, 4)).astype(np.float32)
    targets = RNG.normal(size=(2, 3, 4)).astype(np.float32)
    errors = np.abs(predictions - targets).mean(2) / np.sqrt(expected)
    loss = context_loss.context_loss(predictions, targets, found)
    assert float(loss) == pytest.approx(errors.mean(), rel=1e-5)
    counted = np.array([[True, True, False], [True, False, False]])
    loss = context_loss.context_loss(predictions, targets, found, counted)
    each = [errors[0, :2].mean(), errors[1, 0]]
    assert float(loss) == pytest.approx(np.mean(each), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("latent_mim", {"decoder": "cross"}),
        pytest.param("latent_mim", {"decoder": "self", "loss": "norm_l2"}, marks=SLOW),
        pytest.param("ijepa", {}, marks=SLOW),
        pytest.param("pilamim", {}, marks=SLOW),
    ],
)
def test_visible_patches_are_compared_with_their_own_targets(name, change):
    found = method(name, context_weight=0.5, context_warmup=0.8, **change)
    params = jitted(found, "init")(jax.random.key(0))
    images, views = batch(found)
    losses_at = [evaluate(found, params, images, views, step) for step in (0, 4, 8, 9)]
    value = float(losses_at[0][1]["context_loss"])
    start = float(losses_at[0][0])
    similarity = {"similarity_weight": 0.0} if name == "latent_mim" else {}
    if not similarity:  # nothing else depends on the step
        for (loss, _), weight in zip(losses_at, (0, 0.25, 0.5, 0.5), strict=True):
            assert float(loss) == pytest.approx(start + weight * value, rel=1e-5)

    views = jax.device_get(views)
    forward = jitted(found, "forward")(params, found.target_of(params), images, views)
    if name == "ijepa":
        predictions, targets, places = of_blocks(found, forward, views)
    else:
        predictions, targets, places = of_images(found, forward, views)
    expected = []
    for k, (row, masked) in enumerate(places):
        errors = []
        for v, patch in enumerate(views["visible"][row].tolist()):
            if views.get("visible_mask", np.ones((2, 99), bool))[row, v]:
                error = np.abs(predictions[k, v] - targets[row, v]).mean()
                errors.append(error / math.sqrt(nearest(patch, masked, found.grid)))
        expected.append(np.mean(errors))
    assert value == pytest.approx(np.mean(expected), rel=1e-4)


def of_images(found, forward, views):
    """Latent MIM and PiLaMIM: (predictions and targets of visible patches, (row, masked ids))."""
    visible = views["visible"]
    count = visible.shape[1]
    if "latents" in forward:
        predictions = forward["latents"][:, 1 : 1 + count]
        targets = np.stack([forward["targets"][k, 1 + visible[k]] for k in range(len(visible))])
    else:
        predictions = forward["predictions"][:, 1 : 1 + count]
        targets = np.asarray(forward["targets"][:, 1 : 1 + count])
        if found.loss == "norm_l2":
            deviations = np.sqrt(targets.var(axis=2, ddof=1, keepdims=True) + 1e-6)
            targets = (targets - targets.mean(axis=2, keepdims=True)) / deviations
    return np.asarray(predictions), targets, list(enumerate(views["masked"]))


def of_blocks(found, forward, views):
    """The same of I-JEPA, where each block predicts the context."""
    targets = np.asarray(forward["context_targets"])
    # A patch that is visible in one image and to be predicted in another place has one target
    np.testing.assert_allclose(targets.mean(axis=2), 0, atol=1e-5)
    places = []
    for row, blocks in enumerate(views["targets"]):
        for block, entries in enumerate(blocks):
            places.append((row, entries[views["target_mask"][row, block]]))
    return np.asarray(forward["context_predictions"]), targets, places


# Near-identical targets


def test_twins_are_no_negatives_and_the_positive_stays():
    targets = RNG.normal(size=(1, 5, 8)).astype(np.float32)
    targets[0, 3] = 2.5 * targets[0, 1]  # the same direction
    targets[0, 4] = targets[0, 1] + 0.3 * RNG.normal(size=8)  # merely close
    predictions = RNG.normal(size=(1, 5, 8)).astype(np.float32)
    duplicates = np.asarray(losses.near_duplicates(targets, 0.999))
    expected = np.zeros((5, 5), bool)
    expected[1, 3] = expected[3, 1] = True
    np.testing.assert_array_equal(duplicates[0], expected)
    logits = losses.discrimination_logits(predictions, targets, 0.2)
    loss = losses.patch_infonce(jnp.where(duplicates, -jnp.inf, logits), 0.2)
    rows = []
    for i in range(5):  # the softmax without the twin
        kept = [j for j in range(5) if not expected[i, j]]
        row = np.asarray(logits[0, i], np.float64)
        rows.append(np.log(np.exp(row[kept]).sum()) - row[i])
    assert float(loss) == pytest.approx(2 * 0.2 * np.mean(rows), rel=1e-5)


def test_a_flat_image_has_no_negatives_and_its_gradient_is_finite():
    found = method("latent_mim", duplicate_cosine=0.999, target="random_projection")
    params = jitted(found, "init")(jax.random.key(0))
    images, views = batch(found)
    gradient = jax.jit(jax.grad(found.loss_fn, has_aux=True))
    count = views["masked"].shape[1]
    found_values = []
    for kind in (images, images.at[0].set(0.5), jnp.full_like(images, 0.5)):
        grads, metrics = gradient(params, found.target_of(params), kind, views, 0)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
        found_values.append(metrics)
    chances = [float(metrics["patch_chance"]) for metrics in found_values]
    assert chances == pytest.approx([1 / count, (1 + 1 / count) / 2, 1])
    assert float(found_values[0]["reconstruction"]) > 0.1
    assert float(found_values[2]["reconstruction"]) == 0  # there is nothing to tell apart


# Negatives of other images


def other_images(predictions, targets, tau, rows_per_image):
    """`other_image_logits`, one by one."""
    rows, count = predictions.shape[:2]
    expected = np.full((rows, count, rows), -np.inf)
    for row in range(rows):
        for other in range(rows):
            if row // rows_per_image == other // rows_per_image:
                continue
            for i in range(count):
                p, t = predictions[row, i], targets[other, i]
                cosine = p @ t / np.linalg.norm(p) / np.linalg.norm(t)
                expected[row, i, other] = cosine / tau
    return expected


@pytest.mark.parametrize("rows_per_image", [1, 2])
def test_negatives_of_other_images_are_those_of_all_devices(rows_per_image):
    predictions, targets = np.float32(RNG.normal(size=(2, 16, 5, 3)))
    expected = other_images(predictions, targets, 0.2, rows_per_image)

    def logits(predictions, targets):
        return losses.other_image_logits(predictions, targets, 0.2, rows_per_image)

    alone = jax.jit(logits)(predictions, targets)
    divided = on_devices(logits, (sharding.BATCH,) * 2, sharding.BATCH)
    for found in (alone, divided(predictions, targets)):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["ema", "joint"])
def test_a_gradient_with_negatives_of_other_images_is_that_of_all_devices(target):
    found = method("latent_mim", negatives="batch", target=target)
    params = jitted(found, "init")(jax.random.key(0))
    images, views = batch(found, 8)

    def gradient(params, images, views):
        of_loss = jax.grad(found.loss_fn, has_aux=True)
        grads, metrics = of_loss(params, found.target_of(params), images, views, 0)
        return jax.lax.pmean((grads, metrics), sharding.AXES)

    results = []
    for count in (1, 8):
        divided = on_devices(gradient, (WHOLE, sharding.BATCH, sharding.BATCH), WHOLE, count)
        results.append(divided(params, images, views))
    for one, eight in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(eight, one, rtol=1e-4, atol=1e-5)


def test_predictions_have_negatives_of_other_images():
    found = method("latent_mim", negatives="batch")
    plain = method("latent_mim")
    params = jitted(plain, "init")(jax.random.key(0))
    images, views = batch(found, 8)
    _, metrics = evaluate(found, params, images, views)
    _, of_image = evaluate(plain, params, images, views)
    count = views["masked"].shape[1]
    assert float(of_image["patch_chance"]) == pytest.approx(1 / count)
    assert float(metrics["patch_chance"]) == pytest.approx(1 / (count + 7))
    assert float(metrics["reconstruction"]) > float(of_image["reconstruction"]) + 0.05


def test_negatives_of_other_images_take_the_whole_batch():
    config = vit_b.get_config()
    config.method.negatives = "batch"
    config.micro_batches = 2
    with pytest.raises(UserError, match=r"micro_batches=2: latent_mim compares the images of a"):
        build.build(config, 10)
    config.micro_batches = 1
    assert build.build(config, 10).method.negatives == "batch"


# What does not fit


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("ijepa", {"masks_per_image": 0}, "masks_per_image=0 is out of range"),
        ("ijepa", {"regularized": "cls"}, "regularized='cls' must be one of: images | patches"),
        ("pilamim", {"context_warmup": 2.0}, "context_warmup=2.0 is out of range"),
        (
            "latent_mim",
            {"masks_per_image": 4, "target_patches": "masked"},
            "share one pass of the target encoder over all patches; give target_patches=all",
        ),
        (
            "latent_mim",
            {"context_weight": 0.5, "target_patches": "masked"},
            "targets of the visible patches too; give target_patches=all",
        ),
        ("latent_mim", {"duplicate_cosine": 0.9, "loss": "mse"}, "loss=mse has no negatives"),
        ("latent_mim", {"negatives": "batch", "loss": "mse"}, "loss=mse has no negatives"),
        ("latent_mim", {"negatives": "all"}, "negatives='all' must be one of: image | batch"),
    ],
)
def test_what_does_not_fit_is_named(name, change, message):
    with pytest.raises(UserError, match=message):
        method(name, **change)


def test_pictures_show_the_first_of_several_masks():
    found = method("latent_mim", masks_per_image=3)
    keys = jax.random.split(jax.random.key(0), 2)
    views = found.sample(jax.random.key(0), keys)
    first = visualization._first_masks(views, 2)
    np.testing.assert_array_equal(first["visible"], views["visible"][::3])
    np.testing.assert_array_equal(first["offsets"], views["offsets"])
    for k in range(2):
        windows = visualization.training_windows(found, jax.device_get(first), k)
        seen = {i for i, window in enumerate(windows) if window[3]}
        assert seen == set(np.asarray(views["visible"][3 * k]).tolist())
