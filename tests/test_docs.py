"""The documentation: examples run, links and commands exist, the reference is complete."""

import collections
import csv
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from lmim_jax.cli.__main__ import COMMANDS
from lmim_jax.configs import evaluate
from lmim_jax.utils import recipes

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    ROOT / "RESULTS.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "launch" / "README.md",
    *sorted(DOCS.rglob("*.md")),
]
GENERATED = ("reference/config.md", "reference/evaluators.md", "reference/recipes.md")
TITLED_BLOCK = re.compile(r'^```python title="([^"]+)"\n(.*?)^```$', re.DOTALL | re.MULTILINE)
CODE_BLOCK = re.compile(r"^```\w*[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INLINE_CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")

sys.path.append(str(DOCS))
import gen_reference  # noqa: E402
import gen_results  # noqa: E402


def relative(path):
    return path.relative_to(ROOT).as_posix()


SEARCHES = (
    "docs/results/recipe_search.md",
    "docs/results/switches.md",
)  # whose plans count many FLOPs


def _page(page):
    slow = [pytest.mark.slow] if relative(page) in SEARCHES else []
    return pytest.param(page, marks=slow, id=relative(page))


@pytest.mark.parametrize("page", [_page(page) for page in gen_results.pages()])
def test_tables_of_studies_are_those_of_their_records(page):
    text = page.read_text()
    assert gen_results.with_tables(text) == text, "run: python docs/gen_results.py"


def test_figures_of_trained_heads_are_those_of_their_records():
    page = (DOCS / "results" / "segmentation.md").read_text()
    for line in (ROOT / "results" / "camvid" / "finetuned.jsonl").read_text().splitlines():
        record = json.loads(line)
        cells = [f"{record['head']} head, {'frozen encoder' if record['frozen'] else 'fine-tuned'}"]
        for metric in ("camvid/miou", "camvid/pixels"):
            for encoder in ("untrained", "trained"):
                cells.append(f"{record['metrics'][metric][encoder]:.1f}")
        assert f"| {' | '.join(cells)} |" in page


def test_figures_of_training_with_labels_are_those_of_their_records():
    page = (DOCS / "results" / "recipe_search.md").read_text()
    records = {
        path.stem: json.loads(path.read_text())
        for path in (ROOT / "results" / "supervised").glob("*.json")
    }
    quickstart = f"{records.pop('quickstart')['accuracy']:.1f}"
    assert len(records) == 3
    for record in records.values():
        cells = (record["epochs"], record["learning_rate"], f"{record['accuracy']:.1f}")
        assert f"| {' | '.join(str(cell) for cell in cells)} |" in page
    assert (
        f"With labels, the same encoder reaches {quickstart} %." in (ROOT / "README.md").read_text()
    )
    assert f"| {quickstart} (accuracy) |" in (DOCS / "results" / "quickstart.md").read_text()


def test_figures_of_classes_are_those_of_their_records():
    page = " ".join((DOCS / "results" / "detection.md").read_text().split())
    found = collections.defaultdict(list)
    with (ROOT / "results" / "hit_uav" / "class_ap.csv").open() as file:
        for row in csv.DictReader(file):
            found[row["class"]].append(float(row["ap50"]))
    for name in ("Person", "Bicycle", "Car"):
        assert f"{min(found[name]):.0f} to {max(found[name]):.0f} for {name}" in page
    assert max(found["OtherVehicle"]) == 0


@pytest.fixture(scope="module")
def overlay(tmp_path_factory):
    """A copy of the package, its tests and documentation with the example files of the guides."""
    folder = tmp_path_factory.mktemp("overlay")
    ignored = shutil.ignore_patterns("__pycache__", "*.npz", "results")
    for name in ("lmim_jax", "configs", "tests", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for file in ("tests/interop.npz", "pyproject.toml"):
        shutil.copy(ROOT / file, folder / file)
    for page in ("method.md", "evaluator.md"):
        blocks = TITLED_BLOCK.findall((DOCS / "extending" / page).read_text())
        assert len(blocks) == 2, "a guide has a module and its recipe"
        for path, code in blocks:
            assert not (folder / path).exists()
            (folder / path).write_text(code)
    return folder


def run_lmim(folder, *arguments):
    """Run the command of the package in `folder`; its standard output."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    environment["XLA_FLAGS"] = environment["XLA_FLAGS"].replace("device_count=8", "device_count=2")
    done = subprocess.run(
        [sys.executable, "-m", "lmim_jax.cli", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def color_run(overlay, images, tmp_path_factory):
    """A short run of the method of the guide."""
    workdir = tmp_path_factory.mktemp("runs") / "color"
    run_lmim(
        overlay,
        "train",
        "--config=small:color_mim,shapes",
        f"--workdir={workdir}",
        "--config.data.source=folder",
        f"--config.data.path={images}",
        "--config.batch_size=8",
        "--config.micro_batches=1",
        "--config.total_steps=4",
        "--config.log_every=2",
        "--config.gauge_images=8",
        "--config.method.depth=1",
        "--config.method.decoder_depth=1",
    )
    return workdir


@pytest.mark.slow
def test_the_example_method_trains(color_run):
    summary = json.loads((color_run / "summary.json").read_text())
    assert summary["steps"] == 4
    assert 0 < summary["loss"] < 10


def run_tests(folder, *arguments):
    """Run tests of the copy in `folder`; all must pass."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n0", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.slow
def test_the_example_method_passes_the_tests_without_another_edit(overlay):
    run_tests(overlay, "tests/test_methods.py", "tests/test_configs.py", "tests/test_layout.py")
    run_tests(overlay, "tests", "-k", "color_mim or valid_recipe")


@pytest.mark.slow
def test_the_example_evaluator_evaluates(overlay, color_run):
    run_lmim(
        overlay,
        "evaluate",
        "--config=my_evaluators",
        f"--workdir={color_run}",
        "--evaluators=class_separation",
        "--config.class_separation.batch_size=16",
        "--baselines",
    )
    (path,) = (color_run / "evaluations").glob("*.json")
    text = path.read_text()
    assert "class_separation/separation" in text
    assert "pixels" in text


@pytest.mark.parametrize("path", PAGES, ids=relative)
def test_links_lead_somewhere(path):
    for link in LINK.findall(path.read_text()):
        target = link.partition("#")[0]
        if "://" in link or not target:
            continue
        generated = (path.parent / target).resolve().relative_to(ROOT).as_posix()
        if generated.startswith(("docs/reference/api/", "docs/reference/")) and (
            generated.removeprefix("docs/") in GENERATED or "/api/" in generated
        ):
            continue
        assert (path.parent / target).exists(), link


def commands(text):
    """The command lines of a page: those of `lmim` in code."""
    code = [*CODE_BLOCK.findall(text), *INLINE_CODE.findall(CODE_BLOCK.sub("", text))]
    for block in code:
        for line in block.replace("\\\n", " ").splitlines():
            words = line.partition("#")[0].split()
            if words[:1] == ["lmim"]:
                yield words


@pytest.mark.parametrize("path", PAGES, ids=relative)
def test_commands_and_recipes_exist(path):
    for words in commands(path.read_text()):
        name = words[1] if len(words) > 1 else "COMMAND"
        if name.startswith("-") or name.isupper():
            continue
        assert name in COMMANDS, " ".join(words)
        for word in words[2:]:
            recipe = re.fullmatch(r"--config=([\w.:,/]+)", word)
            if recipe and recipe[1] not in ("RECIPE", "color_mim_vit_b", "my_evaluators"):
                recipes.locate(recipe[1])


@pytest.mark.parametrize("path", PAGES, ids=relative)
def test_config_keys_exist(path):
    keys = set()
    for name in ("vit_b", *gen_reference.METHOD_RECIPES, "evaluate"):
        keys |= gen_reference.read_recipe(name)[1].keys()
    for preset in ("segmentation", "segmentation_finetune"):
        keys |= gen_reference.flatten(evaluate.get_config(preset)).keys()
    keys |= {"class_separation.batch_size"}
    for key in re.findall(r"--config\.([a-z0-9_.]+)=", path.read_text()):
        assert key in keys or any(known.startswith(f"{key}.") for known in keys), key


@pytest.mark.parametrize("name", ["vit_b", "evaluate", *gen_reference.METHOD_RECIPES])
def test_the_reference_has_every_option(name):
    missing = gen_reference.undocumented(name)
    if name in gen_reference.METHOD_RECIPES:  # everything else is that of vit_b
        missing = [key for key in missing if key.startswith("method.")]
    assert missing == []
