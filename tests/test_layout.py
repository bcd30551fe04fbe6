"""The house rules that a machine can check."""

import ast
import importlib
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = sorted((ROOT / "lmim_jax").rglob("*.py"))
FILES = [
    ROOT / "main.py",
    *PACKAGE,
    *sorted((ROOT / "configs").glob("*.py")),
    *sorted((ROOT / "tests").glob("*.py")),
]
LONG = {"train": 180}  # functions that may be longer than 80 lines


def relative(path):
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", PACKAGE, ids=relative)
def test_every_module_imports(path):
    importlib.import_module(
        relative(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    )


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_files_and_functions_are_short(path):
    source = path.read_text()
    assert len(source.splitlines()) <= (400 if path.parent.name == "tests" else 250)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno + 1 <= LONG.get(node.name, 80), node.name


@pytest.mark.parametrize("path", PACKAGE, ids=relative)
def test_public_things_have_docstrings(path):
    tree = ast.parse(path.read_text())
    if path.name != "__init__.py":
        assert ast.get_docstring(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            inner = any(
                node in parent.body
                for parent in ast.walk(tree)
                if isinstance(parent, ast.FunctionDef)
            )
            assert inner or ast.get_docstring(node), node.name


# Folder of an importer -> what it must not import: imports point one way.
FORBIDDEN = {
    "lmim_jax/models": (
        "methods",
        "evaluators",
        "data",
        "train",
        "step",
        "state",
        "optim",
        "checkpoint",
        "metrics",
    ),
    "lmim_jax/methods": (
        "evaluators",
        "data",
        "train",
        "step",
        "state",
        "optim",
        "checkpoint",
        "metrics",
    ),
    "lmim_jax/evaluators": ("methods", "data", "train", "step", "state", "optim", "checkpoint"),
    "lmim_jax/data": (
        "methods",
        "models",
        "evaluators",
        "train",
        "step",
        "state",
        "optim",
        "checkpoint",
    ),
}


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_imports_point_one_way(folder):
    for path in (ROOT / folder).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom | ast.Import):
                module = getattr(node, "module", None) or ""
                names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
                for bad in FORBIDDEN[folder]:
                    assert f"lmim_jax.{bad}" not in names, f"{relative(path)} imports {bad}"
                siblings = [
                    name for name in names if name.startswith(folder.replace("/", ".") + ".")
                ]
                if folder.endswith(("methods", "evaluators")):
                    assert all(".base" in name for name in siblings), (
                        f"{relative(path)} imports a sibling"
                    )
