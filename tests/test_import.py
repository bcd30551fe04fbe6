"""Official checkpoints: importing, exporting and importing again changes no bit; and errors."""

import argparse
import dataclasses
import importlib
import json
import pathlib
import sys

import jax
import numpy as np
import pytest
import test_loops
import test_reference
import tiny
from ml_collections import ConfigDict

from lmim_jax.cli import export, import_weights
from lmim_jax.convert.official import base as official
from lmim_jax.data import sources
from lmim_jax.distributed import sharding
from lmim_jax.train import runs, workdir
from lmim_jax.train.checkpoints import Checkpoints
from lmim_jax.train.state import jit_init
from lmim_jax.utils import array_io
from lmim_jax.utils.errors import UserError

CASES = {path.stem: path for path in test_reference.CASES}
# The positions of this case hold random noise, and are constants here
DROP = {"ijepa": ["(target_)?encoder.pos_embed"]}


def load(stem):
    """(recipe, {official name: array}) of a reference case; the recipe has the case's method."""
    with np.load(CASES[stem]) as file:
        case = dict(file)
    name = next(name for name in official.names() if stem.startswith(name))
    method = importlib.import_module(f"reference_{name}").load(
        case, json.loads(str(case["config_json"]))
    )[0]
    fields = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    config = tiny.get_config()
    config.method = ConfigDict(
        {key: x for key, x in fields.items() if key not in ("total_steps", "steps_per_epoch")}
    )
    config.method.name = name
    config.augment.eval_resize = config.method.grid[0] * config.method.patch_size
    return config, test_reference.group(case, "state/")


def load_bootmae():
    """The same of BootMAE, from its training loop."""
    path = next(path for path in test_loops.LOOPS if path.stem == "bootmae")
    case, sizes = test_loops.load(path)
    return test_loops.recipe(sizes), test_reference.group(case, "state/")


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Saving arrays that lie on eight devices takes seconds."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    monkeypatch.setattr(sharding, "make_mesh", lambda *_: mesh)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A recipe of MAE and a file that fits it."""
    config, arrays = load("mae")
    path = tmp_path_factory.mktemp("file") / "mae.safetensors"
    array_io.write(path, arrays)
    return config, arrays, path


def method_of(config):
    return import_weights.methods.from_config(config.method, total_steps=1, steps_per_epoch=1)


@pytest.mark.parametrize("stem", ["latent_mim_infonce", "mae", "ijepa", "pilamim", "bootmae"])
def test_reference_weights_go_in_and_out_and_back_unchanged(stem, tmp_path):
    config, arrays = load_bootmae() if stem == "bootmae" else load(stem)
    drop = DROP.get(stem, ())
    np.savez(tmp_path / "official.npz", **arrays)
    lines = import_weights.import_weights(
        tmp_path / "official.npz", config, tmp_path / "run", None, drop
    )
    assert "all belong to the model" in lines[0]

    model = runs.open_run(tmp_path / "run")
    export.export(model, "safetensors", "both", tmp_path / "out")
    again, _ = array_io.read(tmp_path / "out" / "model.safetensors")
    assert again.keys() == arrays.keys()
    fixed = official.describe(model.method).constants
    for name, value in arrays.items():
        if name not in fixed:
            np.testing.assert_array_equal(again[name], value, err_msg=name)
        elif not drop or "predictor" in name:
            np.testing.assert_allclose(again[name], value, atol=1e-6, err_msg=name)

    tree, *rest = import_weights.read(tmp_path / "out" / "model.safetensors", model.method)
    assert rest == [[], [], []]
    expected = {"params": model.params, "target": model.target}
    assert runs.flatten_params(tree).keys() == runs.flatten_params(expected).keys()
    jax.tree.map(
        np.testing.assert_array_equal, runs.flatten_params(tree), runs.flatten_params(expected)
    )


def test_an_imported_run_resumes_training(file, images, tmp_path):
    config, arrays, path = file
    config = ConfigDict(config.to_dict())
    config.data.update(source="folder", path=str(images))
    import_weights.import_weights(path, config, tmp_path / "run", None)
    assert json.loads((tmp_path / "run" / "imported.json").read_text())["file"] == "mae.safetensors"

    identity = sources.from_config(config.data, "train").identity()
    workdir.check(tmp_path / "run", config.to_dict(), identity)
    workdir.claim(
        tmp_path / "run", config.to_dict(), identity
    )  # as training does: from now on, these are its images
    with pytest.raises(UserError, match="training_images"):
        workdir.check(tmp_path / "run", config.to_dict(), {**identity, "images": 7})
    optimizer, _ = import_weights.adamw.from_config(
        config.optimizer, warmup_steps=1, total_steps=9, steps_per_epoch=1
    )
    init, shardings = jit_init(method_of(config), optimizer, config.seed, sharding.make_mesh())
    state = init()
    with Checkpoints(tmp_path / "run", config) as checkpoints:
        restored = checkpoints.restore(state, shardings)
    assert int(restored.step) == 0
    found = official.to_official(method_of(config), restored.params, restored.target)
    np.testing.assert_array_equal(
        found["blocks.1.mlp.fc2.weight"], arrays["blocks.1.mlp.fc2.weight"]
    )
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(restored.opt_state))
    with pytest.raises(UserError, match="holds a run already"):
        import_weights.import_weights(path, config, tmp_path / "run", None)


def test_missing_arrays_are_initialized_only_on_request(file, tmp_path):
    config, arrays, _ = file
    encoder = {
        name: x for name, x in arrays.items() if not name.startswith(("decoder", "mask_token"))
    }
    path = tmp_path / "encoder.safetensors"
    array_io.write(path, encoder)
    with pytest.raises(UserError, match=r"32 missing: .*decoder_pred\.bias") as error:
        import_weights.read(path, method_of(config))
    assert "mask_token" in str(error.value) and "decoder_pos_embed" in str(error.value)
    tree, dropped, fresh, _ = import_weights.read(
        path, method_of(config), fresh=["decoder_.*", "mask_token"]
    )
    assert dropped == [] and len(fresh) == 31 and tree["params"].keys() == {"encoder"}
    with pytest.raises(UserError, match="--fresh=decoder fits no name"):
        import_weights.read(path, method_of(config), fresh=["decoder"])


def test_a_missing_teacher_starts_as_a_copy(tmp_path):
    config, arrays = load("pilamim")
    online = {name: x for name, x in arrays.items() if not name.startswith("target_encoder.")}
    array_io.write(tmp_path / "online.safetensors", online)
    import_weights.import_weights(
        tmp_path / "online.safetensors",
        config,
        tmp_path / "run",
        None,
        fresh=[r"target_encoder\..*"],
    )
    model = runs.open_run(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, model.params["encoder"], model.target["encoder"])


def published_bootmae(arrays):
    """(model, model_ema) as BootMAE's code saves them: the teacher is a copy of the whole model."""
    model = {name: x for name, x in arrays.items() if not name.startswith("ema.")}
    teacher = {name: x + 1 for name, x in model.items() if not name.endswith("pos_embed")}
    for name, x in model.items():
        teacher.setdefault(name, x)
    for name, x in arrays.items():
        if name.startswith("ema."):
            teacher[name.removeprefix("ema.")] = x
    return model, teacher


def test_decoders_of_bootmaes_teacher_are_not_read(tmp_path):
    config, arrays = load_bootmae()
    model, teacher = published_bootmae(arrays)
    nested = {f"ema.{name}": x for name, x in teacher.items()}
    array_io.write(tmp_path / "x.safetensors", {**model, **nested})
    tree, dropped, fresh, not_read = import_weights.read(
        tmp_path / "x.safetensors", method_of(config)
    )
    assert tree.keys() == {"params", "target"} and dropped == fresh == []
    assert set(not_read) == nested.keys() - arrays.keys() and "ema.lm_head_1.bias" in not_read


@pytest.mark.interop
@pytest.mark.parametrize("has_teacher", [True, False])
def test_bootmaes_published_files_are_read_with_their_teacher(tmp_path, has_teacher):
    """The keys are those of `save_model` in LightDXY/BootMAE."""
    import torch

    config, arrays = load_bootmae()
    content = {"optimizer": {"state": {0: torch.ones(3)}}, "epoch": 800, "scaler": {"scale": 1.0}}
    content["args"] = argparse.Namespace(lr=1)
    keys = ("model", "model_ema") if has_teacher else ("model",)
    for key, state in zip(keys, published_bootmae(arrays), strict=False):
        content[key] = {name: torch.from_numpy(x) for name, x in state.items()}
    path = tmp_path / "BootMAE_Base_800_PT.pth"
    torch.save(content, path)
    fresh = [] if has_teacher else [r"ema\..*"]
    import_weights.import_weights(path, config, tmp_path / "run", None, fresh=fresh)
    model = runs.open_run(tmp_path / "run")
    again = official.to_official(model.method, model.params, model.target)
    for name, value in arrays.items():
        if not has_teacher:
            value = arrays[name.removeprefix("ema.")]
        np.testing.assert_allclose(again[name], value, atol=1e-6, err_msg=name)


def altered(arrays, **changes):
    return {name: value for name, value in {**arrays, **changes}.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        (
            {"head.weight": np.zeros((9, 32), np.float32)},
            {},
            "1 unexpected: head.weight; --fresh=REGEX",
        ),
        (
            {"cls_token": None, "norm.bias": None},
            {},
            "2 missing: cls_token, norm.bias; --fresh=REGEX",
        ),
        (
            {"norm.bias": np.zeros(31, np.float32)},
            {},
            r"1 of another shape: norm.bias \(31,\) instead of \(32,\)",
        ),
        (
            {"pos_embed": np.ones((1, 37, 32), np.float32)},
            {},
            r"constants than this method's: pos_embed \(difference",
        ),
        ({}, {"drop": ["head.*"]}, r"--drop=head.\* fits no name"),
    ],
)
def test_arrays_that_do_not_fit_are_listed(file, tmp_path, changes, options, message):
    config, arrays, _ = file
    array_io.write(tmp_path / "x.safetensors", altered(arrays, **changes))
    with pytest.raises(UserError, match=message):
        import_weights.read(tmp_path / "x.safetensors", method_of(config), **options)


def test_dropped_arrays_are_listed(file, tmp_path):
    config, arrays, _ = file
    array_io.write(
        tmp_path / "x.safetensors",
        altered(arrays, **{"head.weight": np.zeros((9, 32), np.float32)}),
    )
    _, dropped, fresh, _ = import_weights.read(
        tmp_path / "x.safetensors", method_of(config), drop=["head.*"]
    )
    assert dropped == ["head.weight"] and fresh == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.npz", None, "no such file"),
        ("weights.txt", b"1 2 3", "weights must be"),
        ("damaged.npz", b"PK\x03\x04 not a zip", "cannot be read"),
        ("damaged.safetensors", b"\xff" * 40, "cannot be read"),
    ],
)
def test_unreadable_files_are_named(tmp_path, name, content, message):
    if content:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}.*{message}"):
        array_io.read(tmp_path / name)


def test_pickled_arrays_are_not_loaded(tmp_path):
    np.savez(tmp_path / "x.npz", x=np.array([{"an": "object"}], dtype=object))
    with pytest.raises(UserError, match="cannot be read"):
        array_io.read(tmp_path / "x.npz")


def test_half_precision_becomes_float32_and_parallel_names_plain(tmp_path):
    import ml_dtypes

    arrays = {
        "module.a": np.ones(3, np.float16),
        "encoder.module.b": np.ones(3, ml_dtypes.bfloat16),
    }
    array_io.write(tmp_path / "x.safetensors", arrays)
    found, _ = array_io.read(tmp_path / "x.safetensors")
    assert {name: x.dtype for name, x in found.items()} == {
        "a": np.float32,
        "encoder.b": np.float32,
    }


def test_without_pytorch_its_files_are_rejected_with_a_hint(tmp_path, monkeypatch):
    (tmp_path / "x.pth").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"pip install 'torch>=2.6'"):
        array_io.read(tmp_path / "x.pth")


@pytest.mark.interop
def test_files_of_pytorch(tmp_path):
    import torch

    _, arrays = load("ijepa")
    state = {}
    for name, value in arrays.items():
        root, _, rest = name.partition(".")
        state.setdefault(root, {})[f"module.{rest}"] = torch.from_numpy(value)
    torch.save(
        {**state, "opt": {"state": {0: torch.ones(3)}}, "scaler": None, "epoch": 300},
        tmp_path / "x.pth.tar",
    )
    found, rest = array_io.read(
        tmp_path / "x.pth.tar", roots={"encoder", "predictor", "target_encoder"}
    )
    assert rest == ["opt", "scaler", "epoch"] and found.keys() == arrays.keys()
    for name, value in arrays.items():
        np.testing.assert_array_equal(found[name], value)

    model = {"a.weight": torch.ones(2, dtype=torch.bfloat16)}
    torch.save({"model": model, "args": argparse.Namespace(lr=1), "epoch": 3}, tmp_path / "y.pth")
    found, rest = array_io.read(tmp_path / "y.pth")
    assert rest == ["args", "epoch"] and found["a.weight"].dtype == np.float32

    torch.save({"model": model, "args": pathlib.Path("x"), "hook": Exploding()}, tmp_path / "z.pth")
    with pytest.raises(UserError, match="holds other Python objects than tensors"):
        array_io.read(tmp_path / "z.pth")
    (tmp_path / "w.pth").write_bytes(b"no zip")
    with pytest.raises(UserError, match=r"w\.pth"):
        array_io.read(tmp_path / "w.pth")


class Exploding:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return print, ("unpickled!",)
