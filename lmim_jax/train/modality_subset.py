"""A run for images of some of the modalities it was trained on.

Of a single one that is left, the encoder becomes an ordinary Vision Transformer: the embedding of
the modality is added to the bias of its patch embedding, and averages over pixels become part of
the kernel. It gives the same features, and can be exported for every library.

Letters: P values of a patch of the modality, Q values of a patch of the image, C channels, D width.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from lmim_jax.data import modalities
from lmim_jax.methods import base as methods
from lmim_jax.models.modalities import Modality
from lmim_jax.train.runs import Run

PATCH_EMBED = "patch_embed"
MODALITY_EMBED = "modality_embed"
ENCODERS = ("encoder", "frozen")  # that of a run, and a frozen teacher's
TARGET_EMBED = "target_embed"  # of random projections of pixels


def choose(run: Run, names: Sequence[str]) -> Run:
    """The same run for images of some modalities.

    Args:
      run: the run or exported model.
      names: of modalities; (): all of them, the run as it is.

    Raises:
      UserError: it has no such modalities.
    """
    known = list(run.config.data.modalities)
    if not names or (known and set(names) == set(known)):
        return run
    config = modalities.restrict(run.config, names)
    method = methods.from_config(config.method, total_steps=1, steps_per_epoch=1)
    weights = run.weights
    params = weights.params
    target = weights.target
    if not method.modalities:
        (modality,) = (part for part in run.method.modalities if part.name in names)
        params = fold(params, modality, method.patch_size)
        target = fold(target, modality, method.patch_size)
    chosen = dataclasses.replace(weights, params=params, target=target)
    return dataclasses.replace(
        run,
        config=config,
        method=method,
        loaded=chosen,
        opened=None,
        modalities=tuple(name for name in known if name in names),
    )


def fold(params: dict[str, Any], modality: Modality, patch_size: int) -> dict[str, Any]:
    """Parameters of several modalities as those of one.

    Args:
      params: of a method or a teacher.
      modality: that is left.
      patch_size: of the grid.
    """
    folded = {name: tree for name, tree in params.items() if name != "modalities"}
    for name in ENCODERS:
        if name in params:
            folded[name] = _fold_encoder(params[name], modality, patch_size)
    if TARGET_EMBED in params:
        layer = params[TARGET_EMBED]
        kernel = np.asarray(layer["kernel"])[: modality.patch_dim]
        folded[TARGET_EMBED] = {**layer, "kernel": _enlarge(kernel, modality, patch_size)}
    return folded


def _fold_encoder(encoder: dict[str, Any], modality: Modality, patch_size: int) -> dict[str, Any]:
    """The encoder with an ordinary patch embedding."""
    others = (f"{PATCH_EMBED}_", f"{MODALITY_EMBED}_")
    folded = {name: tree for name, tree in encoder.items() if not name.startswith(others)}
    layer = encoder[f"{PATCH_EMBED}_{modality.name}"]
    embedding = np.asarray(encoder[f"{MODALITY_EMBED}_{modality.name}"])[0, 0]
    folded[PATCH_EMBED] = {
        "kernel": _enlarge(np.asarray(layer["kernel"]), modality, patch_size),
        "bias": np.asarray(layer["bias"]) + embedding,
    }
    return folded


def _enlarge(
    kernel: Float[np.ndarray, "P D"], modality: Modality, patch_size: int
) -> Float[np.ndarray, "Q D"]:
    """The kernel that does to all pixels of a patch what `kernel` does to their averages."""
    factor = patch_size // modality.patch_size
    side = modality.patch_size
    cells = kernel.reshape(side, side, modality.channels, -1) / factor**2
    cells = cells.repeat(factor, axis=0).repeat(factor, axis=1)
    return cells.reshape(-1, kernel.shape[-1])
