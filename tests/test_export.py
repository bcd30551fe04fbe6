"""Exporting: names and layouts of other libraries, equal features, the model card, and errors."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
import types

import conftest
import interop
import jax
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict
from PIL import Image

import lmim_jax
from lmim_jax.cli import export
from lmim_jax.configs import interactive_mim_vit_s
from lmim_jax.convert import hf, model_card, parity_check, timm, torch_encoder
from lmim_jax.data import modalities
from lmim_jax.methods import base
from lmim_jax.models.layers import sincos_positions
from lmim_jax.train import frozen_teacher, initialization, modality_subset, runs
from lmim_jax.train.build import build
from lmim_jax.utils import array_io
from lmim_jax.utils.errors import UserError

SHARED = conftest.ROOT.parent / "shared" / "data"


def recipe(name="latent_mim", **changes):
    config = tiny.get_config()
    config.method = tiny.method(name)
    config.method.update(changes)
    return config


def in_memory(folder, config, method, params):
    """A run whose weights are not in a folder."""
    return runs.Run(folder, config, method, loaded=runs.Weights(params, {}, 0))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of Latent MIM that has not trained, with metrics as after training."""
    folder = tiny.run(recipe(decoder="cross"), tmp_path_factory.mktemp("run"))
    summary = {
        "steps": 0,
        "collapse_index": 0.5,
        "knn5": {"pixels": 30.0, "untrained": 40.0},
        "knn/knn5": 61.5,
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "evaluations").mkdir()
    evaluation = {
        "evaluated": {"step": 0, "weights": {"linear": "target"}},
        "config": {"linear": {"params": "online", "feature": "cls"}},
        "figures": {"linear/accuracy": {"untrained": 11.0, "trained": 77.25}},
    }
    (folder / "evaluations" / "0-linear.json").write_text(json.dumps(evaluation))
    return folder


@pytest.mark.parametrize("library", interop.LIBRARIES)
@pytest.mark.parametrize("name", interop.METHODS)
def test_features_equal_those_of_the_library_with_the_exported_tensors(name, library):
    """`python tests/interop.py` wrote tests/interop.npz, on a CPU in float32."""
    with np.load(interop.STORED) as stored:
        if f"{name}/{library}/tokens" not in stored:
            pytest.skip(f"tests/interop.npz lacks {name}; python tests/interop.py writes it")
        method, params = interop.case(name)
        out = jax.jit(
            lambda images: parity_check.concatenate_tokens(method.features(params, images))
        )(interop.images())
        np.testing.assert_allclose(out, stored[f"{name}/{library}/tokens"], rtol=0, atol=1e-4)
        tensors_out, _ = interop.contents(library, name)
        assert interop.checksum(tensors_out) == stored[f"{name}/{library}/checksum"], (
            "names, shapes or values of exported tensors have changed; if that is intended, run "
            "tests/interop.py"
        )


def test_the_positions_of_latent_mim_are_exported_unchanged():
    method, params = interop.case("latent_mim")
    found = torch_encoder.from_method(method, params).tensors["pos_embed"]
    assert not found[0, 0].any()  # CLS
    np.testing.assert_array_equal(found[0, 1:], sincos_positions((4, 4), 16))


def test_sizes_that_timm_knows_get_its_names():
    sizes = dict(grid=(14, 14), patch_size=16, width=192, depth=12, heads=3)
    method = base.from_config(recipe(**sizes).method, total_steps=1, steps_per_epoch=1)
    params = jax.tree.map(
        lambda x: np.zeros(x.shape, np.float32), jax.eval_shape(method.init, jax.random.key(0))
    )
    images = {**interop.AS_IN_TRAINING, "resize": 256}
    _, texts = timm.contents(torch_encoder.from_method(method, params), images)
    config = texts["config.json"]
    assert config["architecture"] == "vit_tiny_patch16_224"
    assert config["model_args"] == {"global_pool": "avg", "fc_norm": False}
    assert config["pretrained_cfg"]["crop_pct"] == 0.875 and config["pretrained_cfg"]["mean"] == [
        0.485,
        0.456,
        0.406,
    ]


@pytest.mark.parametrize("size", [64, 96, 224, 384, 518])
def test_timm_resizes_to_what_evaluation_does(size):
    for resize in range(size, 3 * size):
        assert int(size / timm.crop_share(size, resize)) == resize


@pytest.mark.parametrize(
    ("changes", "library", "message"),
    [
        (dict(norm_eps=1e-6, final_norm_eps=1e-5), timm, "final_norm_eps=1e-05 differ"),
        (dict(norm_eps=1e-4, final_norm_eps=1e-4), timm, "norm_eps=0.0001: timm's"),
        (dict(grid=(4, 2)), hf, "grid is not square"),
        (dict(registers=4), timm, "this encoder has registers=4, unlike"),
    ],
)
def test_unsupported_encoders_are_rejected(changes, library, message):
    method = base.from_config(recipe("pilamim", **changes).method, total_steps=1, steps_per_epoch=1)
    params = jax.tree.map(
        lambda x: np.zeros(x.shape, np.float32), jax.eval_shape(method.init, jax.random.key(0))
    )
    with pytest.raises(UserError, match=message):
        library.contents(torch_encoder.from_method(method, params), interop.AS_IN_TRAINING)


def test_a_folder_is_complete_and_describes_its_origin(run, tmp_path):
    model = runs.open_run(run)
    export.export(model, "hf", "online", tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"model.safetensors", "config.json", "preprocessor_config.json", "README.md"}
    config, prepared = (
        json.loads((tmp_path / "out" / f"{x}config.json").read_text())
        for x in ("", "preprocessor_")
    )
    assert config["layer_norm_eps"] == 1e-6 and config["model_type"] == "vit"
    assert prepared["image_mean"] == [0.485, 0.456, 0.406] and prepared["crop_size"] == {
        "height": 16,
        "width": 16,
    }
    assert (
        "encoder.layer.0.attention.attention.query.weight"
        in array_io.read(tmp_path / "out" / "model.safetensors")[0]
    )
    card = (tmp_path / "out" / "README.md").read_text()
    for line in (
        'AutoModel.from_pretrained(".", add_pooling_layer=False)',
        "license: other\n",
        "No license has been chosen",
        "None: training began with random weights.",
        "(Wei, Gupta, Morgado; ECCV 2024; arXiv 2407.15837)",
        "<details>\n<summary>Config</summary>\n\n```json\n",
        "| knn/knn5 | online | patches_prenorm | 30 | 40 | 61.5 |",
        "| linear/accuracy | target | cls |  | 11 | 77.25 |",
        "collapse index (1 means total collapse): 0.5",
        '"num_visible": 4',
    ):
        assert line in card
    assert str(tmp_path) not in card.partition("<details>")[0]
    with pytest.raises(UserError, match="is not empty"):
        export.export(model, "hf", "online", tmp_path / "out")


def test_the_card_lists_evaluators_with_underscores_but_not_the_metrics_of_baselines(tmp_path):
    config = recipe()
    with config.unlocked():
        config.evaluators.logistic_regression = tiny.evaluator("logistic_regression")
    config.evaluators.logistic_regression.feature = "cls"
    summary = {
        "steps": 0,
        "linear": {"pixels": 11.0, "untrained": 22.0, "trained": 33.0},
        "logistic_regression/accuracy": 33.0,
        "logistic_regression/pixels_accuracy": 11.0,
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    run = in_memory(tmp_path, config, *interop.case("latent_mim"))
    origin = {"file": "mae.pth", "sha256": "abc", "fresh": []}
    (tmp_path / "imported.json").write_text(json.dumps(origin))
    card = model_card.write(run, "flax", "online", "cc-by-nc-4.0", "facebook/vit-mae-base")
    assert "license: cc-by-nc-4.0\nbase_model: facebook/vit-mae-base\n" in card
    assert "facebook/vit-mae-base. Imported weights: mae.pth, SHA-256 abc." in card
    assert "license of the imported weights applies" in card
    assert 'lmim_jax.load(".")' in card
    assert "| logistic_regression/accuracy | online | cls | 11 | 22 | 33 |" in card
    assert "pixels_accuracy" not in card


def test_the_card_has_no_figures_of_other_images(tmp_path):
    images = {"source": "folder", "images": 5, "names": "abc"}
    known = {"data": {"modalities": {"rgb": {}, "thermal": {}}}}
    (tmp_path / "config.json").write_text(json.dumps(known))
    (tmp_path / "evaluations").mkdir()
    others = {**images, "names": "def"}
    evaluated = {  # accuracy of each
        71.0: {"data": {"train": images}, "modalities": ["thermal", "rgb"]},
        12.0: {"data": {"train": others}},
        13.0: {"data": {"train": images}, "modalities": ["thermal"]},
    }
    for accuracy, facts in evaluated.items():
        content = {
            "evaluated": {"step": 0, "weights": {}, **facts},
            "config": {"knn": {"params": "online", "feature": "cls"}},
            "figures": {"knn/knn20": accuracy},  # as before version 0.2
        }
        (tmp_path / "evaluations" / f"0-{accuracy}.json").write_text(json.dumps(content))
    config = ConfigDict({"training_images": images})
    model = types.SimpleNamespace(folder=tmp_path, config=config, step=0, modalities=())
    (figures,) = model_card._evaluation_rows(model).values()
    assert figures == {"trained": 71.0}


def test_the_current_folder_is_filled_and_nothing_beside_it_is_touched(run, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "mine").touch()
    monkeypatch.chdir(tmp_path / "out")
    export.export(runs.open_run(run), "flax", "online", ".")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.part"}
    assert (tmp_path / "out.part" / "mine").exists()
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"README.md", "config.json", "model.safetensors"}


def test_an_export_that_fails_leaves_nothing(run, tmp_path, monkeypatch):
    def fail(path, arrays, metadata):
        path.touch()
        raise OSError("the disk is full")

    monkeypatch.setattr(array_io, "write", fail)
    with pytest.raises(OSError, match="full"):
        export.export(runs.open_run(run), "flax", "online", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.fixture
def pairs(tmp_path):
    """A run on pairs with results of all modalities, and of thermal images alone."""
    config = recipe("interactive_mim")
    interactive_mim_vit_s.rgb_and_thermal(config)
    for modality in config.data.modalities.values():
        modality.patch_size = 4
    config.method = {**config.method, "channels": 4}
    options = modalities.method_options(config)
    method = base.from_config(options, total_steps=1, steps_per_epoch=1)
    config.method.update(modalities=options["modalities"])
    names = {"rgb": "abc", "thermal": "def"}
    training = {"source": "folders", "images": 5, **names}
    content = {"data": {"modalities": names}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    config.update(training_images=training)
    summary = {"steps": 0, "knn/knn5": 61.5, "collapse_index": 0.5}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "evaluations").mkdir()
    alone = {"source": "folder", "images": 5, "names": "def"}
    for accuracy, images, chosen in (
        (77.0, training, []),
        (33.0, alone, ["thermal"]),
        (12.0, {**alone, "names": "xyz"}, ["thermal"]),
    ):
        evaluation = {
            "evaluated": {"step": 0, "weights": {}, "data": {"train": images}},
            "config": {"linear": {"params": "online", "feature": "patches"}},
            "figures": {"linear/accuracy": {"trained": accuracy}},
        }
        evaluation["evaluated"]["modalities"] = chosen
        (tmp_path / "evaluations" / f"{accuracy}.json").write_text(json.dumps(evaluation))
    return in_memory(tmp_path, config, method, jax.jit(method.init)(jax.random.key(0)))


def test_the_card_of_one_modality_has_its_results_alone(pairs):
    every = model_card.write(pairs, "flax", "online")
    assert "| 61.5 |" in every and "| 77 |" in every and "collapse index" in every
    assert "| 33 |" not in every and "| 12 |" not in every
    for names in (["rgb"], ["thermal"]):
        card = model_card.write(modality_subset.choose(pairs, names), "timm", "online")
        assert "61.5" not in card and "| 77 |" not in card and "| 12 |" not in card
        assert "collapse index" not in card
        assert ("| linear/accuracy | online | patches | 33 |" in card) == (names == ["thermal"])


def test_the_card_names_what_training_began_with(tmp_path):
    source = tiny.run(recipe(), tmp_path / "official")
    imported = {"file": "mae.pth", "sha256": "abc", "fresh": ["a"]}
    (source / "imported.json").write_text(json.dumps(imported))
    method = runs.open_run(source).method
    student = in_memory(tmp_path / "student", recipe(), *interop.case("latent_mim"))
    initialization.read(source, method).write(student.folder)
    expected = (
        "## Base model\n\nTraining began with weights of `official`, step 0. Imported weights: "
        "mae.pth, SHA-256 abc. 1 arrays were not in that file, and initialized at random.\n"
    )
    export.export(student, "flax", "online", tmp_path / "out")
    export.export(runs.open_run(tmp_path / "out"), "timm", "online", tmp_path / "again")
    for folder in ("out", "again"):
        card = (tmp_path / folder / "README.md").read_text()
        assert expected in card and "license of the imported weights applies" in card
    record = frozen_teacher.weights(str(source), as_teacher(method)).record
    (student.folder / "init_from.json").write_text(json.dumps(record))
    card = model_card.write(student, "timm", "online")
    assert "None: training began with random weights. The targets were features" in card
    assert "a frozen teacher, `official`. Imported weights: mae.pth" in card
    assert "license of the imported weights applies" not in card


def as_teacher(method):
    """A method whose frozen teacher is the encoder of another one."""
    options = dict(target="frozen", frozen=method, projector_depth=0)
    return dataclasses.replace(method, **options)


@pytest.mark.parametrize("initial", [{"folder": "/a/b", "step": 3}, None])
def test_the_card_does_not_claim_what_older_versions_did_not_record(tmp_path, initial):
    run = in_memory(tmp_path, recipe(), *interop.case("latent_mim"))
    if initial:
        (tmp_path / "init_from.json").write_text(json.dumps(initial))
    else:  # an exported folder
        content = {"exported": {"step": 0, "weights": "online"}}
        (tmp_path / "config.json").write_text(json.dumps(content))
    card = model_card.write(run, "timm", "online")
    assert "random weights." not in card
    assert ("weights of `b`, step 3." in card) == bool(initial)
    assert "began with imported weights was not recorded; if so, the license" in card


def test_a_teacher_that_stays_random_is_no_average(tmp_path):
    run = in_memory(tmp_path, recipe(target="random"), *interop.case("latent_mim"))
    assert "random weights, as it was at the start." in model_card.write(run, "flax", "target")


def test_a_public_config_has_no_paths():
    config = recipe(target="frozen:/secret/run")
    config.data.update(cache="/secret", labels="secret.csv", stage="secret", classes="secret.txt")
    config.init_from = "secret/run"
    for name in ("fewshot", "segmentation", "video_segmentation", "detection"):
        config.evaluators[name] = tiny.evaluator(name)
    config.evaluators.fewshot.lists = ("secret.txt",)
    config.evaluators.segmentation.update(images="secret", masks="secret")
    config.evaluators.video_segmentation.update(path="secret", listed="secret")
    config.evaluators.detection.update(test_annotations="/secret.json", classes=("cat",))
    config.evaluators.visualization.images = 2
    public = model_card.public_config(config)
    assert "secret" not in json.dumps(public)
    assert public["method"]["target"] == "frozen"
    assert public["evaluators"]["detection"]["classes"] == ["cat"]
    assert public["evaluators"]["detection"]["train_annotations"] == "train.json"
    assert public["evaluators"]["visualization"]["images"] == 2


@pytest.mark.parametrize("channels", [1, 3, 4, 6])
def test_the_code_of_a_card_reads_images_of_any_bands(channels, tmp_path, monkeypatch):
    config = recipe("mae", channels=channels)
    config.data.update(channels=channels, range="0,4095")
    config.augment.update(mean=(0.5,) * channels, std=(0.25,) * channels)
    method = base.from_config(config.method, total_steps=1, steps_per_epoch=1)
    run = in_memory(tmp_path, config, method, jax.eval_shape(method.init, jax.random.key(0)))
    codes = {}
    for kind in ("timm", "hf", "onnx", "flax"):
        card = model_card.write(run, kind, "online")
        codes[kind] = card.partition("```python\n")[2].partition("```")[0]
        compile(codes[kind], kind, "exec")
        assert "bits become levels before: 0,4095 become 0 and 255, and" in card
    assert (".convert(" in codes["timm"]) == (".convert(" in codes["hf"]) == (channels != 6)
    Image.new("RGB", (20, 16), (255, 255, 255)).save(tmp_path / "image.jpg")
    np.save(tmp_path / "image.npy", np.full((16, 16, channels), 255))
    seen = []
    session = types.SimpleNamespace(run=lambda _, inputs: (seen.append(inputs["images"]), None))
    library = types.SimpleNamespace(InferenceSession=lambda path: session)
    monkeypatch.setitem(sys.modules, "onnxruntime", library)
    monkeypatch.chdir(tmp_path)
    exec(codes["onnx"])
    np.testing.assert_array_equal(seen[0], np.full((1, channels, 16, 16), 2, np.float32))


@pytest.mark.parametrize("which", ["online", "target"])
def test_an_exported_flax_folder_opens_like_a_run(run, tmp_path, which):
    export.export(runs.open_run(run), "flax", which, tmp_path / "out")
    again = runs.open_run(tmp_path / "out")
    for params in (lmim_jax.load(tmp_path / "out").params, again.encoder_params(which)):
        jax.tree.map(
            np.testing.assert_array_equal, params, runs.open_run(run).encoder_params(which)
        )
    assert again.step == 0 and again.choose_weights(None) == which
    if which == "online":
        with pytest.raises(UserError, match="holds the online weights"):
            lmim_jax.load(tmp_path / "out", weights="target")
    with pytest.raises(UserError, match=f"holds the {which} weights"):
        again.choose_weights({"online": "target", "target": "online"}[which])


def test_an_exported_flax_folder_needs_no_projector(tmp_path):
    config = recipe(projector_depth=0, target_layers=(0,))
    model = runs.open_run(tiny.run(config, tmp_path / "run"))
    export.export(model, "flax", "online", tmp_path / "out")
    images = np.zeros((1, 16, 16, 3), np.float32)
    found = lmim_jax.load(tmp_path / "out").encode(images)
    np.testing.assert_array_equal(found.mean, lmim_jax.load(tmp_path / "run").encode(images).mean)


def test_there_is_no_export_without_official_names_or_a_teacher(tmp_path, monkeypatch):
    model = in_memory(tmp_path, recipe("mae"), *interop.case("mae"))
    monkeypatch.setattr(export.official, "names", lambda: ["latent_mim"])
    with pytest.raises(UserError, match="names in mae's official code are not known"):
        export.export(model, "safetensors", "both", tmp_path / "out")
    with pytest.raises(UserError, match=r"decoder=self is not in the official code"):
        method = base.from_config(recipe(decoder="self").method, total_steps=1, steps_per_epoch=1)
        export.official.describe(method)
    assert not (tmp_path / "out").exists()


def tool(*words, hide=()):
    """Run `lmim export` in a new process, without the modules to hide: (exit code, stderr)."""
    hidden = f"import sys; sys.modules.update(dict.fromkeys({hide!r})); "
    script = f"from lmim_jax.cli.__main__ import main; main({['export', *map(str, words)]!r})"
    environment = {**os.environ, "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", hidden + script],
        cwd=conftest.ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stderr.strip().splitlines()


def test_a_check_without_the_library_is_an_error(run, images, tmp_path):
    words = run, "--format=timm", f"--out={tmp_path / 'out'}", "--check", f"--images={images}"
    code, lines = tool(*words, hide=("torch", "timm"))
    assert code == 2 and "pip install torch timm" in lines[-1], lines
    assert (tmp_path / "out" / "README.md").exists()


@pytest.mark.interop
@pytest.mark.parametrize("library", interop.LIBRARIES)
@pytest.mark.parametrize("name", interop.METHODS)
def test_both_libraries_make_the_same_features_of_jpegs(name, library, tmp_path):
    method, params = interop.case(name)
    model = in_memory(tmp_path, recipe(name), method, params)
    export.export(model, library, "online", tmp_path / "out")
    jpegs = [
        interop.jpeg(height, width, i)
        for i, (height, width) in enumerate([(40, 40), (36, 72), (90, 45)])
    ]
    found = parity_check.compare(library, tmp_path / "out", model, params, jpegs)
    assert found["features"] <= 1e-4 and found["pixels"] < 0.5, found


@pytest.mark.interop
@pytest.mark.parametrize("library", interop.LIBRARIES)
@pytest.mark.parametrize("size", ["Ti/16", "B/16"])
def test_published_sizes_agree_on_photographs(size, library, tmp_path):
    import zipfile

    from lmim_jax.configs import vit_b, vit_ti

    archive = SHARED / "imagenet_jpegs_125.zip"
    parts = build({"Ti/16": vit_ti, "B/16": vit_b}[size].get_config(), steps_per_epoch=1)
    params = jax.jit(parts.method.init)(jax.random.key(0))
    if archive.exists():
        with zipfile.ZipFile(archive) as file:
            names = [
                name for name in sorted(file.namelist()) if name.lower().endswith((".jpeg", ".jpg"))
            ][:4]
            jpegs = [file.read(name) for name in names]
    else:
        jpegs = [interop.jpeg(300, 400, 0), interop.jpeg(500, 333, 1)]
    model = in_memory(tmp_path, parts.config, parts.method, params)
    export.export(model, library, "online", tmp_path / "out")
    found = parity_check.compare(library, tmp_path / "out", model, params, jpegs)
    assert found["features"] <= 1e-4, found


@pytest.mark.interop
def test_transformers_misses_nothing_and_takes_other_sizes(tmp_path):
    import torch
    from transformers import AutoModel

    method, params = interop.case("latent_mim")
    export.export(in_memory(tmp_path, recipe(), method, params), "hf", "online", tmp_path / "out")
    options = dict(add_pooling_layer=False, output_loading_info=True)
    model, problems = AutoModel.from_pretrained(tmp_path / "out", **options)
    assert not any(problems.values()), problems
    with torch.no_grad():
        tokens = model(torch.zeros(1, 3, 24, 32), interpolate_pos_encoding=True).last_hidden_state
    assert tokens.shape == (1, 1 + 6 * 8, 16)


@pytest.mark.interop
def test_timm_takes_other_sizes_and_pools_patches(tmp_path):
    import torch

    method, params = interop.case("latent_mim")
    export.export(in_memory(tmp_path, recipe(), method, params), "timm", "online", tmp_path / "out")
    library = importlib.import_module("timm")
    model = library.create_model(
        f"local-dir:{tmp_path / 'out'}", pretrained=True, img_size=(24, 32)
    ).eval()
    with torch.no_grad():
        x = torch.zeros(1, 3, 24, 32)
        torch.testing.assert_close(model(x), model.forward_features(x)[:, 1:].mean(dim=1))
