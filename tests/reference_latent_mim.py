"""Converts reference cases of the official Latent MIM to this project's terms."""

import numpy as np
from test_reference import group

from lmim_jax.convert.official.base import from_official
from lmim_jax.methods.latent_mim import Method
from lmim_jax.models.layers import patchify, sincos_positions
from lmim_jax.train.step import update_target

LOSSES = {"infonce_patches": "patch_infonce", "norm_l2": "norm_l2"}


def method(c):
    """The method with the sizes and options of a case's config_json."""
    return Method(
        modalities=(),
        grid=(c["grid"], c["grid"]),
        patch_size=c["patch"],
        gap=c["gap"],
        channels=3,
        width=c["dim"],
        depth=c["depth"],
        heads=c["heads"],
        mlp_ratio=4,
        norm_eps=1e-6,
        registers=0,
        projector_depth=c["nproj"],
        projector_width=c["mlp"],
        decoder="cross",
        decoder_width=c["ddim"],
        decoder_depth=c["ddepth"],
        decoder_heads=c["dheads"],
        visual_cues=c["avgvis"],
        num_visible=c["numvis"],
        target="ema",
        modality_masks="independent",
        target_patches="masked" if c["mask_target"] else "all",
        loss=LOSSES[c["loss"]],
        tau=c["tau"],
        standardize=True,
        similarity_weight=c["avgcoef"],
        similarity_start=c["sim_trg"],
        similarity_end=c["sim_trg"],
        momentum_start=c["mom"],
        momentum_end=c["mom"],
        target_layers=(),
        target_combine="concat",
        target_norm="layer",
        frozen=None,
        masks_per_image=1,
        position_noise=0.0,
        context_weight=0.0,
        context_warmup=0.15,
        sigreg_weight=0.0,
        sigreg_directions=512,
        variance_weight=0.0,
        regularized="images",
        negatives="image",
        duplicate_cosine=0.0,
        dtype="float32",
        attention="xla",
        total_steps=1,
    )


def views(case):
    """The case's mask indices and window offsets."""
    out = {
        "visible": case["in/visible_idx"].astype(np.int32),
        "masked": case["in/masked_idx"].astype(np.int32),
    }
    if "in/gap_offset_y" in case:
        out["offsets"] = np.stack([case["in/gap_offset_y"], case["in/gap_offset_x"]], -1).astype(
            np.int32
        )
    return out


def load(case, config):
    """(method, params, target, images [B, H, W, C], views); target is after the EMA update."""
    ours = method(config)
    state = from_official(ours, group(case, "state/"))
    target = update_target(state["target"], ours.target_of(state["params"]), ours.ema_rate(0))
    return ours, state["params"], target, case["in/images_nchw"].transpose(0, 2, 3, 1), views(case)


def outputs(case, run):
    """Yield (ours, theirs) of the forward pass and the loss; `run`: see test_reference.py."""
    names = {
        "visible": "encoder_tokens",
        "targets": "target_tokens",
        "predictions": "decoder_tokens",
    }
    yield from ((run.forward[name], case[f"out/{official}"]) for name, official in names.items())
    for name, official in (("predictions", "pred"), ("visible", "vis"), ("targets", "trg")):
        yield run.metrics[f"similarity_{name}"], case[f"out/avg_sim_{official}"]
    yield run.loss, case["out/loss"]
    yield patchify(run.images, run.method.grid, *patches_of(run)), case["mid/patches"]
    table = case["state/encoder.pos_embed.pos_embeds"]
    positions = sincos_positions(run.method.grid, run.method.width)
    yield positions, table[-len(positions) :]


def patches_of(run):
    """What `patchify` takes after images and grid."""
    return run.method.patch_size, run.method.gap, run.views.get("offsets")


def gradients(case, method):
    """Expected gradients, a tree like the parameters."""
    return from_official(method, group(case, "grad/"))["params"]


def ema(case, run):
    """Pair (ours, theirs) of the teacher after an update."""
    theirs = {f"target_encoder.{name}": value for name, value in group(case, "ema/").items()}
    return run.target, from_official(run.method, theirs)["target"]
