"""Exports for inference engines, segmentation and detection: ONNX, mmsegmentation, detectron2."""

import ast
import dataclasses
import functools
import json
import string

import interop
import jax
import numpy as np
import pytest
import tiny

from lmim_jax.cli import export
from lmim_jax.convert import detectron2, mmseg, onnx, parity_check, torch_encoder
from lmim_jax.methods import base
from lmim_jax.train import runs
from lmim_jax.utils.errors import UserError

ENGINES = "onnx and onnxruntime: pip install 'lmim_jax[onnx]'"


def draw(name, **changes):
    """(method, random weights) of a tiny encoder with some other sizes."""
    section = tiny.method(name)
    section.update(changes)
    method = base.from_config(section, total_steps=1, steps_per_epoch=1)
    rng = np.random.default_rng(0)

    def draw_leaf(leaf):
        return (0.2 * rng.standard_normal(leaf.shape)).astype(np.float32)

    return method, jax.tree.map(draw_leaf, jax.eval_shape(method.init, jax.random.key(0)))


@functools.cache
def encoder_of(name):
    """4 blocks, patches of 16 pixels; every other encoder here differs in a field."""
    return torch_encoder.from_method(*draw(name, depth=4, patch_size=16))


def in_memory(folder, name, **changes):
    """A run whose weights are not in a folder."""
    config = tiny.get_config()
    config.method = tiny.method(name)
    config.method.update(changes)
    method, params = draw(name, **changes)
    return runs.Run(folder, config, method, loaded=runs.Weights(params, {}, 0))


def assignments(text):
    """{name: value} of the literal assignments of a Python file, those within calls as well."""
    found = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.keyword) and node.arg:
            name, value = node.arg, node.value
        elif isinstance(node, ast.Assign):
            name, value = ast.unparse(node.targets[0]), node.value
        else:
            continue
        try:
            found.setdefault(name, ast.literal_eval(value))
        except ValueError:
            continue
    return found


@pytest.mark.parametrize("name", ["latent_mim", "ijepa"])
def test_mmsegmentation_gets_every_tensor_of_its_vision_transformer(name):
    """Names and shapes: those that mmsegmentation 1.2.2 has for these sizes."""
    encoder = encoder_of(name)
    tensors, texts = mmseg.contents(encoder, interop.AS_IN_TRAINING)
    expected = {
        "cls_token": (1, 1, 16),
        "pos_embed": (1, 17, 16),
        "patch_embed.projection.weight": (16, 3, 16, 16),
        "patch_embed.projection.bias": (16,),
        "ln1.weight": (16,),
        "ln1.bias": (16,),
    }
    for i in range(4):
        for leaf, shape in {
            "ln1.weight": (16,),
            "ln1.bias": (16,),
            "attn.attn.in_proj_weight": (48, 16),
            "attn.attn.in_proj_bias": (48,),
            "attn.attn.out_proj.weight": (16, 16),
            "attn.attn.out_proj.bias": (16,),
            "ln2.weight": (16,),
            "ln2.bias": (16,),
            "ffn.layers.0.0.weight": (64, 16),
            "ffn.layers.0.0.bias": (64,),
            "ffn.layers.1.weight": (16, 64),
            "ffn.layers.1.bias": (16,),
        }.items():
            expected[f"layers.{i}.{leaf}"] = shape
    assert {name: array.shape for name, array in tensors.items()} == expected
    config = assignments(texts["config.py"])
    assert config["img_size"] == (64, 64) and config["out_indices"] == (0, 1, 2, 3)
    assert config["with_cls_token"] is encoder.cls and config["patch_bias"] is True
    assert config["checkpoint"] == "{{ fileDirname }}/backbone.pth"
    np.testing.assert_allclose(config["mean"], [123.675, 116.28, 103.53])
    if not encoder.cls:
        assert not tensors["cls_token"].any() and not tensors["pos_embed"][0, 0].any()
    np.testing.assert_array_equal(
        tensors["pos_embed"][:, 1:], encoder.tensors["pos_embed"][:, -16:]
    )


@pytest.mark.parametrize("name", ["latent_mim", "ijepa"])
def test_detectron2_gets_every_tensor_of_its_vit(name):
    """Names: those of timm without CLS token and last norm, as in detectron2's vit.py."""
    encoder = encoder_of(name)
    tensors, texts = detectron2.contents(encoder, interop.AS_IN_TRAINING)
    assert all(key.startswith("backbone.net.") for key in tensors)
    shapes = {key.removeprefix("backbone.net."): array.shape for key, array in tensors.items()}
    assert shapes.pop("pos_embed") == (1, 16 + encoder.cls, 16)
    assert shapes.pop("patch_embed.proj.weight") == (16, 3, 16, 16)
    assert shapes.pop("patch_embed.proj.bias") == (16,)
    block = {"norm1": (16,), "attn.qkv": (48, 16), "attn.proj": (16, 16), "norm2": (16,)}
    block |= {"mlp.fc1": (64, 16), "mlp.fc2": (16, 64)}
    for i in range(4):
        for module, shape in block.items():
            assert shapes.pop(f"blocks.{i}.{module}.weight") == shape
            assert shapes.pop(f"blocks.{i}.{module}.bias") == shape[:1]
    assert not shapes
    config = assignments(texts["config.py"])
    assert config["net.pretrain_img_size"] == 64 and config["net.mlp_ratio"] == 4.0
    assert config["net.pretrain_use_cls_token"] is encoder.cls
    assert config["net.window_block_indexes"] == []
    assert "num_layers=4" in texts["config.py"]


def test_blocks_are_chosen_as_in_the_published_configs():
    assert mmseg.out_indices(12) == (2, 5, 8, 11) and mmseg.out_indices(24) == (5, 11, 17, 23)
    assert detectron2.window_blocks(12) == [0, 1, 3, 4, 6, 7, 9, 10]
    assert detectron2.window_blocks(24) == [i for i in range(24) if i % 6 != 5]
    assert detectron2.window_blocks(2) == []


@pytest.mark.parametrize("library", [mmseg, detectron2])
def test_configs_have_no_gaps(library):
    fields = string.Template.get_identifiers(library.CONFIG)
    assert len(fields) > 8
    encoder = encoder_of("latent_mim")
    _, texts = library.contents(encoder, interop.AS_IN_TRAINING)
    compile(texts["config.py"], "config.py", "exec")
    assert "$" not in texts["config.py"]


@pytest.mark.parametrize(
    ("library", "changes", "message"),
    [
        (mmseg, dict(depth=3), "depth=3: UPerNet"),
        (mmseg, dict(hidden=24), "mlp_ratio=1.5 must be an integer"),
        (mmseg, dict(final_norm_eps=1e-3), "final_norm_eps=0.001 differ"),
        (detectron2, dict(patch_size=4), "patch_size=4: the pyramid"),
        (detectron2, dict(image_size=(64, 32)), "not square"),
        (detectron2, dict(channels=1), "channels=1: detectron2"),
    ],
)
def test_encoders_that_do_not_fit_are_refused(library, changes, message):
    with pytest.raises(UserError, match=message):
        library.contents(
            dataclasses.replace(encoder_of("latent_mim"), **changes), interop.AS_IN_TRAINING
        )


def test_detectron2_needs_no_equal_norms():
    encoder = dataclasses.replace(encoder_of("latent_mim"), final_norm_eps=1e-3)
    assert detectron2.contents(encoder, interop.AS_IN_TRAINING)[0]


@pytest.mark.interop
@pytest.mark.parametrize("name", interop.METHODS)
def test_onnx_runtime_makes_the_same_features_of_jpegs(name, tmp_path):
    pytest.importorskip("onnx", reason=ENGINES)
    onnxruntime = pytest.importorskip("onnxruntime", reason=ENGINES)
    changes = {"final_norm_eps": 1e-3} if name == "pilamim" else {}
    model = in_memory(tmp_path, name, depth=2, **changes)
    export.export(model, "onnx", "online", tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"model.onnx", "README.md"}
    jpegs = [interop.jpeg(40, 40, 0), interop.jpeg(36, 72, 1), interop.jpeg(90, 45, 2)]
    found = parity_check.compare("onnx", tmp_path / "out", model, model.params, jpegs)
    assert found["features"] <= 1e-5, found

    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    mean, patches = session.run(
        ["mean", "patches"], {"images": interop.images().transpose(0, 3, 1, 2)}
    )
    assert mean.shape == (2, 16) and patches.shape == (2, 16, 16)
    np.testing.assert_allclose(mean, patches.mean(axis=1), atol=1e-6)
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["std"]) == [0.229, 0.224, 0.225]


@pytest.mark.interop
def test_large_weights_are_written_beside_the_graph(tmp_path, monkeypatch):
    pytest.importorskip("onnx", reason=ENGINES)
    pytest.importorskip("onnxruntime", reason=ENGINES)
    monkeypatch.setattr(onnx, "MAX_INLINE_BYTES", 0)
    model = in_memory(tmp_path, "mae", depth=2)
    export.export(model, "onnx", "online", tmp_path / "out")
    assert (tmp_path / "out" / onnx.DATA_FILE).stat().st_size > 1024
    found = parity_check.compare(
        "onnx", tmp_path / "out", model, model.params, [interop.jpeg(40, 40)]
    )
    assert found["features"] <= 1e-5, found


@pytest.mark.interop
def test_pytorch_reads_the_files_for_mmsegmentation_and_detectron2(tmp_path):
    torch = pytest.importorskip("torch")
    for kind, changes in {"mmseg": dict(depth=4), "detectron2": dict(patch_size=16)}.items():
        model = in_memory(tmp_path, "mae", **changes)
        export.export(model, kind, "online", tmp_path / kind)
        names = {path.name for path in (tmp_path / kind).iterdir()}
        assert names == {"backbone.pth", "config.py", "README.md"}
        tensors = torch.load(tmp_path / kind / "backbone.pth", weights_only=True)
        expected, _ = export.LIBRARIES[kind].contents(
            torch_encoder.from_method(model.method, model.params), interop.AS_IN_TRAINING
        )
        assert tensors.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(tensors[name], array)


@pytest.mark.interop
@pytest.mark.parametrize("name", ["mae", "ijepa", "bootmae"])
def test_mmsegmentation_makes_the_same_features(name, tmp_path):
    pytest.importorskip("mmseg", reason="pip install mmengine mmcv mmsegmentation")
    model = in_memory(tmp_path, name, depth=4)
    export.export(model, "mmseg", "online", tmp_path / "out")
    jpegs = [interop.jpeg(40, 40, 0), interop.jpeg(36, 72, 1)]
    found = parity_check.compare("mmseg", tmp_path / "out", model, model.params, jpegs)
    assert found["features"] <= 1e-4, found
