"""Every recipe builds, without allocating anything."""

import importlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from clu import parameter_overview
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict, config_flags
from test_docs import gen_reference

from lmim_jax.configs import small, tiny_imagenet
from lmim_jax.data.augment.device import Augment
from lmim_jax.evaluators import base as evaluators
from lmim_jax.methods import base as methods
from lmim_jax.optim import adamw
from lmim_jax.train import build as train_build
from lmim_jax.utils import recipes
from lmim_jax.utils.errors import UserError

NAMES = recipes.names()


def recipe(name):
    """The config of a recipe."""
    return importlib.import_module(f"lmim_jax.configs.{name}").get_config()


# The others are studies (tests/test_study.py) or options of evaluators
RECIPES = recipes.training_names()
# Keys whose values are derived from another key, until they are set themselves
FOLLOWERS = {
    "batch_size": ["optimizer.lr"],
    "data.channels": ["method.channels"],
    "epochs": ["optimizer.warmup_epochs"],
    "optimizer.base_lr": ["optimizer.lr"],
    "optimizer.weight_decay": ["optimizer.weight_decay_end"],
}
OWN_VALUES = {"ijepa_vit_b": ["optimizer.weight_decay_end"]}  # followers that a recipe has set
MODALITY_FOLLOWERS = {  # in recipes with several modalities
    "channels": ["data.channels", "method.channels"],
    "mean": ["augment.mean"],
    "std": ["augment.std"],
}
for _small in ("cifar10", "own", "quickstart", "small"):
    OWN_VALUES[_small] = ["optimizer.warmup_epochs"]


def followers(name, key):
    """The other keys of a recipe that change with a key."""
    if key.startswith("data.modalities."):
        return set(MODALITY_FOLLOWERS.get(key.rpartition(".")[2], ()))
    return {other for other in FOLLOWERS.get(key, ()) if other not in OWN_VALUES.get(name, ())}


def flat(config):
    """{key joined by dots: value} of a config."""
    return flatten_dict(config.to_dict(), sep=".")


def another_value(value):
    """A value of the same type as `value`."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, tuple):
        return (*value, 1)
    return abs(value or 0) + 1


def build(config):
    """The method of a config."""
    return methods.from_config(config.method, total_steps=100, steps_per_epoch=10)


def counts(config):
    """The numbers of parameters of the method's networks."""
    params = jax.eval_shape(build(config).init, jax.random.key(0))
    return {name: parameter_overview.count_parameters(tree) for name, tree in params.items()}


def with_slow_sizes():
    """All recipes; those of other sizes of a method by --slow."""
    parameters = []
    for name in RECIPES:
        is_other_size = re.fullmatch(r".+_vit_[sl]", name) and name != "interactive_mim_vit_s"
        parameters.append(pytest.param(name, marks=[pytest.mark.slow] if is_other_size else []))
    return parameters


@pytest.mark.parametrize("name", with_slow_sizes())
def test_recipe_builds(name):
    config = recipe(name)
    method = build(config)
    params = jax.eval_shape(method.init, jax.random.key(0))
    optimizer, rate = adamw.from_config(
        config.optimizer, warmup_steps=10, total_steps=100, steps_per_epoch=1
    )
    jax.eval_shape(optimizer.init, params)
    close = 1e-6  # I-JEPA is a step ahead
    if config.optimizer.steps_ahead:
        close = 1e-3
    if not config.optimizer.rebased:  # PiLaMIM's cosine has begun to fall by then
        close = 0.03
    assert 0 <= rate(0) < rate(10)
    assert rate(10) == pytest.approx(config.optimizer.lr, rel=close)
    Augment.from_config(config.augment, image_size=method.image_size, eval_size=method.feature_size)
    evaluators.fill_in(config.evaluators, config.representation)
    evaluators.from_config(
        config.evaluators, steps_per_epoch=10, has_target="encoder" in method.target_of(params)
    )
    views = jax.eval_shape(method.sample, jax.random.key(0), jax.random.split(jax.random.key(0), 2))
    image = jax.ShapeDtypeStruct((2, *method.image_size, config.method.channels), "float32")
    loss, _ = jax.eval_shape(method.loss_fn, params, method.target_of(params), image, views, 0)
    assert loss.shape == ()
    image = jax.ShapeDtypeStruct((2, *method.feature_size, config.method.channels), "float32")
    assert {"patches", "patches_prenorm"} <= jax.eval_shape(method.features, params, image).keys()


@pytest.mark.parametrize("name", NAMES)
def test_recipe_documents_its_command(name):
    assert f"--config={name}" in importlib.import_module(f"lmim_jax.configs.{name}").__doc__


def test_recipes_are_found_by_name_or_path_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = str(recipes.folder() / "vit_b.py")
    assert recipes.locate("vit_b") == file
    assert recipes.locate("configs/vit_b.py") == file
    small = recipes.folder() / "small.py"
    assert recipes.locate("small:mae,shapes") == f"{small}:mae,shapes"
    assert recipes.locate("configs/small.py:mae,shapes") == f"{small}:mae,shapes"
    (tmp_path / "configs").mkdir()
    for own in ("mine.py", "configs/vit_b.py"):
        (tmp_path / own).touch()
        assert recipes.locate(own) == own


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_bb", "vit_bb: no such recipe; did you mean vit_b?"),
        ("vit_bb:x", "vit_bb:x: no such recipe; did you mean vit_b?"),
        ("configs/vitb.py", "configs/vitb.py: no such file; .* did you mean vit_b?"),
        ("elsewhere/vit_b.py", "elsewhere/vit_b.py: no such file; .* by name"),
    ],
)
def test_a_recipe_that_does_not_exist_is_an_error_with_a_hint(name, message):
    with pytest.raises(UserError, match=message):
        recipes.locate(name)


def test_vit_b_has_the_published_number_of_parameters():
    assert counts(recipe("vit_b")) == {
        "encoder": 85_647_360,
        "projector": 23_086_592,
        "decoder": 13_404_928,
    }


@pytest.mark.parametrize("name", RECIPES)
def test_overriding_a_key_changes_only_what_is_documented_to_follow_it(name):
    default = flat(recipe(name))
    for key, value in default.items():
        config = recipe(name)
        config.update_from_flattened_dict({key: another_value(value)})
        changed = flat(config)
        different = {other for other in default if changed[other] != default[other]}
        assert different == {key, *followers(name, key)}, key


def test_what_a_key_follows_is_in_its_comment():
    for name in ("vit_b", *gen_reference.METHOD_RECIPES):
        options = {option.key: option for option in gen_reference.read_recipe(name)[0]}
        for leader, keys in FOLLOWERS.items():
            for key in set(keys) & options.keys():
                if name == "vit_b" or key.startswith("method."):
                    comment = options[key].heading + options[key].text
                    assert leader.rpartition(".")[2] in comment, (name, key)


@pytest.mark.parametrize(
    ("name", "leader", "value", "expected"),
    [
        ("vit_b", "batch_size", 256, {"optimizer.lr": 1.5e-4}),
        ("vit_b", "optimizer.base_lr", 3e-4, {"optimizer.lr": 4.8e-3}),
        ("vit_b", "optimizer.lr", 1e-3, {"optimizer.base_lr": 1.5e-4, "batch_size": 4096}),
        ("vit_b", "optimizer.weight_decay", 0.1, {"optimizer.weight_decay_end": 0.1}),
        ("vit_b", "optimizer.weight_decay_end", 0.1, {"optimizer.weight_decay": 0.05}),
        ("ijepa_vit_b", "optimizer.weight_decay", 0.1, {"optimizer.weight_decay_end": 0.4}),
        ("ijepa_vit_b", "optimizer.weight_decay_end", 0.1, {"optimizer.weight_decay": 0.04}),
        ("ijepa_vit_b", "data.channels", 1, {"method.channels": 1}),
        ("ijepa_vit_b", "method.channels", 1, {"data.channels": 3}),
    ],
)
def test_keys_follow_those_of_the_command_line(name, leader, value, expected, monkeypatch):
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    arguments = ["lmim", f"--config={recipes.locate(name)}", f"--config.{leader}={value}"]
    monkeypatch.setattr(sys, "argv", arguments)  # where the keys to be set are looked for
    values(arguments)
    found = flat(values.config)
    assert found[leader] == value
    assert {key: found[key] for key in expected} == pytest.approx(expected)


def test_images_of_other_channels_than_the_methods_are_refused():
    config = recipe("vit_b")
    config.method.channels = 1
    with pytest.raises(UserError, match=r"method.channels=1 must equal config.data.channels=3"):
        train_build.build(config, steps_per_epoch=10)


def test_the_size_of_crops_follows_the_gap():
    config = recipe("vit_b")
    config.method.gap = 0
    assert build(config).image_size == (224, 224)


@pytest.mark.parametrize("size", ["nano", "micro", "small"])
def test_the_teachers_of_short_runs_forget_how_they_began(size):
    seen = set()
    for name in small.methods():
        config = tiny_imagenet.get_config(f"{name},{size}")
        if config.method.get("target", "ema") != "ema" or name == "mae":
            continue
        seen.add(name)
        images = tiny_imagenet.CLASSES * tiny_imagenet.SIZES[size]["images"]
        per_epoch = images // config.batch_size
        steps = per_epoch * config.epochs
        method = methods.from_config(config.method, total_steps=steps, steps_per_epoch=per_epoch)
        rates = jax.vmap(method.ema_rate)(np.arange(steps))
        assert float(rates.max()) >= 0.98 / (tiny_imagenet.LONGEST_AVERAGE * steps), name
        assert float(jnp.prod(1 - rates)) < 0.2, name
    assert seen == {"latent_mim", "pilamim", "ijepa", "bootmae", "capi", "data2vec2", "symmim"}


def test_imagenet_recipe_is_the_papers():
    method = build(recipe("vit_b"))
    assert method.num_visible == 20
    assert method.gap == 4
    assert method.tau == 0.2
    assert method.similarity_weight == 0.1
    assert method.decoder_depth == 3
    assert method.decoder_width == 512
    assert method.decoder_heads == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "latent_min"}, "did you mean latent_mim"),
        ({"taau": 1}, "config.method.taau"),
        ({"loss": "infonce"}, "patch_infonce"),
        ({"num_visible": 196}, "num_visible=196 is out of range: it must be 1 .. 194"),
        ({"heads": 7}, "divisible by heads=7"),
        ({"gap": -1}, "gap=-1"),
        ({"tau": 0.0}, "tau=0"),
    ],
)
def test_a_bad_method_is_named(change, message):
    config = ConfigDict({**recipe("vit_b").method, **change})
    with pytest.raises(UserError, match=message):
        methods.from_config(config, total_steps=1, steps_per_epoch=1)


def test_biased_masks_of_a_single_row_are_refused():
    config = recipe("ijepa_vit_b").method
    config.update(grid=(1, 64), context_capacity=60)
    with pytest.raises(UserError, match=r"biased_masks=True needs a grid of 2 x 2 .*not 1 x 64"):
        methods.from_config(config, total_steps=1, steps_per_epoch=1)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("log_every", 0),
        ("checkpoint_every", -1),
        ("data.canvas", 0),
        ("data.threads", -2),
        ("data.workers", -2),
        ("method.patch_size", 0),
        ("method.depth", 0),
        ("evaluators.knn.k", (0,)),
        ("evaluators.knn.k", ()),
        ("method.grid", (0, 4)),
        ("augment.scale", (0.0, 0.0)),
        ("optimizer.base_lr", -0.1),
        ("optimizer.warmup_epochs", -1.0),
    ],
)
def test_a_number_without_meaning_is_named(key, value):
    config = recipe("vit_b")
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=rf"^config\.{key}=.* must be"):
        train_build.check_numbers(config)


@pytest.mark.parametrize("key", train_build.SHARES)
def test_a_share_above_1_is_refused(key):
    config = recipe("capi_vit_b")
    config.update_from_flattened_dict({key: 75.0})
    message = f"config.{key}=75.0 is a share: it must be at most 1"
    with pytest.raises(UserError, match=re.escape(message)):
        train_build.check_numbers(config)


def test_a_missing_key_is_named():
    config = recipe("vit_b").method.to_dict()
    del config["tau"]
    with pytest.raises(UserError, match="lacks tau"):
        methods.from_config(config, total_steps=1, steps_per_epoch=1)
