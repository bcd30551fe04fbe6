"""Converts reference cases of the official PiLaMIM to this project's terms."""

import numpy as np
from reference_mae import views
from test_reference import group

from lmim_jax.convert.official.base import from_official
from lmim_jax.methods.pilamim import Method
from lmim_jax.models.layers import unpatchify
from lmim_jax.train.step import update_target

CHANNELS = 3


def method(c):
    """The method with the sizes and options of a case's config_json."""
    return Method(
        modalities=(),
        grid=(c["image"] // c["patch"],) * 2,
        patch_size=c["patch"],
        channels=CHANNELS,
        width=c["dim"],
        depth=c["depth"],
        heads=c["heads"],
        mlp_ratio=4,
        norm_eps=c["layer_norm_eps"]["blocks"],
        registers=0,
        final_norm_eps=c["layer_norm_eps"]["final"],
        qkv_bias=False,
        decoder_width=c["decoder_dim"],
        decoder_depth=c["decoder_depth"],
        decoder_heads=c["decoder_heads"],
        latent_decoder_width=c["latent_decoder_dim"],
        sampler="random",
        mask_ratio=c["mask_ratio"],
        align_targets=True,
        pixel_weight=1.0,
        latent_weight=1.0,
        cls_weight=1.0,
        momentum_start=c["momentum"],
        momentum_end=c["momentum"],
        target="ema",
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
        dtype="float32",
        attention="xla",
        total_steps=1,
    )


def load(case, config):
    """(method, params, target before the EMA update, images [B, H, W, C], views)."""
    model = method(config)
    state = from_official(model, group(case, "state/"))
    places = views(case, int(model.num_patches * (1 - model.mask_ratio)))
    return (
        model,
        state["params"],
        state["target"],
        case["in/images_nchw"].transpose(0, 2, 3, 1),
        places,
    )


def outputs(case, run):
    """Yield (ours, theirs) of the forward pass and the loss; `run`: see test_reference.py."""
    order = np.concatenate([run.views["visible"], run.views["masked"]], axis=1)
    back = np.argsort(order, axis=1)[..., None]
    image = unpatchify(
        np.take_along_axis(np.asarray(run.forward["pixels"]), back, 1),
        run.method.grid,
        run.method.patch_size,
    )
    yield image, case["out/predicted_image"].transpose(0, 2, 3, 1)
    yield (
        np.take_along_axis(np.asarray(run.forward["latents"])[:, 1:], back, 1),
        case["out/predicted_latent"],
    )
    yield run.forward["latents"][:, 0], case["out/cls_latent_pred"]
    yield run.forward["targets"][:, 1:], case["out/target_latent"]
    yield run.forward["targets"][:, 0], case["out/cls_target"]
    for name in ("pixel", "latent", "cls"):
        yield run.metrics[f"{name}_loss"], case[f"out/loss_{name}"]


def gradients(case, method):
    """Expected gradients, a tree like the parameters."""
    return from_official(method, group(case, "grad/"))["params"]


def ema(case, run):
    """Pair (ours, theirs) of the teacher after an update, which comes after the loss."""
    updated = update_target(run.target, run.method.target_of(run.params), run.method.ema_rate(0))
    theirs = {f"target_encoder.{name}": value for name, value in group(case, "ema/").items()}
    return updated, from_official(run.method, theirs)["target"]
