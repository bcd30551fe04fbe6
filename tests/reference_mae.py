"""Converts reference cases of the official MAE to this project's terms."""

import numpy as np
from test_reference import group

from lmim_jax.convert.official.base import from_official
from lmim_jax.methods.mae import Method


def method(c):
    """The method with the sizes and options of a case's config_json."""
    return Method(
        modalities=(),
        grid=(c["image"] // c["patch"],) * 2,
        patch_size=c["patch"],
        channels=3,
        width=c["dim"],
        depth=c["depth"],
        heads=c["heads"],
        mlp_ratio=4,
        norm_eps=1e-6,
        registers=0,
        decoder_width=c["decoder_dim"],
        decoder_depth=c["decoder_depth"],
        decoder_heads=c["decoder_heads"],
        sampler="random",
        modality_masks="independent",
        mask_ratio=c["mask_ratio"],
        norm_pix=c["norm_pix_loss"],
        dtype="float32",
        attention="xla",
    )


def views(case, visible):
    """Patch ids: the first `visible` of each row of the case's permutation, and the rest."""
    order = case["in/shuffle_idx"].astype(np.int32)
    return {"visible": order[:, :visible], "masked": order[:, visible:]}


def load(case, config):
    """(method, params, target, images [B, H, W, C], views)."""
    ours = method(config)
    places = views(case, int(ours.num_patches * (1 - ours.mask_ratio)))
    params = from_official(ours, group(case, "state/"))["params"]
    return ours, params, {}, case["in/images_nchw"].transpose(0, 2, 3, 1), places


def outputs(case, run):
    """Yield (ours, theirs) of the forward pass and the loss; `run`: see test_reference.py."""
    order = np.concatenate([run.views["visible"], run.views["masked"]], axis=1)
    yield run.forward["pixels"], np.take_along_axis(case["out/pred"], order[..., None], 1)
    yield (
        np.take_along_axis(case["out/mask"], run.views["masked"], 1),
        np.ones(run.views["masked"].shape),
    )
    yield run.loss, case["out/loss"]


def gradients(case, method):
    """Expected gradients, a tree like the parameters."""
    return from_official(method, group(case, "grad/"))["params"]


def ema(case, run):
    """There is no teacher."""
    return run.target, {}
