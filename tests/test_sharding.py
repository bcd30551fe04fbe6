"""Meshes, shards, loops and rematerialization change no number; only gradients are communicated."""

import dataclasses
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
# The mean similarity over a micro-batch is squared: without it, accumulation is exact.
SIZE = dict(depth=1, decoder_depth=1, similarity_weight=0.0)
BLOCK = dict(mlp_ratio=4.0, norm_eps=1e-6, dtype=np.dtype("float32"), attention="xla")


@functools.cache
def compiled(data, fsdp, micro_batches, batch=BATCH):
    """The tiny model, of which all but norms and biases can be split.

    Returns:
      (mesh, jitted init, compiled train step).
    """
    method, images, optimizer = test_step.setup(**SIZE)
    mesh = sharding.make_mesh(data, fsdp, jax.devices()[: data * fsdp])

    def init():
        return state.init_state(method, optimizer, jax.random.key(0))

    shardings = sharding.state_sharding(jax.eval_shape(init), mesh, min_size=64)
    train_step = jax.jit(
        step.make_train_step(method, images, optimizer, mesh, micro_batches, shardings=shardings),
        in_shardings=(shardings, sharding.batch_sharding(mesh)),
        out_shardings=(shardings, sharding.replicated(mesh)),
    )
    shapes = {
        "image": jax.ShapeDtypeStruct((batch, 24, 24, 3), "uint8"),
        "size": jax.ShapeDtypeStruct((batch, 2), "int32"),
    }
    lowered = train_step.lower(jax.eval_shape(init), shapes)
    return mesh, jax.jit(init, out_shardings=shardings), lowered.compile()


@functools.cache
def run(data, fsdp, micro_batches):
    """Three steps: (losses, gradients of the first step times 0.1), numpy."""
    mesh, init, train_step = compiled(data, fsdp, micro_batches)
    current = init()
    rng = np.random.default_rng(0)
    losses = []
    first_gradients = None
    for _ in range(3):
        rows = {
            "image": rng.integers(0, 256, (BATCH, 24, 24, 3), dtype=np.uint8),
            "size": np.full((BATCH, 2), 24, np.int32),
        }
        current, metrics = train_step(current, sharding.to_global(rows, mesh))
        losses.append(float(metrics["loss"]))
        if first_gradients is None:
            first_gradients = jax.device_get(current.opt_state[0].mu)
    return losses, first_gradients


@pytest.mark.parametrize(("data", "fsdp"), [(2, 4), pytest.param(8, 1, marks=pytest.mark.slow)])
def test_sharded_and_replicated_states_train_as_one_device_does(data, fsdp):
    losses, gradients = run(1, 1, 1)
    other_losses, other_gradients = run(data, fsdp, 2)
    np.testing.assert_allclose(other_losses, losses, rtol=1e-4)
    pairs = zip(jax.tree.leaves(gradients), jax.tree.leaves(other_gradients), strict=True)
    for expected, found in pairs:
        np.testing.assert_allclose(expected, found, rtol=1e-3, atol=1e-6)


def communicated(collectives):
    """(bytes, messages) of a step."""
    return (
        sum(each.wire_bytes for each in collectives),
        sum(each.times for each in collectives),
    )


def test_only_gradients_and_scalars_are_communicated_whatever_the_batch():
    _, init, train_step = compiled(8, 1, 2)
    collectives = hlo.collectives(train_step.as_text())
    assert {(each.kind, each.group) for each in collectives} == {("all-reduce", 8)}
    arrays = [each for each in collectives if set(each.shapes) != {"f32[]"}]
    # Once a step, and not once a micro-batch
    assert [each.times for each in arrays] == [1] * len(arrays)
    gradients = []
    for leaf in jax.tree.leaves(init().params):
        gradients.append(f"f32[{','.join(map(str, leaf.shape))}]")
    shapes = [shape for each in arrays for shape in each.shapes if shape != "f32[]"]
    assert sorted(shapes) == sorted(gradients)
    # XLA combines them into one or two messages; each micro-batch has the similarities beside that.
    assert len(arrays) <= 2
    _, _, larger_step = compiled(8, 1, 2, 4 * BATCH)
    assert communicated(hlo.collectives(larger_step.as_text())) == communicated(collectives)


def sharded(tree):
    """The leaves that are split over `fsdp`."""
    return [leaf for leaf in jax.tree.leaves(tree) if sharding.FSDP in leaf.sharding.spec]


def total_bytes(arrays):
    return sum(array.nbytes for array in arrays)


def test_a_sharded_state_is_gathered_once_and_its_gradient_is_scattered():
    _, init, train_step = compiled(2, 4, 2)
    current = init()
    size = dict.fromkeys(hlo.KINDS, 0)
    for each in hlo.collectives(train_step.as_text()):
        size[each.kind] += each.size * each.times
    assert size["all-gather"] == total_bytes(sharded((current.params, current.target)))
    assert size["reduce-scatter"] == total_bytes(sharded(current.params))
    assert size["all-to-all"] == size["collective-permute"] == 0
    moments = sharded(current.opt_state)
    assert len(moments) == 2 * len(sharded(current.params))
    for leaf in moments:
        assert leaf.sharding.shard_shape(leaf.shape) != leaf.shape


def network(name):
    """(loss of parameters, parameters) of an encoder or decoder of two blocks."""
    tokens = jax.random.normal(jax.random.key(1), (4, 5, 16))
    if name == "vit":
        module = vit.ViT(width=16, depth=2, heads=2, **BLOCK)
        inputs = (tokens, tokens[:1])
    else:
        module = decoders.LatentDecoder(
            kind=name,
            width=16,
            depth=2,
            heads=2,
            out_width=16,
            visual_cues=True,
            predict_visible=False,
            **BLOCK,
        )
        inputs = (tokens, tokens[:, 1:], tokens)

    def loss(params):
        return sum((x**2).mean() for x in jax.tree.leaves(module.apply(params, *inputs)))

    return loss, jax.jit(module.init)(jax.random.key(0), *inputs)


@pytest.mark.parametrize("name", ["vit", "cross"])
def test_rematerialization_and_loops_change_no_number(name):
    loss, params = network(name)
    expected = jax.jit(jax.value_and_grad(loss))(params)
    saved = {}
    for remat, scan_layers in (("none", False), ("dots", False), ("full", False), ("full", True)):
        function = with_remat_and_scan(loss, remat, scan_layers)
        residuals = saved_residuals(function, params)
        saved[remat, scan_layers] = sum(
            x.size for x, source in residuals if "argument" not in source
        )
        text = str(jax.make_jaxpr(jax.grad(function))(params))
        assert ("scan[" in text) == scan_layers
        if (remat, scan_layers) in (("dots", False), ("full", True)):
            found = jax.jit(jax.value_and_grad(function))(params)
            for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert saved["full", False] < saved["dots", False] < saved["none", False]
    with pytest.raises(UserError, match=r"config.remat='all' must be one of: none, dots, full"):
        with_remat_and_scan(loss, "all", False)


def test_features_include_every_block_with_rematerialization_and_loops_too():
    module = vit.ViT(width=16, depth=2, heads=2, **BLOCK)
    tokens = np.zeros((1, 5, 16), np.float32)
    params = jax.eval_shape(module.init, jax.random.key(0), tokens, tokens)["params"]

    def features(params):
        return vit.features(module, params, tokens, tokens)

    found = jax.eval_shape(with_remat_and_scan(features, "full", True), params)
    assert found.keys() == jax.eval_shape(features, params).keys()


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, "float32")


STATE = {"kernel": shape(8, 12), "odd": shape(5, 7), "small": shape(8), "embed": shape(40, 16)}
LARGEST = (".*", "largest")


def specs(*rules, mesh=None, min_size=32):
    """The PartitionSpecs of STATE by name."""
    mesh = mesh or sharding.make_mesh(2, 4)
    found = sharding.state_sharding(STATE, mesh, rules, min_size)
    return {name: placement.spec for name, placement in found.items()}


def test_the_largest_dimension_that_can_be_split_is_split():
    assert specs(LARGEST) == {
        "kernel": PartitionSpec(None, "fsdp"),
        "odd": PartitionSpec(),
        "small": PartitionSpec(),
        "embed": PartitionSpec("fsdp"),
    }


def test_the_first_rule_that_matches_counts():
    assert specs(("embed", 1), LARGEST)["embed"] == PartitionSpec(None, "fsdp")
    assert specs(("emb.*", "replicated"), LARGEST)["embed"] == PartitionSpec()
    assert specs(("small", 0), LARGEST)["small"] == PartitionSpec("fsdp")
    with pytest.raises(UserError, match=r"dimension 0 of odd \(5, 7\) cannot be split into 4"):
        specs(("odd", 0), LARGEST)
    with pytest.raises(UserError, match="no rule matches embed"):
        specs(("kernel", "largest"))


def test_without_shards_everything_is_replicated():
    found = specs(LARGEST, mesh=sharding.make_mesh(), min_size=1)
    assert set(found.values()) == {PartitionSpec()}


@pytest.mark.parametrize(
    ("data", "fsdp", "shape"), [(-1, 1, (8, 1)), (-1, 4, (2, 4)), (2, -1, (2, 4)), (1, 8, (1, 8))]
)
def test_minus_one_uses_the_remaining_devices(data, fsdp, shape):
    assert tuple(sharding.make_mesh(data, fsdp).shape.values()) == shape


@pytest.mark.parametrize(("data", "fsdp"), [(3, 1), (-1, 3), (-1, -1), (0, 8), (-1, 0), (4, 4)])
def test_a_mesh_that_is_not_all_devices_is_an_error(data, fsdp):
    with pytest.raises(
        UserError, match=rf"config.mesh.data={data} x config.mesh.fsdp={fsdp} is not .* devices, 8"
    ):
        sharding.make_mesh(data, fsdp)


@dataclasses.dataclass(frozen=True)
class MockDevice:
    """What arranging a mesh asks of a device; each slice has one process."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    platform: str = "cpu"
    device_kind: str = "cpu"
    core_on_chip: int = 0

    @property
    def process_index(self):
        return self.slice_index


def mock_slices(*sizes, **kind):
    """Slices of so many devices each, numbered in an order that mixes them, as jax does not."""
    devices = []
    for index, size in enumerate(sizes):
        for number in range(size):
            coords = (number % 2, number // 2, 0)
            devices.append(MockDevice(len(devices), index, coords, **kind))
    return devices[::2] + devices[1::2]


V5E = dict(platform="tpu", device_kind="TPU v5 lite")


@pytest.mark.parametrize("kind", [{}, dict(platform="gpu", device_kind="NVIDIA H100"), V5E])
@pytest.mark.parametrize("sizes", [(4, 4), (2, 2, 2, 2)])
@pytest.mark.parametrize("fsdp", [1, 2, 4, 8])
def test_shards_stay_inside_a_host_or_slice_as_far_as_they_fit(kind, sizes, fsdp):
    mesh = sharding.make_mesh(-1, fsdp, mock_slices(*sizes, **kind))
    assert mesh.devices.shape == (8 // fsdp, fsdp)
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
    assert len(set(mesh.devices.flat)) == 8
    for copy in mesh.devices:
        owners = [device.slice_index for device in copy]
        assert owners == sorted(owners)  # neighbors are on one host
        assert len(set(owners)) == max(1, fsdp // sizes[0])


@pytest.mark.parametrize(
    ("sizes", "fsdp", "slices_of_a_copy"),
    [
        ((3, 3), 2, 2),  # two hosts divide only `fsdp`: all shards of a copy are on different hosts
        ((6, 6, 6, 6), 4, 2),  # pairs of shards on a host
        ((4, 2), 2, 1),  # unequal hosts: one after the other
    ],
)
def test_hosts_that_do_not_divide_the_copies_have_a_mesh_too(sizes, fsdp, slices_of_a_copy):
    mesh = sharding.make_mesh(-1, fsdp, mock_slices(*sizes))
    assert len(set(mesh.devices.flat)) == sum(sizes)
    for copy in mesh.devices:
        assert len({device.slice_index for device in copy}) == slices_of_a_copy


def test_rows_keep_their_place_in_the_batch_wherever_a_process_has_its_devices():
    devices = [types.SimpleNamespace(process_index=owner) for owner in (0, 1, 1, 0)]
    mesh = types.SimpleNamespace(devices=np.array(devices).reshape(2, 2))
    assert sharding.batch_positions(mesh, 8).tolist() == [0, 1, 4, 5, 6, 7, 2, 3]
    expected = list(range(16))
    assert sharding.batch_positions(sharding.make_mesh(2, 4), 16).tolist() == expected


def test_the_recipe_names_every_option():
    config = tiny.get_config()
    assert (config.mesh.data, config.mesh.fsdp) == (-1, 1)
    assert (config.remat, config.scan_layers) == ("none", False)
