"""Parts of fine-tuning: mixing, erasing, layer-wise learning rates, stochastic depth."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lmim_jax.data.augment import mixup
from lmim_jax.methods import base as methods
from lmim_jax.models import layer_stack
from lmim_jax.models.vit import ViT
from lmim_jax.optim import adamw, layer_decay

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(6, 16, 20, 3)).astype(np.float32)
TARGETS = np.eye(4, dtype=np.float32)[RNG.integers(0, 4, 6)]
NEIGHBOR = np.array([1, 0, 3, 2, 5, 4])


def test_smooth_labels():
    found = np.asarray(mixup.smooth_labels(np.array([2, 0]), 4, 0.1))
    np.testing.assert_allclose(
        found, [[0.025, 0.025, 0.925, 0.025], [0.925, 0.025, 0.025, 0.025]], rtol=1e-6
    )


def test_mixup_weighs_images_and_targets_alike():
    shares = []
    for seed in range(40):
        images, targets = MIX(jax.random.key(seed), IMAGES, TARGETS, 0.8, 0.0, 0.5)
        difference = IMAGES - IMAGES[NEIGHBOR]
        share = float(((images - IMAGES[NEIGHBOR]) * difference).sum() / (difference**2).sum())
        np.testing.assert_allclose(
            images, share * IMAGES + (1 - share) * IMAGES[NEIGHBOR], atol=1e-4
        )
        np.testing.assert_allclose(
            targets, share * TARGETS + (1 - share) * TARGETS[NEIGHBOR], atol=1e-4
        )
        shares.append(share)
    assert np.mean(shares) == pytest.approx(0.5, abs=0.2)
    assert np.std(shares) == pytest.approx(0.31, abs=0.08)  # of Beta(0.8, 0.8)


MIX = jax.jit(mixup.mix_batch, static_argnums=(3, 4, 5))


def test_cutmix_weighs_targets_by_the_area_of_the_box():
    shares = []
    for seed in range(40):
        images, targets = MIX(jax.random.key(seed), IMAGES, TARGETS, 0.0, 1.0, 0.5)
        other = np.asarray(images == IMAGES[NEIGHBOR]).all(-1)
        assert (other | np.asarray(images == IMAGES).all(-1)).all()
        assert (other == other[:1]).all()  # one box for the batch
        rows, columns = np.flatnonzero(other[0].any(1)), np.flatnonzero(other[0].any(0))
        assert other[0].sum() == len(rows) * len(columns)  # a box
        share = 1 - other[0].mean()
        np.testing.assert_allclose(
            targets, share * TARGETS + (1 - share) * TARGETS[NEIGHBOR], atol=1e-6
        )
        shares.append(share)
    assert 0.5 < np.mean(shares) < 0.8  # 0.5 before boxes are cut off at the border


def test_each_batch_is_mixed_or_cut():
    kinds = []
    for seed in range(40):
        images, _ = MIX(jax.random.key(seed), IMAGES, TARGETS, 0.8, 1.0, 0.5)
        kinds.append(bool(np.asarray((images == IMAGES) | (images == IMAGES[NEIGHBOR])).all()))
    assert 10 < sum(kinds) < 30
    same = mixup.mix_batch(jax.random.key(0), IMAGES, TARGETS, 0.0, 0.0, 0.5)
    assert same[0] is IMAGES


def test_random_erasing():
    erase = jax.jit(jax.vmap(lambda key: mixup.random_erase(key, jnp.full((32, 40, 3), 7.0), 0.25)))
    images = np.asarray(erase(jax.random.split(jax.random.key(0), 400)))
    erased = (images != 7).all(-1)
    assert erased.any((1, 2)).mean() == pytest.approx(0.25, abs=0.07)
    for mask in erased[erased.any((1, 2))]:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert mask.sum() == len(rows) * len(columns)
        assert 0.01 < mask.mean() < 0.36
        assert 0.25 < len(rows) / len(columns) < 4
    noise = images[images != 7]
    assert noise.mean() == pytest.approx(0, abs=0.05)
    assert noise.std() == pytest.approx(1, abs=0.05)


def encoder_params(name):
    section = tiny.method(name)
    section.depth = 2
    method = methods.from_config(section, total_steps=1, steps_per_epoch=1)
    return jax.eval_shape(method.init, jax.random.key(0))["encoder"]


def values(tree):
    """The different leaves of a tree."""
    return set(jax.tree.leaves(tree))


@pytest.mark.parametrize("name", methods.names())
def test_learning_rates_fall_by_layer(name):
    trained = {
        "encoder": encoder_params(name),
        "head": {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)},
    }
    factors = adamw.match_rules(layer_decay.learning_rate_factors(trained, 0.5), trained, "it")
    assert values(factors["head"]) == {1.0}
    if "norm" in trained["encoder"]:  # it may have no weights
        assert values(factors["encoder"]["norm"]) == {1.0}
    assert values(factors["encoder"]["block01"]) == {0.5}
    assert values(factors["encoder"]["block00"]) == {0.25}
    below = {
        key: tree
        for key, tree in factors["encoder"].items()
        if not key.startswith(("block", "norm"))
    }
    assert "patch_embed" in below
    assert values(below) == {0.125}


def approximately(value):
    return pytest.approx(value, rel=1e-4)


def test_adamw_scales_the_step_and_spares_biases():
    shapes = {
        "patch_embed": {"kernel": (2, 3), "bias": (3,)},
        "block00": {"kernel": (3, 3)},
        "cls_token": (1, 1, 3),
    }
    ones = jax.tree.map(jnp.ones, shapes, is_leaf=lambda x: isinstance(x, tuple))
    trained = {"encoder": ones, "head": jnp.ones((2, 2))}
    optimizer = layer_decay.adamw(
        0.1, trained, b1=0.9, b2=0.999, eps=0.0, weight_decay=0.5, decay=0.5
    )
    updates, _ = optimizer.update(
        jax.tree.map(jnp.ones_like, trained), optimizer.init(trained), trained
    )
    # The first step of Adam is 1, and that of weight decay 0.5
    first = jax.tree.map(lambda x: float(x.ravel()[0]), updates)
    assert first["head"] == approximately(-0.1 * 1.5)
    assert first["encoder"]["block00"]["kernel"] == approximately(-0.05 * 1.5)
    assert first["encoder"]["patch_embed"] == approximately(
        {"kernel": -0.025 * 1.5, "bias": -0.025}
    )
    assert first["encoder"]["cls_token"] == approximately(-0.025)


VIT = ViT(
    width=8,
    depth=3,
    heads=2,
    mlp_ratio=2.0,
    norm_eps=1e-6,
    dtype=jnp.dtype("float32"),
    attention="xla",
)
PATCHES = jnp.ones((64, 4, 5))
POSITIONS = jnp.zeros((1, 4, 8))
WEIGHTS = VIT.init(jax.random.key(0), PATCHES, POSITIONS)


def encode(rate, remat="none", scan_layers=False):
    def run(weights, key):
        with layer_stack.stochastic_depth(key, rate):
            return VIT.apply(weights, PATCHES, POSITIONS)[1]

    return jax.jit(layer_stack.with_remat_and_scan(run, remat, scan_layers))


def program(jitted):
    """The text of a lowered program, without its first line, the name."""
    return jitted.lower(WEIGHTS, jax.random.key(0)).as_text().partition("\n")[2]


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_blocks_that_record_their_features_are_recomputed_one_by_one(remat):
    def loss(weights, x):
        (_, tokens), recorded = VIT.apply(weights, x, POSITIONS, mutable=["intermediates"])
        return (tokens**2).mean(), recorded["intermediates"]

    step = jax.value_and_grad(loss, has_aux=True)
    expected = jax.jit(step)(WEIGHTS, PATCHES)
    rematerialized = layer_stack.with_remat_and_scan(step, remat, False)
    found = jax.jit(rematerialized)(WEIGHTS, PATCHES)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
    blocks = str(jax.make_jaxpr(rematerialized)(WEIGHTS, PATCHES)).count("prevent_cse=True")
    assert blocks == VIT.depth
    assert "prevent_cse" not in str(jax.make_jaxpr(step)(WEIGHTS, PATCHES))


def test_rate_0_leaves_the_program_as_it_is():
    plain = jax.jit(lambda weights, key: VIT.apply(weights, PATCHES, POSITIONS)[1])
    assert program(encode(0.0)) == program(plain)


def test_stochastic_depth_drops_branches_of_images_and_keeps_the_mean():
    keys = jax.random.split(jax.random.key(0), 12)
    dropped = encode(0.5)
    whole = np.asarray(encode(0.0)(WEIGHTS, keys[0]))
    draws = np.stack([dropped(WEIGHTS, key) for key in keys]).reshape(-1, 5, 8)
    outcomes = {tuple(np.round(image.ravel(), 4)) for image in draws}
    assert 8 < len(outcomes) <= 16  # 2 branches of blocks 1 and 2; block 0 is always there
    assert np.abs(draws.mean(0) - whole[0]).max() < np.abs(draws - whole[:1]).max() / 4
    looped = encode(0.5, remat="full", scan_layers=True)  # which must not matter
    np.testing.assert_allclose(looped(WEIGHTS, keys[0]), dropped(WEIGHTS, keys[0]), atol=1e-5)


def test_kept_branches_are_divided_by_their_probability():
    keep = np.asarray(layer_stack._branch_scales(jax.random.key(0), 0.4, 5, 4000))
    assert (keep[0] == 1).all()
    for i, share in enumerate((1.0, 0.9, 0.8, 0.7, 0.6)):
        assert set(np.round(np.unique(keep[i]), 4)) <= {0.0, np.float32(round(1 / share, 4))}
        assert keep[i].mean() == pytest.approx(1, abs=0.05)
