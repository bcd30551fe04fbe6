"""CAPI: masks, rotary embeddings, assignments over all devices, names of published weights."""

import dataclasses
import functools
import importlib
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_capi
import tiny
from flax.traverse_util import flatten_dict
from jax.sharding import PartitionSpec
from test_reference import given_draws, group

from lmim_jax.convert import torch_encoder
from lmim_jax.convert.official import base as official
from lmim_jax.distributed import sharding
from lmim_jax.methods import base
from lmim_jax.methods.common import losses, masking
from lmim_jax.models import initializers, rope
from lmim_jax.models.layer_stack import with_remat_and_scan
from lmim_jax.optim import adamw
from lmim_jax.train import build as train_build
from lmim_jax.train import step as train_step
from lmim_jax.train.state import init_state
from lmim_jax.utils.errors import UserError

CASE = pathlib.Path(__file__).parent / "reference" / "capi.npz"


def build(**change):
    section = {**tiny.method("capi"), **change}
    return base.from_config(section, total_steps=100, steps_per_epoch=10)


def weights(method, seed=0):
    """Random parameters of a method, without running its initialization."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        return (0.2 * rng.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree.map(draw, jax.eval_shape(method.init, jax.random.key(0)))


@functools.cache
def blocks(grid, count, roll, number=300):
    """Many blocks of `count` patches, [number, h, w]."""

    def draw(key):
        return masking.block_of(key, grid, count, aspect=0.5, roll=roll)

    return np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), number)))


def sides(mask):
    """(top, left, height, width) of the smallest rectangle around a mask."""
    rows = np.flatnonzero(mask.any(axis=1))
    columns = np.flatnonzero(mask.any(axis=0))
    return rows[0], columns[0], rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1


@pytest.mark.parametrize(
    ("grid", "count"), [((16, 16), 90), ((8, 8), 23), ((5, 9), 16), ((4, 4), 16), ((2, 12), 9)]
)
def test_a_block_has_exactly_its_number_of_patches_and_is_the_start_of_a_rectangle(grid, count):
    found = blocks(grid, count, False)
    assert (found.sum(axis=(1, 2)) == count).all()
    for mask in found:
        top, left, height, width = sides(mask)
        rectangle = mask[top : top + height, left : left + width].ravel()
        assert rectangle[:count].all()  # in raster order
        # Sides are rounded up: a row or a column less would not hold them
        assert (height - 1) * width < count


def test_blocks_have_the_aspects_of_the_released_code_and_lie_anywhere():
    found = blocks((16, 16), 90, False, 3000)
    boxes = np.array([sides(mask) for mask in found])
    # ceil(sqrt(90 / a)) for log a uniform in [log 1/2, log 2]
    expected = np.ceil(np.sqrt(90 * 2 ** np.linspace(-1, 1, 100_001)))
    assert set(boxes[:, 3]) == set(range(7, 15)) == set(expected)
    for width in range(7, 15):
        share = (expected == width).mean()
        assert (boxes[:, 3] == width).mean() == pytest.approx(share, abs=0.04), width
    assert set(boxes[boxes[:, 3] == 10, 1]) == set(range(7))


def test_a_rolled_block_wraps_round_the_edges_and_covers_every_patch_alike():
    found = blocks((8, 8), 23, True, 2000)
    assert (found.sum(axis=(1, 2)) == 23).all()
    shares = found.mean(axis=0)
    np.testing.assert_allclose(shares, 23 / 64, atol=0.05)  # without roll, edges are rarer
    assert np.ptp(blocks((8, 8), 23, False, 2000).mean(axis=0)) > 0.2
    assert any(mask[:, 0].any() and mask[:, -1].any() and not mask.all(0).any() for mask in found)


@pytest.mark.parametrize("kind", ["inverse_block", "block", "random"])
def test_views_split_the_patches_as_the_released_code_does(kind):
    method = build(grid=(8, 8), sampler=kind, mask_ratio=0.65, prediction_ratio=0.15)
    views = method.sample(jax.random.key(0), jax.random.split(jax.random.key(1), 50))
    assert views["visible"].shape == (50, 64 - 41)  # int(64 x 0.65) are masked
    assert views["predicted"].shape == (50, 6)  # int(41 x 0.15)
    assert (np.diff(views["visible"]) > 0).all()  # raster order
    for visible, predicted in zip(views["visible"], views["predicted"], strict=True):
        assert len(set(predicted.tolist())) == 6
        assert not set(predicted.tolist()) & set(visible.tolist())
    assert (np.diff(views["predicted"]) < 0).any()  # at random
    assert len(np.unique(views["predicted"])) > 50


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction_ratio": 0.05}, "prediction_ratio=0.05 is out of range"),
        ({"registers": 6}, "registers=6 must be divisible by 4"),
        ({"width": 12, "heads": 2}, "width=12 / heads=2 must be divisible by 4 for rope"),
        ({"rope": "2d"}, "rope='2d' must be one of: axial | capi"),
    ],
)
def test_options_that_cannot_be_are_refused(change, message):
    with pytest.raises(UserError, match=message.replace("|", r"\|")):
        build(**change)


def scores(kind, query, key, shift):
    """The product of a query at 3 / 7 of an image and a key at 5 / 7, both shifted."""
    places = np.array([[[0.25, 0.3]], [[0.5, 0.1]]]) + shift
    turned = []
    for x, place in zip((query, key), places, strict=True):
        made = rope.make_rope(jnp.asarray(place[None], jnp.float32), 16, kind, (7.0, 7e-4))
        turned.append(made(jnp.asarray(x, jnp.float32).reshape(1, 1, 1, 16)))
    return float((turned[0] * turned[1]).sum()), turned


def test_axial_rope_sees_differences_alone_and_that_of_the_released_code_does_not():
    query, key = np.random.default_rng(0).normal(size=(2, 16))
    for kind, exact in (("axial", True), ("capi", False)):
        here, turned = scores(kind, query, key, 0.0)
        there, _ = scores(kind, query, key, 0.31)
        assert (abs(here - there) < 1e-5) == exact
        same_length = np.linalg.norm(turned[0]) / np.linalg.norm(query)
        assert (abs(same_length - 1) < 1e-5) == exact


def test_rope_has_the_published_angles():
    row, column = rope.angular_frequencies(64, (7.0, 7e-4))
    np.testing.assert_array_equal(row[32:], 0)
    np.testing.assert_array_equal(column[:32], 0)
    np.testing.assert_array_equal(row[:16], row[16:32])
    np.testing.assert_array_equal(row[:32], column[32:])
    turns = 7 * 10_000.0 ** -(np.arange(16) / 15)
    np.testing.assert_allclose(row[:16], 2 * np.pi * turns, rtol=1e-6)


def test_registers_stand_on_the_border_of_what_is_seen():
    coordinates = np.array([[[0.25, 0.5], [0.75, 0.5], [0.5, 1.0], [9.0, 9.0]]], np.float32)
    mask = np.array([[True, True, True, False]])
    found = rope.register_coordinates(coordinates, 8, mask)[0]
    expected = [
        (0.25, 0.5), (0.5, 0.5), (0.75, 0.5), (0.75, 0.75),
        (0.75, 1.0), (0.5, 1.0), (0.25, 1.0), (0.25, 0.75),
    ]  # fmt: skip
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_assignments_are_balanced_over_the_batch_at_every_position():
    logits = np.random.default_rng(0).normal(size=(64, 3, 8)).astype(np.float32)
    assigned = np.asarray(losses.sinkhorn(logits, 0.06, 50, True))
    np.testing.assert_allclose(assigned.sum(axis=2), 1, rtol=1e-5)
    np.testing.assert_allclose(assigned.sum(axis=0), 64 / 8, rtol=0.05)
    together = np.asarray(losses.sinkhorn(logits, 0.06, 50, False))
    np.testing.assert_allclose(together.sum(axis=(0, 1)), 3 * 64 / 8, rtol=0.05)
    assert np.abs(together.sum(axis=0) - 8).max() > 1


@pytest.mark.parametrize("positionwise", [True, False])
def test_assignments_are_those_of_the_whole_batch_on_any_number_of_devices(positionwise):
    logits = np.random.default_rng(0).normal(size=(16, 3, 8)).astype(np.float32)
    logits[3] += 200  # the largest value of all is on one device

    def assign(logits):
        return losses.sinkhorn(logits, 0.06, 3, positionwise)

    mesh = sharding.make_mesh()
    split = PartitionSpec(sharding.AXES)
    on_devices = jax.shard_map(assign, mesh=mesh, in_specs=split, out_specs=split)
    np.testing.assert_allclose(jax.jit(on_devices)(logits), assign(logits), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("data", "fsdp"), [(8, 1), (2, 4)])
def test_losses_of_training_do_not_depend_on_the_number_of_devices(data, fsdp, monkeypatch):
    monkeypatch.setattr(train_step, "draw", given_draws)
    method = build(clusters=8, drop_path=0.3)
    config = importlib.import_module("lmim_jax.configs.capi_vit_b").get_config().optimizer
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
            found.append([float(metrics[name]) for name in ("prediction_loss", "cluster_loss")])
    np.testing.assert_allclose(found[3:], found[:3], rtol=1e-5)


def test_micro_batches_are_refused():
    config = importlib.import_module("lmim_jax.configs.capi_vit_b").get_config()
    config.micro_batches = 2
    with pytest.raises(UserError, match=r"micro_batches=2: capi compares the images of a"):
        train_build.build(config, 10)


@pytest.mark.slow
def test_dropped_branches_do_nothing_and_others_weigh_more():
    method = build(drop_path=0.5)
    keys = jax.random.split(jax.random.key(1), 4)
    views = dict(method.sample(jax.random.key(0), keys))
    assert views["kept"].shape == (4, 2, 2)
    params = weights(method)
    images = np.random.default_rng(0).normal(size=(4, 16, 16, 3)).astype(np.float32)
    views["kept"] = np.zeros((4, 2, 2), bool)
    forward = jax.jit(method.forward)
    dropped = forward(params, params, images, views)
    mask_token = params["predictor"]["mask_token"][0, 0]
    alone = mask_token / np.sqrt(np.mean(mask_token**2) + method.norm_eps)
    expected = np.broadcast_to(alone, dropped["predictions"].shape)
    np.testing.assert_allclose(dropped["predictions"], expected, rtol=1e-5)
    views["kept"] = np.ones((4, 2, 2), bool)
    halved = {key: value for key, value in views.items() if key != "kept"}
    whole = dataclasses.replace(method, drop_path=0.0)
    kept = forward(params, params, images, views)["visible"]
    assert not np.allclose(kept, jax.jit(whole.forward)(params, params, images, halved)["visible"])


@pytest.mark.parametrize(("remat", "scan"), [("full", False), ("dots", True)])
@pytest.mark.slow
def test_dropped_branches_are_the_same_with_remat_and_scan(remat, scan):
    method = build(drop_path=0.5, depth=2)
    views = method.sample(jax.random.key(0), jax.random.split(jax.random.key(1), 4))
    params = weights(method)
    images = np.random.default_rng(0).normal(size=(4, 16, 16, 3)).astype(np.float32)

    def loss(params):
        return method.loss_fn(params, params, images, views, 0)[0]

    expected = jax.jit(jax.grad(loss))(params)["encoder"]
    found = jax.jit(with_remat_and_scan(jax.grad(loss), remat, scan))(params)["encoder"]
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_padding_changes_no_feature():
    method = build(registers=8)
    params = weights(method)
    patches = np.random.default_rng(0).normal(size=(2, 12, method.patch_dim)).astype(np.float32)
    positions = np.asarray(method.positions_of(params, (3, 4)))
    encode = jax.jit(method.patch_features)
    expected = encode(params, patches, positions)
    padded = np.pad(patches, ((0, 0), (0, 4), (0, 0)), constant_values=7.0)
    places = np.pad(positions, ((0, 0), (0, 4), (0, 0)), constant_values=5.0)
    mask = np.broadcast_to(np.arange(16) < 12, (2, 16))
    found = encode(params, padded, np.repeat(places, 2, axis=0), mask)
    for name in ("patches", "predicted"):
        np.testing.assert_allclose(found[name][:, :12], expected[name], atol=2e-5, err_msg=name)
    np.testing.assert_allclose(found["registers"], expected["registers"], atol=2e-5)


def test_networks_start_as_those_of_the_released_code():
    method = build(width=64, heads=4, depth=1, clusters=64)
    params = flatten_dict(jax.jit(method.init)(jax.random.key(0)), sep="/")
    widest = {path: float(np.abs(value).max()) for path, value in params.items()}
    of_square = (6 / (64 + 64)) ** 0.5  # xavier-uniform of 64 -> 64
    of_embedding = (6 / (method.patch_dim + 64)) ** 0.5
    for path, bound in {
        "encoder/block00/attn/qkv/kernel": of_square,
        "encoder/block00/attn/proj/kernel": of_square,
        "encoder/patch_embed/kernel": of_embedding,
        "encoder/patch_embed/bias": method.patch_dim**-0.5,
        "predictor/block00/attn/kv/kernel": (6 / (64 + 8)) ** 0.5,
    }.items():
        assert 0.9 * bound < widest[path] <= bound * 1.000001, path
    assert np.std(params["clustering/kernel"]) == pytest.approx(1, abs=0.05)
    assert np.std(params["head/kernel"]) == pytest.approx(0.02, abs=0.002)
    assert np.std(params["encoder/registers"]) == pytest.approx(0.02, abs=0.004)
    np.testing.assert_array_equal(params["head/gain"], 1)
    fused = {"qkv": {"kernel": np.ones((4, 12), np.float32)}, "norm": {"scale": np.ones(4)}}
    scaled = initializers.xavier_by_projection(fused)
    np.testing.assert_allclose(scaled["qkv"]["kernel"], 2**0.5, rtol=1e-6)


def test_the_optimizer_has_the_factors_of_the_released_code():
    config = importlib.import_module("lmim_jax.configs.capi_vit_b").get_config().optimizer
    method = build()
    params = jax.eval_shape(method.init, jax.random.key(0))
    rates = flatten_dict(adamw.match_rules(config.lr_rules, params, ""), sep="/")
    decays = flatten_dict(adamw.match_rules(config.decay_rules, params, ""), sep="/")
    for path, rate in rates.items():
        expected = 1.0
        if path.startswith("clustering"):
            expected = 0.5
        elif "patch_embed" in path:
            expected = 0.2
        assert rate == expected, path
    for name, entry in official.entries(method).items():
        if not name.startswith(("student.", "teacher.")):
            continue
        expected = 1.0
        if name.startswith("teacher"):
            expected = 0.1  # of 0.1: torch's default of 0.01
        elif "norm" in name and "weight" in name and "weight_" not in name:
            expected = 0.1
        elif name.endswith(".bias"):
            expected = 0.0
        assert decays[entry.path.removeprefix("params/")] == expected, name


def test_the_teacher_follows_the_learning_rate():
    config = importlib.import_module("lmim_jax.configs.capi_vit_l").get_config()
    parts = train_build.build(config, 78)
    for step in (0, 1, 25_000, 49_999, 50_000, 270_000, 499_999):
        assert float(parts.method.ema_rate(step)) == pytest.approx(
            float(parts.learning_rate(step)), rel=1e-5, abs=1e-12
        )


def test_published_backbones_are_imported_by_name(tmp_path):
    with np.load(CASE, allow_pickle=False) as file:
        case = dict(file)
    method = reference_capi.method(json.loads(str(case["config_json"])))
    published = {}
    for name, array in group(case, "state/student_ema.").items():
        if name.startswith("backbone."):
            published[name] = array
    published["backbone.encoder.blocks.0.residual1.fn.rope.freqs"] *= 1.0005  # as after an EMA
    np.savez(tmp_path / "capi_vits.npz", **published)
    import_weights = importlib.import_module("lmim_jax.cli.import_weights")
    fresh = (r"student\.head.*", r"student_ema.*", r"teacher.*")
    contents = import_weights.read(tmp_path / "capi_vits.npz", method, (), fresh)
    assert contents.tree["params"].keys() == {"encoder", "predictor"}
    whole = official.from_official(method, group(case, "state/"))["target"]
    for name in ("encoder", "predictor"):
        jax.tree.map(np.testing.assert_array_equal, contents.tree["params"][name], whole[name])
    other = dataclasses.replace(method, rope_frequencies=(10.0, 7e-4))
    with pytest.raises(UserError, match="other constants than this method's"):
        import_weights.read(tmp_path / "capi_vits.npz", other, (), fresh)


def test_other_libraries_cannot_hold_the_encoder():
    method = build()
    with pytest.raises(UserError, match="has registers=16, rope=axial, norm=rms, unlike"):
        torch_encoder.from_method(method, weights(method))


def test_a_whole_model_returns_from_its_official_names():
    method = build()
    params = weights(method)
    target = method.target_of(weights(method, seed=1))
    arrays = official.to_official(method, params, target)
    official.check(method, arrays)
    back = official.from_official(method, arrays)
    jax.tree.map(np.testing.assert_array_equal, back, {"params": params, "target": target})
