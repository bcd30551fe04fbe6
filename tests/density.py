"""How dense the package's code is: constructs per 1,000 lines that slow a reader down.

Run: python tests/density.py
"""

import ast
import collections
import pathlib

PACKAGE = pathlib.Path(__file__).parent.parent / "lmim_jax"
# At most so many per 1,000 lines that are not blank
CEILINGS = {
    "conditional expressions": 12,
    "comprehensions": 25,
    "starred expressions": 8,
    "tuple assignments": 4,
    "named lambdas": 0,
}


def kind(node):
    """The key of CEILINGS that a syntax node counts as; None: none of them."""
    if isinstance(node, ast.IfExp):
        return "conditional expressions"
    if isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
        return "comprehensions"
    if isinstance(node, ast.Starred):
        return "starred expressions"
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda):
        return "named lambdas"
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
        return "tuple assignments" if isinstance(node.value, ast.Tuple) else None
    return None


def measure(paths):
    """({kind: count per 1,000 lines}, number of lines) over some files."""
    counts = collections.Counter()
    lines = 0
    for path in paths:
        source = path.read_text()
        lines += sum(bool(line.strip()) for line in source.splitlines())
        counts.update(kind(node) for node in ast.walk(ast.parse(source)))
    return {name: 1000 * counts[name] / lines for name in CEILINGS}, lines


def main():
    """Print the figures of each folder and of the whole package."""
    folders = sorted(
        path for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"
    )
    print(f"{'':<14}{'lines':>7}" + "".join(f"{name:>26}" for name in CEILINGS))
    for folder in [*folders, PACKAGE]:
        found, lines = measure(sorted(folder.rglob("*.py")))
        print(
            f"{folder.name:<14}{lines:>7}" + "".join(f"{value:>26.1f}" for value in found.values())
        )


if __name__ == "__main__":
    main()
