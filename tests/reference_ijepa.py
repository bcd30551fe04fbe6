"""Converts reference cases of the official I-JEPA to this project's terms."""

import jax
import numpy as np
from test_reference import group

from lmim_jax.convert.official.base import from_official
from lmim_jax.methods.ijepa import Method
from lmim_jax.train.step import update_target


class Perturbed(Method):
    """A method that reads positions from the weights: in the cases, they contain random noise."""

    def _positions(self, encoder):
        return jax.lax.stop_gradient(encoder["positions"])


def method(c, blocks):
    """The method with the sizes and options of a case's config_json."""
    grid = (c["image"] // c["patch"],) * 2
    return Perturbed(
        grid=grid,
        patch_size=c["patch"],
        channels=3,
        width=c["dim"],
        depth=c["depth"],
        heads=c["heads"],
        mlp_ratio=4,
        norm_eps=1e-6,
        registers=0,
        decoder_width=c["predictor_dim"],
        decoder_depth=c["predictor_depth"],
        decoder_heads=c["predictor_heads"],
        blocks=blocks,
        target_scale=(0.15, 0.2),
        target_aspect=(0.75, 1.5),
        context_scale=(0.85, 1.0),
        context_capacity=grid[0] * grid[1],
        min_context=4,
        mask_batch=1,
        biased_masks=True,
        loss="smooth_l1",
        momentum_start=0.996,
        momentum_end=1.0,
        target="ema",
        target_layers=(),
        target_combine="concat",
        target_norm="layer",
        frozen=None,
        masks_per_image=1,
        modalities=(),
        position_noise=0.0,
        context_weight=0.0,
        context_warmup=0.15,
        sigreg_weight=0.0,
        sigreg_directions=512,
        variance_weight=0.0,
        regularized="images",
        dtype="float32",
        attention="xla",
        total_steps=1,
    )


def tree(method, case, prefix):
    """Our tree of a case's arrays below a prefix, with the positions of encoders in it."""
    arrays = group(case, prefix)
    out = from_official(method, arrays)
    for root, official in (("params", "encoder"), ("target", "target_encoder")):
        if f"{official}.pos_embed" in arrays:
            out[root]["encoder"]["positions"] = arrays[f"{official}.pos_embed"]
    return out


def load(case, config):
    """(method, params, target, images [B, H, W, C], views), with padded views."""
    context = case["in/context_idx"].astype(np.int32)
    targets = case["in/target_idx"].astype(np.int32)
    context_padding = ((0, 0), (0, 3))
    target_padding = ((0, 0), (0, 0), (0, 2))
    views = {
        "visible": np.pad(context, context_padding),
        "visible_mask": np.pad(np.ones(context.shape, bool), context_padding),
        "targets": np.pad(targets, target_padding),
        "target_mask": np.pad(np.ones(targets.shape, bool), target_padding),
    }
    ours = method(config, targets.shape[1])
    state = tree(ours, case, "state/")
    images = case["in/images_nchw"].transpose(0, 2, 3, 1)
    return ours, state["params"], state["target"], images, views


def outputs(case, run):
    """Yield (ours, theirs) of the forward pass and the loss; `run`: see test_reference.py."""
    real = case["out/pred"].shape[2]
    yield run.forward["predictions"][:, :, :real], case["out/pred"]
    yield run.forward["targets"][:, :, :real], case["out/target"]
    yield run.loss, case["out/loss"]


def gradients(case, method):
    """Expected gradients, a tree like the parameters; positions are fixed in the official code."""
    expected = tree(method, case, "grad/")["params"]
    expected["encoder"]["positions"] = np.zeros_like(case["state/encoder.pos_embed"])
    return expected


def ema(case, run):
    """(ours, expected) teacher after an update; no case has one, so numpy computes it."""
    updated = update_target(run.target, run.method.target_of(run.params), run.method.ema_rate(0))
    both = run.target["encoder"], run.params["encoder"]
    return updated, {"encoder": jax.tree.map(lambda old, new: 0.996 * old + 0.004 * new, *both)}
