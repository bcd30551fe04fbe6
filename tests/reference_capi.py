"""Converts reference cases of the official CAPI to this project's terms."""

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from test_reference import group

from lmim_jax.configs import capi_vit_b
from lmim_jax.convert.official.base import check, from_official
from lmim_jax.methods.capi import Method
from lmim_jax.models import rope, vit
from lmim_jax.train.step import update_target


def method(c):
    """The method with the sizes and options of a case's config_json."""
    grid = c["grid"]
    if np.ndim(grid) == 0:
        grid = (grid, grid)
    return Method(
        modalities=(),
        grid=tuple(grid),
        patch_size=c["patch"],
        channels=3,
        width=c["dim"],
        depth=c["depth"],
        heads=c["heads"],
        mlp_ratio=c["mlp_ratio"],
        norm_eps=c["rms_eps"],
        registers=c["registers"],
        rope=c["rope"],
        rope_frequencies=(c["rope_max_freq"], c["rope_min_freq"]),
        drop_path=c["drop_path"],
        decoder_width=c["dim"],
        decoder_depth=c["pred_depth"],
        decoder_heads=c["heads"],
        sampler="inverse_block",
        roll=True,
        mask_ratio=c["mask_ratio"],
        prediction_ratio=c["pred_ratio"],
        clusters=c["clusters"],
        sinkhorn_tau=c["target_temp"],
        sinkhorn_iterations=c["sk_iters"],
        positionwise=c["positionwise_sinkhorn"],
        cluster_tau=c["pred_temp"],
        tau=c["student_temp"],
        momentum=c["momentum"],
        momentum_warmup=0.0,
        momentum_share=0.0,  # constant
        dtype="float32",
        attention="xla",
        total_steps=c["steps"],
    )


def optimizer(c):
    """The recipe's optimizer, with the numbers of a case's config_json."""
    config = capi_vit_b.get_config().optimizer
    config.update(lr=c["lr"], b1=c["betas"][0], b2=c["betas"][1], eps=c["eps"])
    config.update(weight_decay=c["weight_decay"], cosine_share=0.0)  # constant
    clustering = c["cluster_weight_decay"] / c["weight_decay"]
    replaced = {"clustering/.*": clustering, ".*norm.*": c["norm_wd_mult"]}
    config.decay_rules = replace(config.decay_rules, replaced)
    clustering = c["cluster_lr"] / c["lr"]
    replaced = {"clustering/.*": clustering, ".*/patch_embed/.*": c["patch_embed_lr_mult"]}
    config.lr_rules = replace(config.lr_rules, replaced)
    return config


def replace(rules, factors):
    """Rules with other factors for some of their regexes, all of which there are."""
    assert factors.keys() <= dict(rules).keys()
    return tuple((pattern, factors.get(pattern, factor)) for pattern, factor in rules)


def views(case, prefix, *index):
    """The views of a batch."""
    return {
        "visible": case[f"{prefix}/visible_idx"][index].astype(np.int32),
        "predicted": case[f"{prefix}/predict_idx"][index].astype(np.int32),
    }


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
    """Yield (ours, theirs) of coordinates, tokens and losses; `run`: see test_reference.py."""
    ours = run.method
    visible = run.views["visible"]
    coordinates = rope.grid_coordinates(ours.grid)
    yield coordinates, case["mid/patch_coords"]
    yield vit.with_registers(coordinates[visible], ours.registers), case["mid/student_coords"]
    yield vit.with_registers(coordinates[None], ours.registers)[0], case["mid/teacher_coords"]
    for name, key in (
        ("visible", "student_tokens"),
        ("predictions", "pred"),
        ("logits", "student_logits"),
        ("targets", "teacher_tokens"),
        ("cluster_logits", "cluster_logits"),
        ("assignments", "assignments"),
    ):
        yield run.forward[name], case[f"out/{key}"]
    features = jax.jit(ours.features)(run.target, run.images)
    yield features["registers"], case["eval/registers"]
    yield features["registers"], case["out/teacher_registers"]
    yield features["patches"], case["eval/feature_map"].reshape(features["patches"].shape)
    yield features["predicted"].mean(axis=1), case["eval/global"]
    yield run.metrics["prediction_loss"], case["out/loss"]
    yield run.metrics["cluster_loss"], case["out/cluster_loss"]


def gradients(case, method):
    """Expected gradients, a tree like the parameters."""
    return from_official(method, group(case, "grad/"))["params"]


def ema(case, run):
    """(ours, expected) teacher after an update with the weights of the first step's start."""
    updated = update_target(run.target, run.method.target_of(run.params), run.method.ema_rate(0))
    params = flatten_dict(run.method.target_of(run.params))
    momentum = run.method.momentum
    expected = {}
    for path, old in flatten_dict(run.target).items():
        expected[path] = momentum * old + (1 - momentum) * params[path]
    return updated, unflatten_dict(expected)


def batch(case, step):
    """The images and views of a step."""
    return {"image": images(case, "steps", step), **views(case, "steps", step)}


def step_losses(case, step):
    """Expected metrics of a step."""
    prediction, cluster = case["steps/loss"][step]
    return {"prediction_loss": prediction, "cluster_loss": cluster}


def after(case, method):
    """Expected weights after the steps, (params, target)."""
    names = {**group(case, "after/"), **group(case, "ema/")}
    tree = from_official(method, names)
    return tree["params"], tree["target"]
