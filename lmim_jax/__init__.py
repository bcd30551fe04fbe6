"""Latent Masked Image Modeling in JAX: pretrains Vision Transformers without labels."""

import importlib.util
import pathlib
import sys

__version__ = "0.2.0"


def _find_recipes_of_checkout() -> None:
    """Import configs/ beside this package as `lmim_jax.configs`, its name when it is installed."""
    package = pathlib.Path(__file__).parent
    recipes = package.parent / "configs"
    if (package / "configs").is_dir() or not (recipes / "vit_b.py").is_file():
        return
    name = f"{__name__}.configs"
    spec = importlib.util.spec_from_file_location(
        name, recipes / "__init__.py", submodule_search_locations=[str(recipes)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    globals()["configs"] = module


_find_recipes_of_checkout()


def load(run, target=False):
    """Open a run in a notebook: its method and its newest weights; or a folder that `lmim export --format=flax` made.

    Args:
      run: the --workdir of a run, or the exported folder, whose weights were chosen when it was made.
      target: the teacher's encoder instead of the online one.

    Returns:
      (method, params); `method.features(params, images)` gives features, see methods/base.py.

    Raises:
      UserError: no run, no checkpoint, or no target encoder there.
    """
    from lmim_jax.train import saved

    model = saved.open_model(run)
    which = model.choose("target" if target else model.exported or "online")
    return model.method, model.weights(which)
