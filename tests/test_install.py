"""The package as users install it: a wheel, its command and its recipes, from an empty folder."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

import conftest
import pytest

from lmim_jax.cli.__main__ import COMMANDS
from lmim_jax.utils import recipes

ROOT = conftest.ROOT
SOURCES = ("lmim_jax", "configs", "pyproject.toml", "requirements.txt", "README.md", "LICENSE")
# One process for all commands, which imports what they share once, like `lmim` from the wheel
HELP = """
import os, sys
import lmim_jax.cli.__main__ as dispatcher
import jax, flax, optax, orbax.checkpoint
print(dispatcher.__file__, flush=True)
for name in dispatcher.COMMANDS:
    child = os.fork()
    if child == 0:
        print("COMMAND", name)
        try:
            dispatcher.main([name, "--help"])
        finally:
            sys.stdout.flush()
    os.waitpid(child, 0)
"""


def pyproject():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def requirements(name):
    """The requirements of a file, without comments and included files."""
    found = []
    for line in (ROOT / name).read_text().splitlines():
        requirement = line.partition("#")[0].strip()
        if requirement and not requirement.startswith("-r"):
            found.append(requirement)
    return found


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder in which the wheel is installed, without the libraries it needs."""
    root = tmp_path_factory.mktemp("wheel")
    source = root / "source"  # so that nothing is left in the checkout
    source.mkdir()
    for name in SOURCES:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", root, source]
    subprocess.run([*pip, *build], check=True)
    (wheel,) = root.glob("*.whl")
    target = root / "installed"
    subprocess.run([*pip, "install", "--no-deps", "--target", target, wheel], check=True)
    return target


@pytest.fixture
def lmim(installed, tmp_path):
    """Runs the installed command in an empty folder: its exit code, stdout and stderr."""
    folder = tmp_path / "empty"
    folder.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(installed), "XLA_FLAGS": conftest.FAST}

    def run(*arguments, program=(str(installed / "bin" / "lmim"),)):
        command = [*program, *arguments]
        return subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
        )

    return run


def test_the_wheel_holds_all_packages_recipes_and_types(installed):
    package = installed / "lmim_jax"
    for path in (ROOT / "lmim_jax").rglob("*.py"):
        assert (installed / path.relative_to(ROOT)).exists()
    for path in (ROOT / "configs").iterdir():
        if path.name != "__pycache__":
            assert (package / "configs" / path.name).exists()
    assert (package / "py.typed").exists()
    assert not (installed / "configs").exists()
    assert not (installed / "tests").exists()


def test_the_command_without_a_command(lmim):
    version = lmim("--version")
    assert version.stdout == "lmim_jax 0.2.0\n"
    overview = lmim()
    assert overview.returncode == 0
    assert overview.stdout == lmim("--help").stdout
    for name in COMMANDS:
        assert f"\n  {name} " in overview.stdout
    mistake = lmim("evalute")
    assert mistake.returncode == 2
    assert mistake.stderr == "error: lmim evalute: no such command; did you mean evaluate?\n"


@pytest.mark.slow
def test_the_help_of_every_command_explains_its_own_flags(lmim, installed):
    done = lmim("-c", HELP, program=(sys.executable,))
    where, *texts = done.stdout.split("COMMAND ")
    assert where.startswith(str(installed))
    assert len(texts) == len(COMMANDS), done.stderr
    for text, name in zip(texts, COMMANDS, strict=True):
        assert text.startswith(f"{name}\n")
        assert f"\n    lmim {name} " in text, "an example"
        _, listed = text.split("\nFlags:\n")
        flags = re.findall(r"^  --(?:\[no\])?(\w+)", listed, re.MULTILINE)
        assert flags
        for foreign in ("verbosity", "jax_platforms", "flagfile", "helpfull"):
            assert foreign not in flags
        for flag in flags:
            assert re.search(rf"Examples?: .*--(no)?{flag}\b", " ".join(listed.split())), flag
    runs = [text for text in texts if "\n  --workdir" in text]
    assert len(runs) == 9


@pytest.mark.slow
def test_a_run_is_trained_and_evaluated_from_an_empty_folder(lmim, images):
    small = ("--config.batch_size=16", "--config.micro_batches=1", "--config.data.source=folder")
    trained = lmim(
        "train",
        "--config=quickstart",
        "--config.total_steps=4",
        f"--config.data.path={images}",
        *small,
    )
    assert trained.returncode == 0, trained.stderr
    evaluated = lmim("evaluate", "--workdir=runs/quickstart", "--evaluators=knn")
    assert evaluated.returncode == 0, evaluated.stderr
    assert "knn/nn1" in evaluated.stdout
    missing = lmim("evaluate")
    assert missing.returncode == 2
    assert missing.stderr.splitlines()[-1] == "error: give the run: --workdir=RUN"


def test_a_packaged_recipe_is_planned_by_its_path(lmim):
    planned = lmim("plan", "--config=configs/small.py:mae,shapes", "--topology=h200:8")
    assert planned.returncode == 0, planned.stderr
    assert "h200:8: 8 chips on 1 host(s)" in planned.stdout


def test_the_dispatcher_imports_no_libraries():
    script = "import lmim_jax.cli.__main__, sys; print({'jax', 'absl', 'numpy'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\n"


def test_the_requirements_are_stated_once():
    project = pyproject()["project"]
    dynamic = pyproject()["tool"]["setuptools"]["dynamic"]
    assert dynamic["dependencies"] == {"file": ["requirements.txt"]}
    extras = project["optional-dependencies"]
    assert requirements("requirements-dev.txt") == extras["dev"]
    assert requirements("requirements-interop.txt") == extras["interop"]
    assert {"cuda12", "cuda13", "tpu", "gcs", "plan", "interop", "dev"} <= extras.keys()


def test_the_list_of_packages_is_complete():
    found = ["lmim_jax.configs"]
    for path in (ROOT / "lmim_jax").rglob("__init__.py"):
        found.append(".".join(path.parent.relative_to(ROOT).parts))
    assert sorted(pyproject()["tool"]["setuptools"]["packages"]) == sorted(found)


def test_the_recipes_of_a_checkout_are_beside_the_package():
    assert recipes.folder() == pathlib.Path(ROOT, "configs")
