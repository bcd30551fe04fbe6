"""Finds the recipe closest to a run, what differs, and the command that gives the run's config."""

import dataclasses
import importlib
import json
from collections.abc import Iterator
from typing import Any

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from lmim_jax.train.extension import Extension
from lmim_jax.utils import recipes

ABSENT = "absent"  # in place of the value of a key that one of two configs does not have

Differences = dict[str, tuple[Any, Any]]  # {key: (value in the recipe, value in the run)}


@dataclasses.dataclass(frozen=True)
class RecipeMatch:
    """The recipe that is closest to a run.

    Attributes:
      name: as for `--config`.
      differences: {key: (the recipe's value, the run's value)}, keys joined by dots.
      flags: of `lmim train`, they give the run's config, before it was extended.
      extensions: flags of every `lmim extend` that followed.
    """

    name: str
    differences: Differences
    flags: list[str]
    extensions: list[list[str]]


def nearest_recipe(config: dict[str, Any]) -> RecipeMatch | None:
    """The recipe with the fewest differences from a run's config.

    Args:
      config: nested dict, as in config.json.

    Returns:
      The match, or None if there are no recipes.
    """
    config = dict(config)
    config.pop("training_images", None)  # which images the run was trained on
    best_name = ""
    best_recipe = None
    best_differences: Differences = {}
    for name, recipe in _all_recipes():
        differences = _differences(recipe, config)
        if best_recipe is None or len(differences) < len(best_differences):
            best_name = name
            best_recipe = recipe
            best_differences = differences
    if best_recipe is None:
        return None
    first, extensions = _without_extensions(config)
    flags = [f"--config={best_name}", *_override_flags(best_recipe, first)]
    return RecipeMatch(best_name, best_differences, flags, extensions)


def _without_extensions(config: dict[str, Any]) -> tuple[dict[str, Any], list[list[str]]]:
    """The config of a run before it was extended, and the flags of `lmim extend` since."""
    entries = [Extension(*entry) for entry in config.get("extensions", [])]
    if not entries:
        return config, []
    key = "total_steps" if config["total_steps"] else "epochs"
    lengths = [entry.steps if config["total_steps"] else entry.epochs for entry in entries]
    flags = []
    for entry, length in zip(entries, [*lengths[1:], config[key]], strict=True):
        flags.append([f"--{key}={length}", f"--schedule={entry.schedule}"])
    return {**config, "extensions": [], key: lengths[0]}, flags


def _all_recipes() -> Iterator[tuple[str, ConfigDict]]:
    """Yield (name as for --config, config) of every recipe that trains."""
    for name in recipes.training_names():
        module = importlib.import_module(f"lmim_jax.configs.{name}")
        if name == "small":
            for method in module.methods():
                for dataset in module.DATASETS:
                    variant = f"{method},{dataset}"
                    yield f"small:{variant}", module.get_config(variant)
            continue
        yield name, module.get_config()


def _flatten(config: dict[str, Any]) -> dict[str, Any]:
    """{key joined by dots: value}, values as they are after a round trip through JSON."""
    return flatten_dict(json.loads(json.dumps(config)), sep=".")


def _differences(recipe: ConfigDict, config: dict[str, Any]) -> Differences:
    """The keys whose values differ, with both values; ABSENT where a key is missing."""
    recipe_values = _flatten(recipe.to_dict())
    run_values = _flatten(config)
    differences = {}
    for key in sorted(recipe_values.keys() | run_values.keys()):
        recipe_value = recipe_values.get(key, ABSENT)
        run_value = run_values.get(key, ABSENT)
        if recipe_value != run_value:
            differences[key] = (recipe_value, run_value)
    return differences


def _override_flags(recipe: ConfigDict, config: dict[str, Any]) -> list[str]:
    """Flags that turn a recipe into the config.

    Setting one key can change others that are derived from it, so the differences are computed
    again after each flag, and keys that agree by then need none. `recipe` is changed.
    """
    flags = []
    # Outer keys first: many inner ones are derived from them
    for key in sorted(_differences(recipe, config), key=_depth_then_name):
        remaining = _differences(recipe, config)
        if key not in remaining or ABSENT in remaining[key]:
            continue
        value = remaining[key][1]
        if isinstance(value, list):
            value = tuple(value)
        try:
            recipe.update_from_flattened_dict({key: value})
        except TypeError:
            # Of another type when the run was made: the page lists it, but no flag can set it
            continue
        flags.append(f"--config.{key}={value}")
    return flags


def _depth_then_name(key: str) -> tuple[int, str]:
    return key.count("."), key
