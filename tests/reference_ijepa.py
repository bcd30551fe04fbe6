"""Reads reference cases of the official I-JEPA: sizes, weights and inputs in this project's terms."""

import jax
import numpy as np
from test_reference import group

from lmim_jax.convert.official.base import from_official
from lmim_jax.methods.ijepa import Method
from lmim_jax.train.step import update_target


class Perturbed(Method):
    """The cases' encoders have random noise on everything, fixed positions included: read them from the weights."""

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
        dtype="float32",
        attention="xla",
        total_steps=1,
    )


def tree(method, case, prefix):
    """Our tree of a case's arrays below a prefix, with the positions of encoders in it."""
    arrays = group(case, prefix)
    out = from_official(method, arrays)
    for root, name, official in (
        ("params", "encoder", "encoder"),
        ("target", "encoder", "target_encoder"),
    ):
        if f"{official}.pos_embed" in arrays:
            out[root][name]["positions"] = arrays[f"{official}.pos_embed"]
    return out


def load(case, config):
    """(method, params, target, images [B, H, W, C], views), the views padded by what must not matter."""
    context, targets = (case[f"in/{name}_idx"].astype(np.int32) for name in ("context", "target"))
    views = {
        "visible": np.pad(context, ((0, 0), (0, 3))),
        "targets": np.pad(targets, ((0, 0), (0, 0), (0, 2))),
    }
    views["visible_mask"] = np.pad(np.ones(context.shape, bool), ((0, 0), (0, 3)))
    views["target_mask"] = np.pad(np.ones(targets.shape, bool), ((0, 0), (0, 0), (0, 2)))
    ours = method(config, targets.shape[1])
    state, images = tree(ours, case, "state/"), case["in/images_nchw"].transpose(0, 2, 3, 1)
    return ours, state["params"], state["target"], images, views


def outputs(case, run):
    """Pairs (ours, theirs) of what the forward pass gives and the loss reports; `run`: see test_reference.py."""
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
    """The cases hold none: the teacher after an update at momentum 0.996, worked out by numpy."""
    updated = update_target(run.target, run.method.target_of(run.params), run.method.ema_rate(0))
    both = run.target["encoder"], run.params["encoder"]
    return updated, {"encoder": jax.tree.map(lambda old, new: 0.996 * old + 0.004 * new, *both)}
