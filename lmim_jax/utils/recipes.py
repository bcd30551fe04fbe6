"""Recipes are found by name or by path: where they are, and what `--config` means."""

import importlib
import importlib.util
import pathlib

from lmim_jax.utils.errors import UserError, did_you_mean


def folder() -> pathlib.Path:
    """The folder of the recipes: configs/ of a checkout, lmim_jax/configs if installed."""
    spec = importlib.util.find_spec("lmim_jax.configs")
    if spec is None or spec.origin is None:
        raise UserError("this installation has no recipes (lmim_jax.configs); install it again")
    return pathlib.Path(spec.origin).parent


def names() -> list[str]:
    """The names of all recipes, sorted: "cifar10", "quickstart", "vit_b", ..."""
    return sorted(path.stem for path in folder().glob("[a-z]*.py"))


def training_names() -> list[str]:
    """The names of recipes that train. Others say `TRAINS = False`: studies, evaluators' options.

    What a study consists of can take long to compute.
    """
    found = []
    for name in names():
        if getattr(importlib.import_module(f"lmim_jax.configs.{name}"), "TRAINS", True):
            found.append(name)
    return found


def locate(recipe: str) -> str:
    """The file of a recipe, as `config_flags` takes it.

    Args:
      recipe: a name ("vit_b") or a path ("configs/vit_b.py", "/home/me/mine.py"), with or without
        an argument for its `get_config` ("small:mae,shapes"). "configs/NAME.py" is found from any
        folder.

    Returns:
      The path of the file, with the argument if there is one.

    Raises:
      UserError: there is no such recipe or file.
    """
    name, colon, argument = recipe.partition(":")
    path = pathlib.Path(name).expanduser()
    if path.suffix != ".py":
        if name not in names():
            raise UserError(f"{recipe}: no such recipe{did_you_mean(name, names())}")
        path = folder() / f"{name}.py"
    elif not path.is_file():
        packaged = folder() / path.name
        if path.parent != pathlib.Path("configs") or not packaged.is_file():
            hint = did_you_mean(path.stem, names())
            raise UserError(f"{recipe}: no such file; recipes can be given by name{hint}")
        path = packaged
    return f"{path}{colon}{argument}"
