"""The train step: devices and micro-batches change nothing; the optimizer follows the recipe."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
import tiny
from flax.traverse_util import flatten_dict

from lmim_jax.data.augment.device import Augment
from lmim_jax.distributed import sharding
from lmim_jax.methods import base
from lmim_jax.optim import adamw
from lmim_jax.train import metric_logger, state, step
from lmim_jax.utils.errors import UserError


def setup(**change):
    config = tiny.get_config()
    config.method.update(change)
    method = base.from_config(config.method, total_steps=20, steps_per_epoch=10)
    images = Augment.from_config(
        config.augment, image_size=method.image_size, eval_size=method.feature_size
    )
    optimizer, _ = adamw.from_config(
        config.optimizer, warmup_steps=5, total_steps=20, steps_per_epoch=1
    )
    return method, images, optimizer


def norm_of(tree):
    """The norm of a tree, in float64."""
    return np.sqrt(sum(np.square(np.float64(x)).sum() for x in jax.tree.leaves(tree)))


@functools.cache
def run(devices, micro_batches, similarity_weight=0.1):
    """Take four steps on a number of devices.

    Returns:
      (losses, first gradients times 0.1, final target, steps done, norms of the first step). Norms
      are {name: (as reported, computed from the state)}.
    """
    method, images, optimizer = setup(similarity_weight=similarity_weight)
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    current = state.jit_init(method, optimizer, 0, mesh)[0]()
    train_step = jax.jit(step.make_train_step(method, images, optimizer, mesh, micro_batches))
    rng = np.random.default_rng(0)
    losses = []
    first = None
    for i in range(4):
        image = rng.integers(0, 256, (16, 24, 24, 3), dtype=np.uint8)
        batch = {"image": image, "size": np.full((16, 2), 24, np.int32)}
        current, found = train_step(current, sharding.to_global(batch, mesh))
        losses.append(float(found["loss"]))
        if i == 0:
            first = jax.device_get(current.opt_state[0].mu)
            trees = {
                "grad_norm": first,
                "param_norm": current.params,
                "target_norm": current.target,
            }
            norms = {}
            for name, tree in trees.items():
                norms[name] = (float(found[name]), norm_of(tree))
    return losses, first, jax.device_get(current.target), int(current.step), norms


def close(first, second, **tolerance):
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(a, b, **tolerance)


def test_eight_devices_equal_one():
    (one, first, *_), (eight, second, *_) = run(1, 1), run(8, 1)
    np.testing.assert_allclose(eight, one, rtol=1e-4)
    close(first, second, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("devices", [1, 8])
def test_norms_are_those_of_the_gradient_and_of_the_new_state(devices):
    *_, norms = run(devices, 1)
    (reported, tenth), *states = norms.values()
    assert reported == pytest.approx(10 * tenth, rel=1e-5)
    for reported, expected in states:
        assert reported == pytest.approx(expected, rel=1e-5)
    assert len({round(reported, 6) for reported, _ in norms.values()}) == 3


@pytest.mark.parametrize(
    ("devices", "micro_batches"), [pytest.param(1, 4, marks=pytest.mark.slow), (4, 2)]
)
def test_accumulation_equals_the_whole_batch(devices, micro_batches):
    # Similarities are averaged over a micro-batch before squaring: equality holds without them
    whole, first, target, *_ = run(1, 1, similarity_weight=0.0)
    parts, second, moved, steps, _ = run(devices, micro_batches, similarity_weight=0.0)
    np.testing.assert_allclose(parts, whole, rtol=1e-4)
    close(first, second, rtol=1e-3, atol=1e-6)
    close(target, moved, rtol=1e-3, atol=1e-4)  # the EMA moved once per optimizer step
    assert steps == 4


def reductions(jaxpr, in_loop=False):
    """Find the cross-device sums in a jaxpr; fail on any other collective.

    Yields:
      (shape, whether it is inside a scan).
    """
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        for collective in ("all_gather", "all_to_all", "ppermute", "reduce_scatter"):
            assert collective not in name
        if name.startswith("psum"):
            for variable in equation.outvars:
                yield variable.aval.shape, in_loop
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from reductions(inner, in_loop or name == "scan")


def test_gradients_are_reduced_once_per_step_and_the_batch_never_moves():
    method, images, optimizer = setup()
    train_step = step.make_train_step(method, images, optimizer, sharding.make_mesh(), 4)
    abstract = jax.eval_shape(lambda: state.init_state(method, optimizer, jax.random.key(0)))
    batch = {
        "image": jax.ShapeDtypeStruct((32, 24, 24, 3), "uint8"),
        "size": jax.ShapeDtypeStruct((32, 2), "int32"),
    }
    found = list(reductions(jax.make_jaxpr(train_step)(abstract, batch).jaxpr))
    # In the loop, only the similarities and their gradients
    assert {shape for shape, in_loop in found if in_loop} == {()}
    after = [shape for shape, in_loop in found if not in_loop]
    gradients = [leaf.shape for leaf in jax.tree.leaves(abstract.params)]
    assert sorted(shape for shape in after if shape) == sorted(gradients)


def test_state_is_a_function_of_the_seed_and_the_target_a_copy():
    method, _, optimizer = setup()
    init = jax.jit(lambda key: state.init_state(method, optimizer, key))
    first = init(jax.random.key(0))
    again = init(jax.random.key(0))
    other = init(jax.random.key(1))
    close(first.params, again.params, rtol=0)
    differing = jax.tree.map(lambda a, b: bool((a != b).any()), first.params, other.params)
    assert any(jax.tree.leaves(differing))
    close(first.target, method.target_of(first.params), rtol=0)


def test_initial_params_are_those_of_the_state():
    method, _, optimizer = setup()
    fresh = jax.jit(lambda: state.init_state(method, optimizer, jax.random.key(3)).params)()
    close(jax.jit(lambda: state.initial_params(method, 3))(), fresh, rtol=0)


def test_ema_is_a_weighted_mean_and_precise_near_the_end():
    target = {"w": np.float32([1.0, 2.0])}
    new = {"w": np.float32([3.0, 2.0])}
    np.testing.assert_allclose(step.update_target(target, new, 0.25)["w"], [1.5, 2.0])
    moved = step.update_target(target, new, np.float32(2.5e-7))["w"]
    assert moved[0] > 1.0


def test_decay_spares_what_the_official_code_spares():
    method, _, _ = setup()
    params = jax.eval_shape(method.init, jax.random.key(0))
    rules = tiny.get_config().optimizer.decay_rules
    decayed = {
        name
        for name, on in flatten_dict(adamw.match_rules(rules, params, ""), sep="/").items()
        if on
    }
    assert {"encoder/cls_token", "decoder/mask_token", "decoder/cls_token"} <= decayed
    assert {
        "encoder/block00/attn/qkv/kernel",
        "projector/linear0/kernel",
        "decoder/head/kernel",
    } <= decayed
    assert not any("bias" in name or "norm" in name or "embed" in name for name in decayed)


def test_factors_of_decay_and_learning_rate_and_the_clipped_norm():
    config = tiny.get_config().optimizer
    config.update(lr=0.1, warmup_epochs=0.0, floor=1.0, weight_decay=0.5, eps=1.0)
    config.decay_rules = (("a/.*", 0.1), ("b/.*", False), (".*", True))
    config.lr_rules = (("a/.*", 0.5), (".*", 1.0))
    config.clip_norm = 1.0
    made, _ = adamw.from_config(config, warmup_steps=0, total_steps=9, steps_per_epoch=1)
    params = {name: {"kernel": np.full(3, 2.0, np.float32)} for name in "abc"}
    grads = {name: {"kernel": np.full(3, 4.0, np.float32)} for name in "abc"}
    updates, _ = made.update(grads, made.init(params), params)
    clipped = 1 / 3  # of nine equal numbers whose norm is 1
    adam = clipped / (clipped + 1)
    for name, factor, decay in (("a", 0.5, 0.1), ("b", 1.0, 0.0), ("c", 1.0, 1.0)):
        expected = -0.1 * factor * (adam + decay * 0.5 * 2.0)
        np.testing.assert_allclose(updates[name]["kernel"], expected, rtol=1e-5)


def test_uncovered_parameters_are_named():
    with pytest.raises(UserError, match="no rule matches a/b"):
        adamw.match_rules([("c.*", True)], {"a": {"b": 1}, "c": 2}, "config.optimizer.decay_rules")


def test_adamw_equals_torchs_definition():
    _, _, optimizer = setup()
    config, rng = tiny.get_config().optimizer, np.random.default_rng(0)
    _, rate = adamw.from_config(config, warmup_steps=5, total_steps=20, steps_per_epoch=1)
    params = {"dense": {"kernel": rng.normal(size=(3, 2)).astype(np.float32)}}
    opt_state, m, v, expected = (
        optimizer.init(params),
        0,
        0,
        params["dense"]["kernel"].astype(float),
    )
    for t in range(1, 6):
        grad = rng.normal(size=(3, 2)).astype(np.float32)
        updates, opt_state = optimizer.update({"dense": {"kernel": grad}}, opt_state, params)
        params = optax.apply_updates(params, updates)
        lr = float(rate(t - 1))
        m, v = 0.9 * m + 0.1 * grad, 0.95 * v + 0.05 * grad.astype(float) ** 2
        expected = expected * (1 - lr * 0.05) - lr * (m / (1 - 0.9**t)) / (
            np.sqrt(v / (1 - 0.95**t)) + 1e-8
        )
    np.testing.assert_allclose(params["dense"]["kernel"], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("batch", "micro_batches", "hint"), [(100, 3, "96 or 120"), (4, 1, "=8"), (0, 1, "=8")]
)
def test_an_indivisible_batch_is_refused_with_a_proposal(batch, micro_batches, hint):
    with pytest.raises(UserError, match=f"config.batch_size={batch} is not divisible.*{hint}"):
        sharding.check_batch(batch, micro_batches, 8)


def sick_step(method, augmentation, optimizer, skip):
    """A state, and a function of (state, factor): a step whose images are multiplied by it."""
    mesh = sharding.make_mesh(devices=jax.devices()[:2])

    def poisoned(keys, batch):
        return augmentation(keys, batch) * batch["poison"].reshape(-1, 1, 1, 1)

    current = state.jit_init(method, optimizer, 0, mesh)[0]()
    train_step = jax.jit(
        step.make_train_step(method, poisoned, optimizer, mesh, 2, skip_nonfinite=skip)
    )

    def batch(poison):
        image = np.random.default_rng(0).integers(0, 256, (8, 24, 24, 3), dtype=np.uint8)
        rows = {
            "image": image,
            "size": np.full((8, 2), 24, np.int32),
            "poison": np.full(8, poison, np.float32),
        }
        return sharding.to_global(rows, mesh)

    def take_step(current, poison=1.0):
        return train_step(current, batch(poison))

    return current, take_step


def test_a_skipped_step_changes_nothing_but_its_number_and_the_schedules():
    method, augmentation, optimizer = setup()
    current, train_step = sick_step(method, augmentation, optimizer, skip=True)
    current, found = train_step(current)
    assert found["skipped"] == 0
    after, found = train_step(current, np.nan)
    assert found["skipped"] == 1
    assert np.isnan(found["input_mean"])
    assert int(after.step) == int(current.step) + 1
    for name in ("params", "target"):
        close(getattr(current, name), getattr(after, name), rtol=0)
    counts = {"old": [], "new": []}
    for key, one in (("old", current), ("new", after)):
        for part in jax.tree.leaves(one.opt_state, is_leaf=step._is_schedule):
            if step._is_schedule(part):
                counts[key].append(int(part.count))
    assert counts == {"old": [1, 1], "new": [2, 2]}  # learning rate and weight decay
    close(current.opt_state[0], after.opt_state[0], rtol=0)  # of Adam
    healthy, found = train_step(after)
    assert found["skipped"] == 0
    for leaf in jax.tree.leaves((healthy.params, healthy.target)):
        assert np.isfinite(leaf).all()


def test_a_teacher_that_never_changes_is_not_computed():
    method, augmentation, optimizer = setup()

    class Constant(type(method)):
        def ema_rate(self, step):
            return 0.0

    method = Constant(
        **{field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    )
    current, train_step = sick_step(method, augmentation, optimizer, skip=False)

    def target_of(self, params):
        pytest.fail("the teacher was computed")

    Constant.target_of = target_of
    after, _ = train_step(current)
    close(current.target, after.target, rtol=0)
    assert int(after.step) == 1


def test_a_gradient_that_is_not_finite_is_named():
    method, augmentation, optimizer = setup()

    class WithNaN(type(method)):
        def loss_fn(self, params, *args):
            loss, metrics = super().loss_fn(params, *args)
            return loss + jax.numpy.sqrt(
                0 * params["encoder"]["cls_token"].sum()
            ), metrics  # 0, with gradient 0 / 0

    sick = WithNaN(
        **{field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    )
    current, train_step = sick_step(sick, augmentation, optimizer, skip=False)
    _, found = train_step(current)
    assert np.isfinite(found["loss"])
    with pytest.raises(metric_logger.NonFinite, match=r"step 5: .*grad_norm = nan.*; all is well"):
        values = {name: float(value) for name, value in found.items()}
        metric_logger.check_finite(5, values, lambda: "all is well")
