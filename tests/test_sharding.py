"""Devices, cuts, loops and what is recomputed change no number; gradients are all that travels."""

import functools
import types

import jax
import numpy as np
import pytest
import test_step
import tiny
from jax._src.ad_checkpoint import (
    saved_residuals,  # what jax.ad_checkpoint.print_saved_residuals prints
)
from jax.sharding import PartitionSpec

from lmim_jax.distributed import sharding
from lmim_jax.models import decoders, vit
from lmim_jax.models.layer_stack import with_remat_and_scan
from lmim_jax.perf import hlo
from lmim_jax.train import state, step
from lmim_jax.utils.errors import UserError

BATCH = 16
SIZE = dict(
    depth=1, decoder_depth=1, similarity_weight=0.0
)  # whose mean over a micro-batch is squared


@functools.cache
def compiled(data, fsdp, micro_batches, batch=BATCH):
    """(mesh, jitted init, train step compiled) of the tiny model, of which all but norms and biases can be cut."""
    method, images, optimizer = test_step.setup(**SIZE)
    mesh = sharding.make_mesh(data, fsdp, jax.devices()[: data * fsdp])
    fresh = lambda: state.init(method, optimizer, jax.random.key(0))
    shardings = sharding.state_sharding(jax.eval_shape(fresh), mesh, min_size=64)
    jitted = jax.jit(
        step.make_train_step(method, images, optimizer, mesh, micro_batches, shardings=shardings),
        in_shardings=(shardings, sharding.batch_sharding(mesh)),
        out_shardings=(shardings, sharding.replicated(mesh)),
    )
    shapes = {"image": jax.ShapeDtypeStruct((batch, 24, 24, 3), "uint8")}
    shapes["size"] = jax.ShapeDtypeStruct((batch, 2), "int32")
    return (
        mesh,
        jax.jit(fresh, out_shardings=shardings),
        jitted.lower(jax.eval_shape(fresh), shapes).compile(),
    )


@functools.cache
def run(*args):
    """Three steps: (losses, gradients of the first times 0.1), numpy."""
    mesh, init, train_step = compiled(*args)
    current, rng, losses, first = init(), np.random.default_rng(0), [], None
    for _ in range(3):
        rows = {"image": rng.integers(0, 256, (BATCH, 24, 24, 3), dtype=np.uint8)}
        rows["size"] = np.full((BATCH, 2), 24, np.int32)
        current, found = train_step(current, sharding.to_global(rows, mesh))
        losses.append(float(found["loss"]))
        first = first or jax.device_get(current.opt_state[0].mu)
    return losses, first


@pytest.mark.parametrize(("data", "fsdp"), [(2, 4), (8, 1)])
def test_a_cut_state_and_copies_train_as_one_device_does(data, fsdp):
    (one, first), (many, second) = run(1, 1, 1), run(data, fsdp, 2)
    np.testing.assert_allclose(many, one, rtol=1e-4)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


def test_gradients_and_scalars_are_all_that_travels_whatever_the_batch():
    _, init, train_step = compiled(8, 1, 2)
    moved = hlo.collectives(train_step.as_text())
    assert {(one.kind, one.group) for one in moved} == {("all-reduce", 8)}
    arrays = [one for one in moved if not one.scalar]
    assert [one.times for one in arrays] == [1] * len(arrays)  # once a step, not once a micro-batch
    gradients = sorted(
        f"f32[{','.join(map(str, leaf.shape))}]" for leaf in jax.tree.leaves(init().params)
    )
    assert sorted(shape for one in arrays for shape in one.shapes if shape != "f32[]") == gradients
    # XLA puts them together into one or two messages; each micro-batch has the similarities beside that
    assert len(arrays) <= 2
    larger = hlo.collectives(compiled(8, 1, 2, 4 * BATCH)[2].as_text())
    sent = lambda moved: (sum(one.wire_bytes for one in moved), sum(one.times for one in moved))
    assert sent(larger) == sent(moved)


def test_a_cut_state_is_gathered_once_and_its_gradient_arrives_cut():
    _, init, train_step = compiled(2, 4, 2)
    current, moved = init(), hlo.collectives(train_step.as_text())
    cut = lambda tree: [
        leaf for leaf in jax.tree.leaves(tree) if sharding.FSDP in leaf.sharding.spec
    ]
    size = {
        kind: sum(one.size * one.times for one in moved if one.kind == kind) for kind in hlo.KINDS
    }
    assert size["all-gather"] == sum(leaf.nbytes for leaf in cut((current.params, current.target)))
    assert size["reduce-scatter"] == sum(leaf.nbytes for leaf in cut(current.params))
    assert size["all-to-all"] == size["collective-permute"] == 0
    assert all(
        leaf.sharding.shard_shape(leaf.shape) != leaf.shape for leaf in cut(current.opt_state)
    )
    assert len(cut(current.opt_state)) == 2 * len(cut(current.params))


def network(name):
    """(loss of parameters, parameters) of an encoder or decoder of two blocks."""
    block = dict(mlp_ratio=4.0, norm_eps=1e-6, dtype=np.dtype("float32"), attention="xla")
    tokens = jax.random.normal(jax.random.key(1), (4, 5, 16))
    if name == "vit":
        module, inputs = vit.ViT(width=16, depth=2, heads=2, **block), (tokens, tokens[:1])
    else:
        module, inputs = (
            decoders.LatentDecoder(
                kind=name, width=16, depth=2, heads=2, out_width=16, visual_cues=True, **block
            ),
            (tokens, tokens[:, 1:], tokens),
        )
    loss = lambda params: sum((x**2).mean() for x in jax.tree.leaves(module.apply(params, *inputs)))
    return loss, jax.jit(module.init)(jax.random.key(0), *inputs)


@pytest.mark.parametrize("name", ["vit", "cross"])
def test_recomputing_and_loops_change_no_number(name):
    loss, params = network(name)
    expected, saved = jax.jit(jax.value_and_grad(loss))(params), {}
    for remat, scan_layers in (("none", False), ("dots", False), ("full", False), ("full", True)):
        function = with_remat_and_scan(loss, remat, scan_layers)
        kept = saved_residuals(function, params)
        saved[remat, scan_layers] = sum(x.size for x, where in kept if "argument" not in where)
        text = str(jax.make_jaxpr(jax.grad(function))(params))
        assert ("scan[" in text) == scan_layers
        if (remat, scan_layers) in (("dots", False), ("full", True)):
            found = jax.jit(jax.value_and_grad(function))(params)
            for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert saved["full", False] < saved["dots", False] < saved["none", False]
    with pytest.raises(UserError, match=r"config.remat='all' must be one of: none, dots, full"):
        with_remat_and_scan(loss, "all", False)


def test_features_show_every_block_whatever_the_run():
    block = dict(mlp_ratio=4.0, norm_eps=1e-6, dtype=np.dtype("float32"), attention="xla")
    module, tokens = vit.ViT(width=16, depth=2, heads=2, **block), np.zeros((1, 5, 16), np.float32)
    params = jax.eval_shape(module.init, jax.random.key(0), tokens, tokens)["params"]
    look = lambda params: vit.features(module, params, tokens, tokens)
    assert (
        jax.eval_shape(with_remat_and_scan(look, "full", True), params).keys()
        == jax.eval_shape(look, params).keys()
    )


def test_the_rule():
    mesh = sharding.make_mesh(2, 4)
    leaf = lambda *shape: jax.ShapeDtypeStruct(shape, "float32")
    tree = {"kernel": leaf(8, 12), "odd": leaf(5, 7), "small": leaf(8), "embed": leaf(40, 16)}
    place = lambda *rules, min_size=32: {
        name: found.spec
        for name, found in sharding.state_sharding(tree, mesh, rules, min_size).items()
    }
    p, largest = PartitionSpec, (".*", "largest")
    assert place(largest) == {
        "kernel": p(None, "fsdp"),
        "odd": p(),
        "small": p(),
        "embed": p("fsdp"),
    }
    assert place(("embed", 1), largest)["embed"] == p(None, "fsdp")
    assert place(("emb.*", "replicated"), largest)["embed"] == p()
    assert place(("small", 0), largest)["small"] == p("fsdp")
    with pytest.raises(UserError, match=r"dimension 0 of odd \(5, 7\) cannot be cut in 4"):
        place(("odd", 0), largest)
    with pytest.raises(UserError, match="no rule matches embed"):
        place(("kernel", "largest"))
    whole = sharding.state_sharding(tree, sharding.make_mesh(), ((".*", "largest"),), 1)
    assert {found.spec for found in whole.values()} == {p()}


@pytest.mark.parametrize(
    ("data", "fsdp", "shape"), [(-1, 1, (8, 1)), (-1, 4, (2, 4)), (2, -1, (2, 4)), (1, 8, (1, 8))]
)
def test_minus_one_is_what_is_left(data, fsdp, shape):
    assert tuple(sharding.make_mesh(data, fsdp).shape.values()) == shape


@pytest.mark.parametrize(("data", "fsdp"), [(3, 1), (-1, 3), (-1, -1), (0, 8), (-1, 0), (4, 4)])
def test_a_mesh_that_is_not_all_devices_is_refused(data, fsdp):
    with pytest.raises(
        UserError, match=rf"config.mesh.data={data} x config.mesh.fsdp={fsdp} is not .* devices, 8"
    ):
        sharding.make_mesh(data, fsdp)


def test_rows_keep_their_place_in_the_batch_wherever_a_process_has_its_devices():
    devices = [types.SimpleNamespace(process_index=owner) for owner in (0, 1, 1, 0)]
    mesh = types.SimpleNamespace(devices=np.array(devices).reshape(2, 2))
    assert sharding.batch_positions(mesh, 8).tolist() == [0, 1, 4, 5, 6, 7, 2, 3]
    assert sharding.batch_positions(sharding.make_mesh(2, 4), 16).tolist() == list(range(16))


def test_the_recipe_names_every_switch():
    config = tiny.get_config()
    assert (config.mesh.data, config.mesh.fsdp, config.remat, config.scan_layers) == (
        -1,
        1,
        "none",
        False,
    )
