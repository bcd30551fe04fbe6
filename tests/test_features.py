"""Features of image files: of any size, by name, in every kind of file; and error messages."""

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
from absl import flags
from PIL import Image

import lmim_jax
from lmim_jax.cli import extract_features, image_files
from lmim_jax.data import folder_listing
from lmim_jax.data.augment.device import Augment
from lmim_jax.data.folder_source import FolderSource
from lmim_jax.evaluators.common import feature_io, image_features
from lmim_jax.evaluators.common.feature_extraction import Extractor, extract_from_files
from lmim_jax.train import runs, workdir
from lmim_jax.utils.errors import UserError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny.run(tiny.get_config(), tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def extractor(run):
    return make(run)


def ignore_progress(count):
    del count


def extract(extractor, folder, names):
    source = FolderSource(str(folder), folder_listing.share_names(names), None, ())
    return extract_from_files(extractor, source, ignore_progress)


def make(run, **options):
    model = runs.open_run(run)
    transform = Augment.from_config(model.config.augment, image_size=(20, 20), eval_size=(16, 16))
    base = dict(size=16, kinds=extract_features.KINDS, norm=True, batch_size=8)
    options = {"image": "patches_prenorm", **base, **options}
    return Extractor(model.method, model.params, transform, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of three shapes, two in a subfolder; a text file, a cut JPEG, a text named *.png."""
    root = tmp_path_factory.mktemp("images")
    (root / "deep" / "er").mkdir(parents=True)
    for name, size in (
        ("a.jpg", (40, 40)),
        ("deep/b.jpg", (24, 48)),
        ("deep/er/c.jpg", (48, 24)),
        ("d.jpg", (41, 40)),
    ):
        (root / name).write_bytes(interop.jpeg(*size))
    (root / "deep" / "cut.jpg").write_bytes(interop.jpeg(40, 40)[:300])
    (root / "e.png").write_text("no image")
    (root / "notes.txt").write_text("a text")
    return root


def test_features_of_every_image_are_the_methods_own(extractor, folder):
    source, lines = image_files.open_images(folder, tiny.get_config().data)
    assert "1 .txt: left out" in "".join(lines)
    extracted = extract_from_files(extractor, source, ignore_progress)
    found = extracted.features
    assert extracted.names == ["a.jpg", "d.jpg", "deep/b.jpg", "deep/er/c.jpg"]
    assert sorted(name for name, _ in extracted.unreadable) == ["deep/cut.jpg", "e.png"]
    assert extracted.grids.tolist() == [[4, 4], [4, 4], [4, 8], [8, 4]]

    pixels = np.asarray(
        Image.open(folder / "deep" / "b.jpg").resize((32, 16), Image.Resampling.BICUBIC)
    )
    mean, std = np.float32((0.485, 0.456, 0.406)), np.float32((0.229, 0.224, 0.225))
    model = extractor.method
    expected = model.features(
        saved_params(extractor), ((pixels / np.float32(255) - mean) / std)[None]
    )
    np.testing.assert_allclose(found["cls"][2], expected["cls"][0], atol=1e-5)
    np.testing.assert_allclose(found["patches"][2], expected["patches"][0], atol=1e-5)
    np.testing.assert_allclose(found["mean"][2], expected["patches"][0].mean(axis=0), atol=1e-5)


def test_images_of_all_aspect_ratios_share_a_program(run, folder):
    """Padding changes no feature: encoded together or alone, with the program of another length."""
    names = ["a.jpg", "d.jpg", "deep/b.jpg", "deep/er/c.jpg"]
    kinds = ("cls", "mean", "patches", "latents", "block00/tokens:both")
    extractor = make(run, kinds=kinds)
    together = extract(extractor, folder, names).features
    assert extractor.compiled == {(1, 32)}  # the squares have 16 patches, the others 32
    assert extractor._encode._cache_size() == 1
    plain = make(run, kinds=kinds)
    plain._pads = False  # as for a method without `patch_features`
    alone = extract(plain, folder, names).features
    assert plain.compiled == {(16, 16), (16, 32), (32, 16)}
    for kind in kinds:
        for one, other in zip(together[kind], alone[kind], strict=True):
            np.testing.assert_allclose(one, other, atol=2e-5)


def test_a_full_batch_of_squares_gets_its_own_program(run, folder):
    extractor = make(run, batch_size=2, kinds=("mean",))
    extract(extractor, folder, ["a.jpg", "d.jpg", "deep/b.jpg"])
    assert extractor.compiled == {(1, 16), (1, 32)}


def test_crops_are_those_of_evaluators(run, folder):
    extractor = make(run, canvas=40)
    names = ["a.jpg", "deep/b.jpg"]
    extracted = extract(extractor, folder, names)
    assert extracted.grids.tolist() == [[4, 4], [4, 4]]
    assert len(extractor.compiled) == 1
    model = lmim_jax.load(run)
    expected = model.encode(model.preprocess([folder / name for name in names]))
    for kind in ("image", "cls", "mean", "patches"):
        np.testing.assert_allclose(
            np.stack(extracted.features[kind]), getattr(expected, kind), atol=1e-5
        )


def test_blocks_have_the_names_and_vectors_of_evaluators(run, folder):
    kinds = ("block00/tokens:cls", "block00/tokens", "cls+block00/tokens:both")
    extractor = make(run, canvas=40, kinds=kinds)
    names = ["a.jpg", "deep/b.jpg"]
    found = extract(extractor, folder, names).features
    model = lmim_jax.load(run)
    images = model.preprocess([folder / name for name in names])
    expected = jax.jit(model.method.features)(model.params, images)
    for kind in kinds:
        vectors = image_features.concatenate_parts(expected, kind)
        np.testing.assert_allclose(np.stack(found[kind]), vectors, atol=1e-5)


def test_mistakes_are_found_before_weights_are_read(tmp_path, folder, monkeypatch):
    """The run has no checkpoint: only its config is read."""
    config = tiny.get_config()
    config.method = tiny.method("mae")
    workdir.claim(tmp_path, config.to_dict(), None)
    defaults = {
        "workdir": str(tmp_path),
        "modalities": [],
        "out": str(tmp_path / "f.npz"),
        "features": ["cls", "mean"],
        "weights": None,
        "size": 0,
        "norm": True,
        "crop": False,
        "batch_size": 4,
    }
    for changes, message in (
        ({"features": ["block1/tokens"]}, r"no feature of that name.*block00/tokens"),
        ({"features": ["cls", "pixels"]}, "pixels needs no encoder"),
        ({"features": []}, "--features is empty"),
        ({"size": 3}, "less than one patch of 4 pixels"),
        ({"weights": "target"}, "mae has no target encoder"),
        ({}, "no checkpoints here"),
    ):
        monkeypatch.setattr(flags, "FLAGS", types.SimpleNamespace(**{**defaults, **changes}))
        with pytest.raises(UserError, match=message):
            extract_features.main([str(folder)])


def saved_params(extractor):
    return jax.device_get(extractor._params)


def test_the_batch_changes_no_feature(run, extractor, folder):
    names = ["a.jpg", "d.jpg", "deep/b.jpg"]
    one_by_one = make(run, batch_size=1, kinds=("mean",))
    together = extract(extractor, folder, names).features
    alone = extract(one_by_one, folder, names).features
    np.testing.assert_allclose(together["mean"], alone["mean"], atol=1e-6)
    assert alone.keys() == {"mean"}


def test_sizes_keep_the_shape_of_the_image_within_half_a_patch(extractor):
    assert extractor.shape(100, 100) == (16, 16)
    for height, width in ((100, 131), (131, 100), (1000, 1001), (30, 90)):
        found = extractor.shape(height, width)
        assert min(found) == 16 and all(side % 4 == 0 for side in found)
        assert abs(max(found) - 16 * max(height, width) / min(height, width)) <= 2


@pytest.mark.parametrize("suffix", feature_io.WRITERS)
def test_every_kind_of_file_gives_back_names_and_features(tmp_path, suffix):
    parquet = pytest.importorskip("pyarrow.parquet") if suffix == ".parquet" else None
    rng = np.random.default_rng(0)
    grids = np.array([[2, 3], [1, 2]], np.int32)
    names = ["a.jpg", "deep/ü.jpg"]
    given = {
        "mean": list(rng.random((2, 4), np.float32)),
        "patches": [rng.random((n, 4), np.float32) for n in (6, 2)],
    }
    path = tmp_path / f"f{suffix}"
    feature_io.make_writer(path)(names, grids, given)
    assert list(tmp_path.iterdir()) == [path]
    if suffix == ".parquet":
        table = parquet.read_table(path).to_pydict()
        assert table["name"] == names
        assert table["rows"] == [2, 1]
        assert table["columns"] == [3, 2]
        first = np.float32(table["patches"][0]).reshape(6, 4)
        second = np.float32(table["patches"][1]).reshape(2, 4)
        mean = np.float32(table["mean"])
    else:
        if suffix == ".npz":
            with np.load(path) as file:
                found = dict(file)
                stored_names = file["name"].tolist()
        else:
            from safetensors import safe_open

            with safe_open(path, "np") as file:
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                stored_names = json.loads(file.metadata()["name"])
        assert stored_names == names
        assert found["grid"].tolist() == grids.tolist()
        assert found["first"].tolist() == [0, 6, 8]
        first = found["patches"][0:6]
        second = found["patches"][6:8]
        mean = found["mean"]
    np.testing.assert_array_equal(mean, np.stack(given["mean"]))
    np.testing.assert_array_equal(first, given["patches"][0])
    np.testing.assert_array_equal(second, given["patches"][1])


def test_what_cannot_be_written_is_an_error_before_anything_is_computed(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"must end in \.npz"):
        feature_io.make_writer(tmp_path / "f.csv")
    with pytest.raises(UserError, match="no folder"):
        feature_io.make_writer(tmp_path / "absent" / "f.npz")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        feature_io.make_writer(tmp_path / "f.parquet")


def test_folders_without_images_and_too_many_images_are_refused(tmp_path, extractor):
    (tmp_path / "notes.txt").write_text("a text")
    data = tiny.get_config().data
    with pytest.raises(UserError, match="no images in this folder, only 1 other files"):
        image_files.open_images(tmp_path, data)
    with pytest.raises(UserError, match="no such folder"):
        image_files.open_images(tmp_path / "absent", data)
    with pytest.raises(UserError, match=r"take at least .* GB"):
        extract_features.check_memory(10**10, {"cls": (16,)}, 1)
    with pytest.raises(UserError, match=r"take at least .* GB"):
        extract_features.check_memory(10**5, {"patches": (16, 16)}, 100)


def test_features_are_written_before_bad_files_are_listed(run, folder, tmp_path, monkeypatch):
    out = tmp_path / "f.npz"

    def fail_at_bad_files(text):
        if text.startswith("left out"):
            raise BrokenPipeError

    given = dict(workdir=str(run), out=str(out), features=["mean"], modalities=[], weights=None)
    given |= dict(size=0, norm=True, batch_size=8, crop=False)
    monkeypatch.setattr(flags, "FLAGS", types.SimpleNamespace(**given))
    monkeypatch.setattr(extract_features, "log_to_console", lambda: None)
    monkeypatch.setattr(extract_features, "print", fail_at_bad_files, raising=False)
    with pytest.raises(BrokenPipeError):
        extract_features.main([str(folder)])
    assert out.exists()


def test_the_command(run, folder, tmp_path):
    """As a user runs it: bad files are listed; a folder without images is a one-line error."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a text")
    words = [f"--out={tmp_path / 'f.npz'}", "--size=24", "--nonorm", "--batch_size=2"]
    script = f"""
import contextlib, sys
from lmim_jax.cli import app
from lmim_jax.cli import extract_features, image_files
from lmim_jax.data import folder_listing
for images in {str(folder)!r}, {str(tmp_path / "texts")!r}:
    argv = ["features", {str(run)!r}, images, *{words!r}]
    with contextlib.suppress(SystemExit):
        app.run(extract_features, argv)
app.run(extract_features, argv)
"""
    pipes = dict(env={**os.environ, "XLA_FLAGS": ""}, capture_output=True, text=True)
    done = subprocess.run([sys.executable, "-c", script], cwd=conftest.ROOT, **pipes)
    assert (
        "left out: deep/cut.jpg: " in done.stdout
        and "1 .txt: left out (images1/notes.txt)" in done.stdout.replace(folder.name, "images1")
    ), done
    with np.load(tmp_path / "f.npz") as file:
        assert file["grid"].tolist() == [[6, 6], [6, 6], [6, 12], [12, 6]] and file[
            "patches"
        ].shape == (216, 16)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 2 and "no images in this folder" in errors[0]
    assert "Traceback" not in done.stderr
