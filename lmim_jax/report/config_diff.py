"""Which recipe of configs/ a run comes from: what differs, and the command that gives its config again."""

import importlib
import json
import pathlib
import shlex
import sys

from flax.traverse_util import flatten_dict

FOLDER = pathlib.Path(__file__).parents[2] / "configs"


def nearest(config):
    """The recipe with the fewest differences from a run's config.

    Args:
      config: nested dict, as in config.json.

    Returns:
      (name as for --config, {key: (the recipe's value, the run's)}, command); (None, {}, "") without a configs/.
    """
    config = {key: value for key, value in config.items() if key != "training_images"}
    found = {name: (recipe, _differences(recipe, config)) for name, recipe in _all()}
    if not found:
        return None, {}, ""
    name = min(found, key=lambda name: len(found[name][1]))
    recipe, differing = found[name]
    return (
        name,
        differing,
        shlex.join(["python", "main.py", f"--config={name}", *_settings(recipe, config)]),
    )


def _all():
    """(name as for --config, ConfigDict) of every recipe of a run; studies and the like have no method."""
    if str(FOLDER.parent) not in sys.path:
        sys.path.append(str(FOLDER.parent))  # recipes import one another as configs.NAME
    for path in sorted(FOLDER.glob("[a-z]*.py")):
        module = importlib.import_module(f"configs.{path.stem}")
        variants = (
            [f"{m},{d}" for m in module.METHODS for d in module.DATASETS]
            if path.stem == "small"
            else [""]
        )
        for variant in variants:
            recipe = module.get_config(*filter(None, [variant]))
            if "method" in recipe:
                yield f"configs/{path.name}" + (f":{variant}" if variant else ""), recipe


def _flat(config):
    return flatten_dict(json.loads(json.dumps(config)), sep=".")


def _differences(recipe, config):
    """{key: (value in the recipe, value in the config)}, "absent" where there is none."""
    old, new = _flat(recipe.to_dict()), _flat(config)
    values = {
        key: (old.get(key, "absent"), new.get(key, "absent"))
        for key in sorted(old.keys() | new.keys())
    }
    return {key: pair for key, pair in values.items() if pair[0] != pair[1]}


def _settings(recipe, config):
    """Flags that turn a recipe into the config; values that follow from others set before are left out."""
    flags = []
    for key in sorted(_differences(recipe, config), key=lambda key: (key.count("."), key)):
        if key not in (left := _differences(recipe, config)) or "absent" in left[key]:
            continue
        value = left[key][1]
        value = tuple(value) if isinstance(value, list) else value
        try:
            recipe.update_from_flattened_dict({key: value})
        except (
            TypeError
        ):  # of another type when the run was made: listed above, but no flag can set it
            continue
        flags.append(f"--config.{key}={value}")
    return flags
