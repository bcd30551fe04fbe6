"""The page of a run: complete, self-contained, escaped; and what it is made of."""

import dataclasses
import html.parser
import json
import pathlib
import shutil
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
import tiny
from absl import flags
from PIL import Image

from lmim_jax.cli import pca, report
from lmim_jax.distributed import sharding
from lmim_jax.evaluators.common import clustering
from lmim_jax.methods import base as methods
from lmim_jax.models.layers import patchify
from lmim_jax.optim import adamw
from lmim_jax.report import (
    classifier_section,
    config_diff,
    image_sections,
    log_sections,
    patch_sections,
    run_features,
    segmentation_section,
)
from lmim_jax.train import provenance, runs, summary, workdir
from lmim_jax.train.checkpoints import Checkpoints
from lmim_jax.train.state import jit_init
from lmim_jax.utils import html as page
from lmim_jax.utils.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent
EVIL = "<script>alert(1)</script>"
SECTIONS = [
    "curves",
    "evaluations",
    "inputs",
    "reconstructions",
    "features",
    "segmentations",
    "attention",
    "similarities",
    "neighbors",
    "provenance",
]


def make_run(folder, images, name="mae"):
    """A run that has just begun: a config, a checkpoint, an environment."""
    config = tiny.get_config()
    config.data.path = str(images)
    config.method = tiny.method(name)
    method = methods.from_config(config.method, total_steps=10, steps_per_epoch=5)
    optimizer, _ = adamw.from_config(
        config.optimizer, warmup_steps=1, total_steps=10, steps_per_epoch=1
    )
    mesh = sharding.make_mesh()
    init, _ = jit_init(method, optimizer, 0, mesh, rules=config.mesh.rules, min_size=1)
    state = init()
    workdir.claim(folder, config.to_dict(), {})
    provenance.record_start(folder, [])
    with Checkpoints(folder, config) as checkpoints:
        checkpoints.save(state, 4)
    return folder


@pytest.fixture(scope="module")
def folder(images, tmp_path_factory):
    """A run whose names and files are as bad as can be."""
    folder = make_run(tmp_path_factory.mktemp("runs") / 'a <b>"run" & more', images)
    lines = [
        {"step": step, "loss": 1 / step, "collapse_index": 0.5, "effective_rank": 3.0}
        for step in (2, 4)
    ]
    lines += [{"step": step, "knn/knn5": 50.0 + step, f"{EVIL}/it": 1.0} for step in (0, 4)]
    lines += [{"step": step, "regression/accuracy": 70.0 + step} for step in (0, 4)]
    (folder / "metrics.jsonl").write_text(
        "".join(f"{json.dumps(line)}\n" for line in lines) + '{"step": 5, "lo'
    )
    (folder / "evaluations").mkdir()
    (folder / "evaluations/linear.json").write_text(
        json.dumps({"figures": {EVIL: {"top1": 12.345, "note": EVIL}}})
    )
    (folder / "evaluations/flat.json").write_text(json.dumps({"figures": {"top1": float("nan")}}))
    (folder / "evaluations/cut.json").write_text('{"figures": {"to')
    return folder


@pytest.fixture(scope="module")
def text(folder):
    return report.report(runs.open_run(folder), bank=20)


class Parsed(html.parser.HTMLParser):
    """All elements of a page, as (name, attributes); checks that they are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.found, self.open = [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in page.VOID_ELEMENTS:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_page_has_everything_and_needs_nothing(text):
    elements = Parsed(text).found
    assert [a["id"] for tag, a in elements if tag == "section"] == SECTIONS
    assert [a["href"] for tag, a in elements if tag == "a"] == [f"#{name}" for name in SECTIONS]
    images = [a for tag, a in elements if tag == "img"]
    assert len(images) > 60
    assert all(a["src"].startswith("data:image/") and a["alt"] for a in images)
    assert all(a.get("href", "#").startswith("#") for _, a in elements)
    assert "://" not in text
    assert not any(tag in ("link", "iframe", "object") for tag, _ in elements)
    assert sum(tag == "script" for tag, _ in elements) == 1
    assert len(text) < 5e6


def test_names_that_are_not_utf_8_are_shown():
    name = "caf\udce9"  # of a file, see PEP 383
    text = page.document(name, page.tag("h1", name), [])
    assert text.encode().count(rb"caf\udce9") == 2


def test_everything_is_escaped(text):
    assert EVIL not in text
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 3
    assert "<h1>Run a &lt;b&gt;&quot;run&quot; &amp; more</h1>" in text


def test_figures_are_those_of_the_files(text):
    assert "54.0 %" in text
    assert "untrained encoder: 50.0 %" in text
    assert "untrained encoder: 70.0 %" in text
    assert text.index("logistic regression on frozen features") < text.index("vote of the")
    assert text.index("vote of the") < text.index("<section")  # both are tiles
    assert "12.3" in text
    assert "cut.json</code> contains no readable metrics" in text
    assert f"jax {jax.__version__}" in text


def test_any_accuracy_has_a_tile_with_its_baselines():
    later = {
        "fewshot/shots5": {"trained": 61.0, "untrained": 20.0},
        "fewshot/shots5_std": {"trained": 1.0},
        "linear_probe/top1": {"trained": 71.0},
        "segments/miou4": {"trained": 33.0},
        "knn/knn200": {"trained": 50.0},
        "knn/knn10": {"trained": 51.0, "pixels": 40.0},
    }
    tiles = log_sections._accuracy_tiles([("", {}), ("", later)])
    found = [(tile.title, tile.value) for tile in tiles]
    assert found == [("linear probe", "71.0 %"), ("k-NN 10", "51.0 %"), ("fewshot", "61.0 %")]
    assert tiles[1].note == "vote of the 10 nearest training images; raw pixels: 40.0 %"
    assert log_sections._accuracy_tiles([("", {"segments/miou4": {"trained": 33.0}})]) == []


def header_of(folder, log):
    """The header of the page of a run whose checkpoint is that of step 1000."""
    config = tiny.get_config()
    data = types.SimpleNamespace(sources={"train": [0]})
    run = types.SimpleNamespace(config=config, data=data, step=1000, folder=folder)
    return log_sections.page_header(run, log)


def test_tiles_are_of_the_checkpoint_and_the_default_options(tmp_path):
    (tmp_path / "evaluations").mkdir()

    def write(name, accuracy):
        figures = {"linear_probe/top1": {"trained": accuracy}}
        (tmp_path / "evaluations" / name).write_text(json.dumps({"figures": figures}))

    write("1000-linear_probe-0a1b2c3d.json", 12.3)
    assert "<b>12.3 %</b>" in header_of(tmp_path, [])
    assert "from 1000-linear_probe-0a1b2c3d.json" in header_of(tmp_path, [])
    write("100-linear_probe.json", 30.0)
    write("500-linear_probe.json", 50.0)
    assert "<b>50.0 %</b>" in header_of(tmp_path, [])
    assert "from 500-linear_probe.json" in header_of(tmp_path, [])
    write("1000-knn-linear_probe.json", 72.0)
    header = header_of(tmp_path, [])
    assert "<b>72.0 %</b>" in header
    assert "from " not in header


def test_the_header_is_of_the_checkpoint_where_the_run_has_gone_on(tmp_path):
    lines = []
    for step in (1000, 2000):
        lines.append({"step": step, "wall_seconds": 3.6 * step, "effective_rank": step / 1000})
    header = header_of(tmp_path, lines)
    assert "1,000 steps in 1h00m" in header
    assert "<b>1</b>" in header


def test_damaged_files_of_evaluations_are_named(tmp_path):
    tables = tmp_path / "evaluations" / "tables"
    pictures = tmp_path / "evaluations" / "pictures"
    for folder in (tables, pictures):
        folder.mkdir(parents=True)
    (tables / "empty_classes.csv").write_text("")
    for name in ("cut", "whole"):
        (tables / f"{name}_classes.csv").write_text("class,IoU\ncat,50\n")
        Image.new("RGB", (300, 300)).save(pictures / f"{name}_segments.png")
    picture = pictures / "cut_segments.png"
    picture.write_bytes(picture.read_bytes()[:-100])
    content = segmentation_section.section(tmp_path).content
    assert content.count("cannot be read") == 2
    assert "<code>empty_classes.csv</code> cannot be read" in content
    assert "<code>cut_classes.csv</code> cannot be read: image file is truncated" in content
    assert "<h3>whole</h3>" in content


@pytest.mark.parametrize("text", ["", "[]", '{"kind": "classes", "origin": {"step": 1}}'])
def test_damaged_classifiers_are_named(tmp_path, text):
    folder = tmp_path / "evaluations" / "finetune"
    folder.mkdir(parents=True)
    (folder / "classifier.json").write_text(text)
    assert "<code>finetune</code> cannot be read" in classifier_section.section(tmp_path).content


def test_rows_of_tables_are_described(text):
    assert "<td>knn/knn5</td>" in text
    assert ">vote of the 5 nearest training images</td>" in text
    assert 'data-column="untrained encoder"' in text


def test_the_report_has_one_speed():
    lines = [{"step": i, "images_per_second": speed} for i, speed in enumerate((5, 100, 300))]
    (tile,) = log_sections._training_tiles(lines, width=8)
    found = summary.summarize(lines, steps=2, total_steps=2, seconds=1.0)
    assert (tile.value, found["images_per_second"]) == ("100", 100)


def test_unlabeled_images_have_neighbors_other_than_themselves(folder, images, tmp_path):
    run = runs.open_run(folder, images / "train" / "cat")
    queries, searched = run_features.nearest_neighbors(run, "online", 4, 3, 100)
    assert searched == len(list((images / "train" / "cat").iterdir()))
    for query in queries:
        assert query.labeled_image.class_name == ""
        assert query.labeled_image.file_name.isdigit()
        cosines = [neighbor.cosine for neighbor in query.neighbors]
        assert cosines == sorted(cosines, reverse=True)
        for neighbor in query.neighbors:
            assert not (neighbor.labeled_image.image == query.labeled_image.image).all()
    few = tmp_path / "few"
    few.mkdir()
    for path in sorted((images / "train" / "cat").iterdir())[:3]:
        shutil.copy(path, few)
    queries, _ = run_features.nearest_neighbors(runs.open_run(folder, few), "online", 3, 5, 9)
    for query in queries:  # of three images, two are others
        assert [np.isfinite(neighbor.cosine) for neighbor in query.neighbors] == [True, True]
    for path in sorted(few.iterdir())[1:]:
        path.write_bytes(b"damaged")
    run = pca.with_images(runs.open_run(folder), str(few))
    queries, searched = run_features.nearest_neighbors(run, "online", 3, 5, 9)
    assert [query.neighbors for query in queries] == [[]]
    assert image_sections.neighbors_section(queries, searched, held_out=False).content
    assert log_sections.read_metric_log(tmp_path) == []
    assert log_sections.curves_section([]) is None
    assert log_sections.evaluations_section(tmp_path, []) is None


@pytest.mark.slow
def test_pictures_are_of_the_features_that_the_recipe_chose(images, tmp_path):
    run = runs.open_run(make_run(tmp_path / "run", images, "latent_mim"))
    run.config.representation.update(weights="target", patches="patches")
    target = jax.tree.map(lambda x: 2.0 * x, run.target)
    run = dataclasses.replace(run, loaded=runs.Weights(run.params, target, run.step))
    encoded = run_features.encode_images(run, run.choose_weights(None), 2)
    given = run.augmentation.normalize(encoded.images.astype(np.float32))
    expected = run.method.features({**run.params, **target}, given)["patches"]
    found = encoded.tokens.reshape(2, -1, encoded.tokens.shape[-1])
    difference = np.asarray(expected[0] - expected[1])  # the mean of all images cancels
    np.testing.assert_allclose(found[0] - found[1], difference, atol=0.02)
    assert difference.std() > 0.1


def test_own_images_become_a_page(folder, images, tmp_path):
    own = tmp_path / "my photos"
    shutil.copytree(images / "test" / "cat", own / "2024")
    (own / "cut.jpg").write_bytes((images / "train" / "cat" / "01.jpg").read_bytes()[:200])
    before = snapshot(own)
    run = pca.with_images(runs.open_run(folder), str(own))
    text = pca.page(run, "online", "Features of <my photos>", images=9, bank=20)
    assert snapshot(own) == before
    elements = Parsed(text).found
    names = [a["id"] for tag, a in elements if tag == "section"]
    assert names == ["features", "attention", "similarities", "neighbors"]
    assert "<h1>Features of &lt;my photos&gt;</h1>" in text
    assert "://" not in text
    assert "<figcaption>07</figcaption>" in text  # the name of a file
    assert "cut</figcaption>" not in text  # it cannot be read
    alone = pca.with_images(runs.open_run(folder), str(own / "2024"))
    encoded = run_features.encode_images(alone, "online", 1)
    assert encoded.tokens.std() > 0


def snapshot(folder):
    """{path: content} of the files below a folder."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_page_is_not_written_among_the_images(folder, images, monkeypatch):
    values = {"workdir": str(folder), "out": str(images / "pca.html")}
    monkeypatch.setattr(flags, "FLAGS", types.SimpleNamespace(**values))
    with pytest.raises(UserError, match="is in the folder of the images; give another folder"):
        pca.main([str(images)])


def test_bad_input_is_one_line(images, tmp_path):
    folder = tmp_path / "begun"
    workdir.claim(folder, tiny.get_config().to_dict(), {})
    with pytest.raises(UserError, match="no checkpoints here"):
        _ = runs.open_run(folder).weights
    command = [sys.executable, "-m", "lmim_jax.cli", "report", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    message = f"{tmp_path} is not a run: it has no config.json; give the --workdir of one"
    assert result.stderr == f"error: {message}\n"


@pytest.mark.parametrize("seed", range(5))
def test_cuts_are_nested_and_labels_stay(seed):
    tokens = np.random.default_rng(seed).normal(size=(40, 6))
    cuts = clustering.nested_clusters(tokens, (5, 3, 4))
    assert list(cuts) == [3, 4, 5]
    for before, after in ((3, 4), (4, 5)):
        assert set(cuts[after]) == set(range(after))
        pairs = set(zip(cuts[after].tolist(), cuts[before].tolist(), strict=True))
        assert len(pairs) == after  # each part lies in one cluster
        changed = cuts[after] != cuts[before]
        assert set(cuts[after][changed]) == {after - 1}
        (parent,) = set(cuts[before][changed])
        assert changed.sum() <= (cuts[after] == parent).sum()


def test_similar_tokens_share_a_cluster():
    tokens = np.repeat(np.eye(3), (5, 9, 7), axis=0)
    assert clustering.nested_clusters(tokens, (3,))[3].tolist() == [2] * 5 + [0] * 9 + [1] * 7


@pytest.mark.parametrize("spread", [0, 1e-30])
def test_equal_tokens_are_one_point(spread):
    tokens = np.zeros((6, 6, 4), np.float32)
    tokens[0, 0] = spread
    images = np.zeros((1, 24, 24, 3), np.uint8)
    encoded = types.SimpleNamespace(images=images, tokens=tokens[None])
    content = patch_sections.segmentation_section(encoded, 1).content
    assert "t-SNE of the patches of image 1" in content and "nan" not in content


def test_the_command_of_a_run_gives_its_config_again():
    match = config_diff.nearest_recipe(change(batch_size=64, seed=3))
    assert match.name == "quickstart"
    assert match.differences["batch_size"] == (128, 64)
    assert match.flags == ["--config=quickstart", "--config.batch_size=64", "--config.seed=3"]
    assert config_diff.nearest_recipe(change()).differences == {}


def test_an_extended_run_is_made_by_the_commands_that_made_it():
    extensions = [[700, "continue", 768, 12], [1000, "restart", 1536, 24]]
    match = config_diff.nearest_recipe(change(epochs=36, extensions=extensions))
    assert match.differences["epochs"] == (12, 36)
    assert match.flags == ["--config=quickstart"]
    assert match.extensions == [
        ["--epochs=24", "--schedule=continue"],
        ["--epochs=36", "--schedule=restart"],
    ]
    extensions = [[50, "restart", 50, 12]]
    match = config_diff.nearest_recipe(change(total_steps=100, extensions=extensions))
    assert match.flags == ["--config=quickstart", "--config.total_steps=50"]
    assert match.extensions == [["--total_steps=100", "--schedule=restart"]]


def change(**settings):
    """The quickstart recipe with other settings, as in config.json."""
    from lmim_jax.configs import quickstart

    config = quickstart.get_config()
    config.update(settings)
    return {**json.loads(json.dumps(config.to_dict())), "training_images": {"images": 1}}


@pytest.mark.parametrize("name", ["mae", "pilamim", "bootmae"])
def test_reconstructions_keep_what_is_visible(name):
    method = methods.from_config(tiny.method(name), total_steps=10, steps_per_epoch=5)
    height, width = method.image_size
    images = np.random.default_rng(0).normal(2, 3, (3, height, width, 3)).astype(np.float32)
    keys = jax.random.split(jax.random.key(2), 3)
    abstract_views = jax.eval_shape(method.sample, jax.random.key(0), keys)
    num_masked = abstract_views["masked"].shape[1]

    @jax.jit
    def reconstruct():
        params = method.init(jax.random.key(0))
        views = method.sample(jax.random.key(1), keys)
        output = method.forward(params, method.target_of(params), images, views)
        reconstructed = method.reconstruct(params, images, views)
        return reconstructed, views, output["pixels"][:, -num_masked:]

    reconstructed, views, pixels = reconstruct()

    def patches_of(images, kind):
        """The patches of some images that are "visible" or "masked"."""
        patches = np.asarray(patchify(images, method.grid, method.patch_size))
        return np.take_along_axis(patches, np.asarray(views[kind])[..., None], axis=1)

    visible = patches_of(reconstructed, "visible")
    np.testing.assert_array_equal(patches_of(images, "visible"), visible)
    masked = patches_of(reconstructed, "masked")
    true = patches_of(images, "masked")
    assert (true != masked).all()
    if name == "mae":  # as predicted, with the mean and deviation of the true patch
        mean = true.mean(-1, keepdims=True)
        deviation = true.std(-1, ddof=1, keepdims=True)
        np.testing.assert_allclose((masked - mean) / deviation, pixels, atol=1e-3)
