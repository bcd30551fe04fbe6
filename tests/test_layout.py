"""Rules of the code base that a machine can check."""

import ast
import importlib
import pathlib

import density
import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = sorted((ROOT / "lmim_jax").rglob("*.py"))
# Folders of the package in layers: a module imports from its own folder and from earlier layers
LAYERS = (
    ("utils",),
    ("optim", "distributed", "models"),
    ("data", "methods"),
    ("convert", "evaluators"),
    ("train",),
    ("perf", "report"),
    ("cli",),
)
LEVEL = {folder: level for level, folders in enumerate(LAYERS) for folder in folders}
REGISTRIES = ("methods", "evaluators")  # a file in these folders is registered by its name


def relative(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported_modules(path: pathlib.Path) -> set[str]:
    """All names that a file imports, at any depth: "lmim_jax.train.step", "jax.numpy", ..."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def inner_imports(path: pathlib.Path) -> list[list[str]]:
    """What a file imports of this package, as parts: ["train", "step"]."""
    names = sorted(imported_modules(path))
    return [name.split(".")[1:] for name in names if name.startswith("lmim_jax.")]


@pytest.mark.parametrize("path", PACKAGE, ids=relative)
def test_every_module_imports(path):
    name = relative(path).removesuffix(".py").removesuffix("/__init__")
    importlib.import_module(name.replace("/", "."))


def test_the_package_has_few_entries():
    entries = {path.name for path in (ROOT / "lmim_jax").iterdir()} - {"__pycache__"}
    folders = {name for name in entries if (ROOT / "lmim_jax" / name).is_dir()}
    assert len(entries) <= 14, sorted(entries)
    assert folders == set(LEVEL)


@pytest.mark.parametrize("path", PACKAGE, ids=relative)
def test_imports_point_to_earlier_layers(path):
    folder = path.relative_to(ROOT / "lmim_jax").parts[0]
    if folder == "__init__.py":  # the entry point of notebooks, which may import anything
        return
    for parts in inner_imports(path):
        if parts[0] not in LEVEL:  # lmim_jax.configs, lmim_jax.__version__
            continue
        same = parts[0] == folder
        assert same or LEVEL[parts[0]] < LEVEL[folder], f"{relative(path)} imports {parts}"


@pytest.mark.parametrize("folder", REGISTRIES)
def test_registered_files_do_not_import_one_another(folder):
    for path in (ROOT / "lmim_jax" / folder).glob("*.py"):
        for parts in inner_imports(path):
            if parts[0] == folder and len(parts) > 1:
                assert parts[1] in ("base", "common"), f"{relative(path)} imports {parts}"


@pytest.mark.parametrize("folder", sorted(LEVEL))
def test_no_circle_inside_a_folder(folder):
    """Imports at the top of modules of one folder form no circle."""
    paths = {
        relative(path).removesuffix(".py").replace("/", "."): path
        for path in (ROOT / "lmim_jax" / folder).rglob("*.py")
    }
    needs = {}
    for name, path in paths.items():
        imported = imported_modules(path)
        needs[name] = {n for n in paths if n != name and (n in imported or _part_of(n, imported))}
    while needs:
        free = {name for name, needed in needs.items() if not needed & needs.keys()}
        assert free, f"circle among {sorted(needs)}"
        needs = {name: needed for name, needed in needs.items() if name not in free}


def _part_of(module: str, imported: set[str]) -> bool:
    return any(name.startswith(f"{module}.") for name in imported)


def public_functions(tree: ast.Module):
    """(name, function) of the functions and methods that are not private, nested ones left out."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node.name, node
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                    yield f"{node.name}.{inner.name}", inner


@pytest.mark.parametrize("path", PACKAGE, ids=relative)
def test_public_functions_are_documented_and_annotated(path):
    tree = ast.parse(path.read_text())
    if path.name != "__init__.py":
        assert ast.get_docstring(tree)
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name
    for name, function in public_functions(tree):
        assert ast.get_docstring(function), name
        arguments = function.args
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        every += [arg for arg in (arguments.vararg, arguments.kwarg) if arg]
        bare = [a.arg for a in every if a.annotation is None and a.arg not in ("self", "cls")]
        assert not bare, f"{name}: {bare} without annotations"
        assert function.returns is not None, f"{name} has no return annotation"


def test_code_is_not_dense():
    found, _ = density.measure(PACKAGE)
    for name, ceiling in density.CEILINGS.items():
        assert found[name] <= ceiling, f"{found[name]:.1f} {name} per 1,000 lines"
