"""Latent Masked Image Modeling in JAX: pretrains Vision Transformers without labels."""

import importlib.util
import pathlib
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from lmim_jax.train.inference import Model

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


def load(
    folder: "str | os.PathLike[str]",
    weights: "str | None" = None,
    modalities: "Sequence[str]" = (),
) -> "Model":
    """Load a trained encoder: a run, or a folder made by `lmim export --format=flax`.

        model = lmim_jax.load("runs/vit_b")
        features = model.encode(model.preprocess(["a.jpg", "b.jpg"]))
        features.image, features.cls, features.patches, features.mean

    Args:
      folder: the --workdir of a run, of which the newest good checkpoint is read; or the exported
        folder.
      weights: "online", or "target" for the teacher's encoder. None: the choice of the recipe,
        `config.representation.weights`; of an exported folder, those that it holds.
      modalities: of a run on several, those that images have; (): all, as arrays of all channels.

    Returns:
      A model with `preprocess`, `encode`, `method` and `params`; see `train.inference.Model`.

    Raises:
      UserError: there is no run or no good checkpoint, or it has no such weights.
    """
    from lmim_jax.train import inference  # imports jax

    return inference.load(folder, weights, modalities)
