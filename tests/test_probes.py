"""Probes on made-up features: perfect ones, chance, padding; batch normalization; messages."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lmim_jax.data.eval.eval_data import with_held_out
from lmim_jax.distributed import sharding
from lmim_jax.evaluators import attentive_probe, base, linear_probe
from lmim_jax.evaluators.common import probe_grid, probe_layers
from lmim_jax.evaluators.common.probe_training import (
    Length,
    Task,
    TrainingBatch,
    Weights,
    build_programs,
)
from lmim_jax.utils.errors import UserError

CLASSES, WIDTH = 7, 12
RNG = np.random.default_rng(0)


@dataclasses.dataclass(frozen=True)
class Same:
    """An augmentation that changes nothing."""

    scale: tuple = (1.0, 1.0)
    ratio: tuple = (1.0, 1.0)
    flip: bool = False
    interpolation: str = "bicubic"
    image_size: tuple = (2, 1)
    eval_size: tuple = (2, 1)

    def __call__(self, keys, batch):
        return batch["image"]

    def denormalize(self, images):
        return images


class Source:
    """What a probe asks of the images of a split: their number and classes."""

    def __init__(self, labels):
        self.labels = labels

    def __len__(self):
        return len(self.labels)


class Data:
    """An in-memory `EvaluationData`: images of two pixels, which are two patches."""

    classes = tuple("abcdefg")
    targets = None
    keep = None
    accepted = types.MappingProxyType({})
    config = types.SimpleNamespace(channels=WIDTH)
    augment = Same()
    mesh = sharding.make_mesh()

    def __init__(self, train, test, padding=0):
        self.sources = {"train": Source(train[1]), "test": Source(test[1])}
        self.splits = {"train": train, "test": test}
        self.padding = padding
        self.read = []  # splits, in this order

    def _images(self, split):
        x, y = self.splits["train" if split == "held_out" else split]
        rows = getattr(self.sources[split], "indices", range(len(x)))
        return x[list(rows)], y[list(rows)]

    def training(self, batch_size, steps, seed):
        rng = np.random.default_rng(seed)
        x, y = self._images("train")
        for _ in range(steps):
            rows = rng.permutation(len(x))[:batch_size]
            yield sharding.to_global({"image": x[rows], "label": y[rows]}, self.mesh)

    def batches(self, split, batch_size):
        self.read.append(split)
        x, y = self._images(split)
        count = -(-len(x) // batch_size) * batch_size + self.padding * batch_size
        index = np.where(np.arange(count) < len(x), np.arange(count), -1)
        for rows in index.reshape(-1, batch_size):
            images = np.where(rows[:, None, None, None] < 0, np.float32(9e9), x[rows])
            yield sharding.to_global({"images": images, "label": y[rows], "index": rows}, self.mesh)


class Method:
    """A method whose features are its images, through an encoder of one matrix."""

    @staticmethod
    def features(params, images):
        tokens = images[:, :, 0] @ params["encoder"]["block00"]["kernel"]
        return {"patches": tokens, "patches_prenorm": tokens, "cls": tokens[:, 0]}


PARAMS = {"encoder": {"block00": {"kernel": jnp.eye(WIDTH)}}, "decoder": jnp.ones(3)}


def splits(informative):
    """Features that are classes plus the same noise for all images, or only noise."""
    noise = RNG.normal(size=(1, 2, 1, WIDTH))
    out = []
    for count in (128, 90):
        labels = np.arange(count, dtype=np.int32) % CLASSES
        x = np.eye(WIDTH)[labels][:, None, None].repeat(2, 1) + noise
        if not informative:
            x = RNG.normal(size=x.shape)
        out.append((x.astype(np.float32), labels))
    return out


def make(name, **change):
    """A probe that trains quickly."""
    rate, epochs = {
        "linear_probe": (80.0, 40.0),
        "attentive_probe": (0.3, 10.0),
        "finetune": (0.3, 10.0),
    }[name]
    fields = dict(batch_size=32, epochs=epochs, warmup_epochs=1.0, base_lr=rate)
    if name == "finetune":
        fields.update(randaugment=(0, 9.0, 0.5))  # the features are not colors
    section = {**tiny.evaluator(name), **fields, **change}
    (scheduled,) = base.from_config({"it": section}, steps_per_epoch=1, has_target=False)
    return scheduled.evaluator


@pytest.mark.parametrize("name", ["linear_probe", "attentive_probe", "finetune"])
def test_perfect_features_score_100_and_others_chance(name):
    found = make(name).run(Method, PARAMS, Data(*splits(True)))
    assert found == {"top1": 100.0, "top5": 100.0, "majority": pytest.approx(100 * 13 / 90)}
    found = make(name).run(Method, PARAMS, Data(*splits(False)))
    assert found["top1"] == pytest.approx(100 / 7, abs=12)
    assert found["top5"] == pytest.approx(500 / 7, abs=15)


def test_padding_changes_no_metric():
    data = splits(False)
    once, padded = (
        make("linear_probe", epochs=2.0).run(Method, PARAMS, Data(*data, n)) for n in (0, 2)
    )
    assert once == padded
    assert once["top1"] * 90 / 100 == pytest.approx(round(once["top1"] * 90 / 100))  # of 90 images


def losses(splits, seed, mesh):
    """The losses of four steps of a linear probe."""
    (probe,) = make("linear_probe", seed=seed).settings()
    data = Data(*splits)
    data.mesh = mesh
    found = []
    create, step, _ = build_programs(
        probe, Task(Method, Same(), CLASSES), mesh, Length(4, 4), WIDTH
    )
    state = create(PARAMS)
    for batch in data.training(32, 4, seed):
        state, loss = step(state, PARAMS, batch)
        found.append(float(loss))
    return found


def test_training_repeats_on_any_number_of_devices():
    data = splits(False)
    first = losses(data, 0, Data.mesh)
    assert losses(data, 0, Data.mesh) == first != losses(data, 1, Data.mesh)
    assert losses(data, 0, sharding.make_mesh(devices=jax.devices()[:1])) == pytest.approx(
        first, rel=1e-5
    )
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(PARAMS))


def state_alone(probe, data, steps):
    """The state of a probe with one setting after some steps."""
    task = Task(Method, Same(), CLASSES)
    create, step, _ = build_programs(probe, task, Data.mesh, Length(steps, 2.0), WIDTH)
    state = create(PARAMS)
    for batch in data.training(probe.batch_size, steps, probe.seed):
        state, _ = step(state, PARAMS, batch)
    return state


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("attentive_probe", {"base_lr": (1e-3, 0.3), "weight_decay": (5e-2, 0.0)}),
        ("linear_probe", {"base_lr": (80.0, 1.0), "weight_decay": (0.0, 1e-2)}),
        (
            "linear_probe",
            {
                "base_lr": (0.5, 2.0),
                "feature": "cls | cls+patches",
                "normalize": (True, False),
                "decay_epochs": 1.0,
            },
        ),
    ],
)
def test_heads_of_a_grid_equal_heads_trained_alone(name, change):
    probe = make(name, held_out=0.25, **change)
    settings = tuple(probe.settings())
    data = Data(*splits(False))
    task = Task(Method, Same(), CLASSES)
    grid = probe_grid.build_grid(settings, task, Data.mesh, Length(6, 2.0), WIDTH)
    state = grid.create(PARAMS)
    for batch in data.training(probe.batch_size, 6, probe.seed):
        state, losses = grid.step(state, PARAMS, batch)
    assert losses.shape == (len(settings),) and len(set(np.asarray(losses).tolist())) > 1
    for number in (0, len(settings) - 1):
        found = grid.select(state, number)
        alone = state_alone(settings[number], data, 6)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5), found, alone
        )


def test_the_better_setting_is_chosen_without_a_look_at_the_test_images():
    train, test = splits(True)
    probe = make("attentive_probe", base_lr=(1e-7, 0.3, 1e-6), held_out=0.25)
    data = Data(train, test)
    found = probe.run(Method, PARAMS, data)
    assert found["top1"] == found["held_out"] == 100.0
    assert (found["base_lr"], found["weight_decay"]) == (0.3, 1e-3)
    assert data.read == ["held_out", "test"]
    rows = [row.split(",") for row in found["grid"].splitlines()]
    assert rows[0] == ["base_lr", "weight_decay", "held_out"]
    assert [row[0] for row in rows[1:]] == ["1e-07", "0.3", "1e-06"]
    assert float(rows[1][2]) < float(rows[2][2]) == 100.0
    shuffled = (RNG.normal(size=test[0].shape).astype(np.float32), test[1][::-1].copy())
    other = probe.run(Method, PARAMS, Data(train, shuffled))
    assert other["top1"] < 60
    for key in ("grid", "base_lr", "weight_decay", "held_out"):
        assert other[key] == found[key]


def test_held_out_images_are_no_training_images():
    data = with_held_out(Data(*splits(True)), 0.25, 0)
    train = data.sources["train"].indices
    held = data.sources["held_out"].indices
    assert len(held) == 32 and sorted(train + held) == list(range(128))
    assert held != with_held_out(Data(*splits(True)), 0.25, 1).sources["held_out"].indices


def test_heads_that_diverge_are_not_chosen():
    data = splits(True)
    found = make("linear_probe", base_lr=(1e38, 80.0), held_out=0.25, batch_size=32)
    found = found.run(Method, PARAMS, Data(*data))
    assert found["base_lr"] == 80.0 and found["held_out"] == 100.0
    assert found["grid"].splitlines()[1].endswith(",-inf")
    with pytest.raises(UserError, match="all heads are not finite"):
        make("linear_probe", base_lr=(1e38, 2e38), held_out=0.25).run(Method, PARAMS, Data(*data))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_lr": ()}, "base_lr is empty"),
        ({"base_lr": (1.0, 2.0), "held_out": 0.0}, "held_out=0.0 .* among 2 settings"),
        ({"base_lr": (1.0, 2.0), "held_out": 0.9}, "13 training images"),
        ({"crop_tries": 3}, "crop_tries=3 must be 1 or 10"),
        ({"interpolation": "nearest"}, "interpolation='nearest' must be one of"),
    ],
)
def test_a_bad_choice_is_named(change, message):
    with pytest.raises(UserError, match=message):
        make("linear_probe", **change).run(Method, PARAMS, Data(*splits(True)))


def test_batch_norm_is_torchs():
    """torch.nn.BatchNorm1d(affine=False, eps=1e-6), by its documentation, in float64."""
    running = probe_layers.batch_norm_init(5)
    mean = np.zeros(5)
    variance = np.ones(5)
    for step in range(4):
        x = (RNG.normal(size=(9, 5)) * (step + 1) + 50).astype(np.float32)
        y, running = jax.jit(probe_layers.batch_norm_train, static_argnums=2)(x, running, 1e-6)
        wide = x.astype(np.float64)
        np.testing.assert_allclose(
            y, (wide - wide.mean(0)) / np.sqrt(wide.var(0) + 1e-6), atol=1e-4
        )
        mean = 0.9 * mean + 0.1 * wide.mean(0)
        variance = 0.9 * variance + 0.1 * wide.var(0, ddof=1)
    np.testing.assert_allclose(running["mean"], mean, rtol=1e-5)
    np.testing.assert_allclose(running["variance"], variance, rtol=1e-5)
    expected = (x - mean) / np.sqrt(variance + 1e-6)
    np.testing.assert_allclose(
        probe_layers.batch_norm(x, running, 1e-6), expected, rtol=1e-4, atol=1e-4
    )


def test_unlabeled_data_has_no_metrics():
    data = Data(*splits(True))
    data.classes = ()
    probe = make("linear_probe")
    assert probe.needs_labels
    assert probe.run(Method, PARAMS, data) == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [({"batch_size": 512}, "128 training images; try 128"), ({"batch_size": 20}, "8 device")],
)
def test_a_bad_batch_is_named(change, message):
    with pytest.raises(UserError, match=message):
        make("linear_probe", **change).run(Method, PARAMS, Data(*splits(True)))


def test_a_bad_feature_is_named():
    with pytest.raises(
        UserError, match="feature 'clss': the method has no feature of that name; did you mean cls"
    ):
        make("linear_probe", feature="clss").run(Method, PARAMS, Data(*splits(True)))
    with pytest.raises(UserError, match="feature='cls' has no patches"):
        make("attentive_probe", feature="cls").run(Method, PARAMS, Data(*splits(True)))


def test_a_linear_probe_concatenates_features():
    probe = make("linear_probe", feature="cls+patches+pixels")
    task = Task(Method, Same(), CLASSES)
    x = RNG.normal(size=(2, 5, 1, WIDTH)).astype(np.float32)
    found = probe.frozen_vectors(task, PARAMS, jnp.asarray(x))
    expected = np.concatenate([x[:, 0, 0], x[:, :, 0].mean(1), x.reshape(2, -1)], axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_one_query_attends_to_the_tokens():
    """The pooled token is the mean of the values, weighted by attention."""
    probe = make("attentive_probe", feature="patches")
    task = Task(Method, Same(), 3)
    x = RNG.normal(size=(2, 5, 1, WIDTH)).astype(np.float32)
    trained, buffers = probe.init(
        task, PARAMS, jax.ShapeDtypeStruct((1, 5, 1, WIDTH), np.float32), jax.random.key(0)
    )
    trained = jax.tree.map(lambda leaf: RNG.normal(size=leaf.shape).astype(np.float32), trained)
    tokens = x[:, :, 0]
    tokens = (tokens - tokens.mean(-1, keepdims=True)) / np.sqrt(
        tokens.var(-1, keepdims=True) + 1e-6
    )
    both = tokens @ trained["key_value"]["kernel"] + trained["key_value"]["bias"]
    scores = both[..., :WIDTH] @ trained["query"][0] / WIDTH**0.5  # one head: 12 are fewer than 64
    weights = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    pooled = (weights[..., None] * both[..., WIDTH:]).sum(1)
    expected = pooled @ trained["head"]["kernel"] + trained["head"]["bias"]
    np.testing.assert_allclose(
        probe.logits(task, Weights(PARAMS, trained, buffers), x), expected, rtol=1e-4, atol=1e-4
    )
    assert attentive_probe.HEAD_WIDTH == 64


def test_the_encoder_is_frozen():
    probe = make("linear_probe")
    task = Task(Method, Same(), CLASSES)
    (x, y), _ = splits(True)
    trained, buffers = probe.init(
        task, PARAMS, jax.ShapeDtypeStruct((1, 2, 1, WIDTH), np.float32), jax.random.key(0)
    )
    batch = TrainingBatch(x, y, rng=None, keys=None)

    def loss(params):
        value, _ = probe.loss(task, Weights(params, trained, buffers), batch)
        return value

    gradient = jax.grad(loss)(PARAMS)["encoder"]["block00"]["kernel"]
    assert float(np.abs(gradient).max()) == 0
    assert linear_probe.EPSILON == 1e-6


def test_finetuning_trains_the_encoder_and_nothing_else_of_the_method():
    probe = make("finetune")
    task = Task(Method, Same(), CLASSES)
    create, step, _ = build_programs(probe, task, Data.mesh, Length(4, 4), WIDTH)
    state = create(PARAMS)
    assert state["trained"].keys() == {"encoder", "fc_norm", "head"}
    for batch in Data(*splits(True)).training(32, 4, 0):
        state, _ = step(state, PARAMS, batch)
    kernel = np.asarray(state["trained"]["encoder"]["block00"]["kernel"])
    assert np.abs(kernel - np.eye(WIDTH)).max() > 1e-3
    np.testing.assert_array_equal(
        PARAMS["encoder"]["block00"]["kernel"], np.eye(WIDTH)
    )  # the weights of the run stay as they are
