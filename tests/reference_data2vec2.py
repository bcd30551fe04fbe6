"""Converts reference cases of the official data2vec 2.0 to this project's terms."""

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from test_reference import group

from lmim_jax.configs import data2vec2_vit_b
from lmim_jax.convert.official.base import check, from_official
from lmim_jax.methods.data2vec2 import Method
from lmim_jax.models.layers import patchify
from lmim_jax.train.step import update_target


def method(c):
    """The method with the sizes and options of a case's config_json."""
    assert not c["layer_norm_first"] and c["instance_norm_target_layer"] and c["layer_norm_targets"]
    assert c["target_eps"] == c["decoder_norm_eps"] == 1e-5 and c["loss_scale"] == "1/sqrt(dim)"
    grid = c["grid"]
    if np.ndim(grid) == 0:
        grid = (grid, grid)
    depth = c["prenet_depth"] + c["depth"]
    return Method(
        modalities=(),
        grid=tuple(grid),
        patch_size=c["patch"],
        channels=3,
        width=c["dim"],
        depth=depth,
        heads=c["heads"],
        mlp_ratio=c["mlp_ratio"],
        norm_eps=c["norm_eps"],
        registers=0,
        prenet_depth=c["prenet_depth"],
        target="ema",
        target_layers=(),
        target_combine="mean",
        target_norm="instance",
        target_start=depth - c["top_k"],
        frozen=None,
        momentum_start=c["ema_decay"],
        momentum_end=c["ema_end_decay"],
        momentum_ramp=c["ema_anneal_end_step"] / c["steps"],
        mask_ratio=c["mask_prob"],
        mask_adjust=c["mask_prob_adjust"],
        mask_block=c["mask_length"],
        masks_per_image=c["masks"],
        noise=c["mask_noise_std"],
        decoder_width=c["decoder_dim"],
        decoder_depth=c["decoder_layers"],
        decoder_kernel=c["decoder_kernel"],
        decoder_groups=c["decoder_groups"],
        cls_weight=c["cls_loss"] * c["bs"] * c["masks"],  # a sum over them there
        dtype="float32",
        attention="xla",
        total_steps=c["steps"],
    )


def optimizer(c):
    """The recipe's optimizer, with the numbers of a case's config_json."""
    config = data2vec2_vit_b.get_config().optimizer
    config.update(lr=c["lr"], b1=c["betas"][0], b2=c["betas"][1], eps=c["eps"])
    config.update(weight_decay=c["weight_decay"], clip_norm=c["clip_norm"])
    config.cosine_share = 0.0  # constant
    return config


def views(case, prefix, *index):
    """The views of a batch."""
    mask = case[f"{prefix}/mask"][index]
    visible = np.argsort(mask, axis=1, kind="stable")[:, : int((mask[0] == 0).sum())]
    return {"visible": visible.astype(np.int32), "noise": case[f"{prefix}/noise"][index]}


def images(case, prefix, *index):
    """The images of a batch [B, H, W, C]."""
    return case[f"{prefix}/images_nchw"][index].transpose(0, 2, 3, 1)


def load(case, config):
    """(method, params, target, images [B, H, W, C], views)."""
    ours = method(config)
    state = group(case, "state/")
    check(ours, state)
    tree = from_official(ours, state)
    return ours, tree["params"], tree["target"], images(case, "in"), views(case, "in")


def outputs(case, run):
    """Yield (ours, theirs) of tokens and losses; `run`: see test_reference.py."""
    ours = run.method
    np.testing.assert_array_equal(run.views["visible"], case["in/visible_idx"])
    assert ours.num_visible == run.views["visible"].shape[1]
    yield run.forward["visible"], case["out/student_tokens"]
    yield run.forward["predictions"], case["out/pred"]
    yield run.forward["targets"], case["out/target"]
    yield ours._fill(run.forward["visible"][:, 1:], run.views), case["mid/decoder_input"]
    prenet = ours.prenet_depth
    student = inner_tokens(run, run.params, run.views["visible"])
    yield student["stem"], case["mid/student_stem"]
    yield student[prenet - 1], case["mid/student_prenet"]
    yield student[prenet], case["mid/student_block1"]
    features = jax.jit(ours.features)(run.target, run.images)
    yield features["latents"], case["out/target"]
    if prenet:
        yield features[f"block{prenet - 1:02d}/tokens"], case["mid/teacher_prenet"]
    yield features[f"block{ours.depth - 1:02d}/tokens"], case["out/teacher_tokens"]
    outputs = [features[f"block{i:02d}/mlp"] for i in range(prenet, ours.depth)]
    yield jnp.stack(outputs), case["mid/teacher_ffn"]
    metrics = run.metrics
    yield metrics["patch_loss"], case["out/patch_loss"]
    yield ours.cls_weight * metrics["cls_loss"], case["out/cls_loss"]
    yield run.loss, case["out/loss"]
    hidden = int(case["out/hidden_tokens"])
    assert hidden == len(run.views["visible"]) * (ours.num_patches - ours.num_visible)
    unbiased = (hidden / (hidden - 1)) ** 0.5  # of the variances there
    yield metrics["target_std"] * unbiased, case["out/target_std"]
    yield metrics["prediction_std"] * unbiased, case["out/pred_std"]


def inner_tokens(run, params, visible):
    """The student's tokens {"stem", 0, ..}: after the norm in front of blocks and after each."""
    ours = run.method
    patches = patchify(run.images, ours.grid, ours.patch_size)
    rows = np.arange(len(visible))[:, None] // ours.masks_per_image
    _, state = jax.jit(
        lambda: ours._encoder.apply(
            {"params": params["encoder"]},
            patches[rows, visible],
            ours._positions(params["encoder"])[0][visible],
            mutable=["intermediates"],
            capture_intermediates=lambda module, _: module.name == "stem_norm",
        )
    )()
    found = {"stem": state["intermediates"]["stem_norm"]["__call__"][0]}
    for block in range(ours.depth):
        found[block] = state["intermediates"][f"block{block:02d}"]["tokens"][0]
    found[-1] = found["stem"]  # what comes before block 0
    return found


def gradients(case, method):
    """Expected gradients, a tree like the parameters."""
    return from_official(method, group(case, "grad/"))["params"]


def ema(case, run):
    """(ours, expected) teacher after an update with the weights of the first step's start."""
    updated = update_target(run.target, run.method.target_of(run.params), run.method.ema_rate(0))
    params = flatten_dict(run.method.target_of(run.params))
    momentum = case["steps/ema_decay"][0]
    expected = {}
    for path, old in flatten_dict(run.target).items():
        expected[path] = momentum * old + (1 - momentum) * params[path]
    return updated, unflatten_dict(expected)


def batch(case, step):
    """The images and views of a step."""
    return {"image": images(case, "steps", step), **views(case, "steps", step)}


def step_losses(case, step):
    """Expected metrics of a step."""
    total, patches, _ = case["steps/loss"][step]
    return {"loss": total, "patch_loss": patches, "grad_norm": case["steps/grad_norm"][step]}


def after(case, method):
    """Expected weights after the steps, (params, target)."""
    names = group(case, "after/")
    for name, array in group(case, "ema/").items():
        names[f"_ema.{name}"] = array
    tree = from_official(method, names)
    return tree["params"], tree["target"]


def without_gradient(params):
    """Zero out biases of keys, whose true gradient is zero: Adam turns rounding into steps."""
    flat = flatten_dict(params)
    for path, value in flat.items():
        if path[-2:] == ("qkv", "bias"):
            query, key, third = np.split(np.asarray(value), 3)
            flat[path] = np.concatenate([query, np.zeros_like(key), third])
    return unflatten_dict(flat)
