"""What is traced for GPUs and TPUs: fused attention, separate projections, precision."""

import contextlib
import functools
import importlib
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from lmim_jax.data.augment import device
from lmim_jax.distributed import sharding
from lmim_jax.methods.common import losses
from lmim_jax.models import (
    attention,
    cudnn_attention,
    gpu_attention,
    layers,
    packed_attention,
    tpu_attention,
)
from lmim_jax.models.blocks import Attention, CrossAttention
from lmim_jax.perf import aot, program_stats
from lmim_jax.utils.errors import UserError
from lmim_jax.utils.platform import current_platform, tracing_for

RNG = np.random.default_rng(0)


def normal(*shape, dtype=jnp.float32):
    return jnp.asarray(RNG.normal(size=shape), dtype)


@pytest.fixture
def cudnn(monkeypatch):
    """As if a cuDNN for a Hopper GPU were there."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda version: True)
    monkeypatch.setattr(
        fused_attention_stablehlo, "is_cuda_compute_capability_equal", lambda version: False
    )
    # The check of odd lengths is replaced once in a process; put it back afterwards
    check = fused_attention_stablehlo.check_is_flash_attention
    monkeypatch.setattr(fused_attention_stablehlo, "check_is_flash_attention", check)
    cudnn_attention._allow_odd_lengths.cache_clear()
    yield
    cudnn_attention._allow_odd_lengths.cache_clear()


def test_the_platform_is_that_of_the_scope():
    assert current_platform() == "cpu"
    with tracing_for("cuda"):
        assert current_platform() == "gpu"
        with tracing_for("tpu"):
            assert current_platform() == "tpu"
    assert current_platform() == "cpu"


def lower_for_gpu(tokens, context, head_width, dtype, implementation="auto", masked=False):
    """The StableHLO for CUDA of attention and its gradient."""
    query = jax.ShapeDtypeStruct((2, tokens, 2, head_width), dtype)
    key = jax.ShapeDtypeStruct((2, context, 2, head_width), dtype)
    mask = jnp.ones((2, context), bool) if masked else None

    def loss(query, key, value):
        return attention.attend(query, key, value, implementation, mask).astype(jnp.float32).sum()

    with tracing_for("gpu"):
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(query, key, key)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("tokens", "context", "head_width", "dtype", "fused"),
    [
        (177, 177, 64, "bfloat16", True),  # odd lengths, as every recipe has them
        (177, 21, 32, "bfloat16", True),
        (196, 196, 64, "bfloat16", True),
        (21, 21, 64, "bfloat16", False),  # plain products are faster
        (177, 177, 42, "bfloat16", False),  # the kernel does not have such heads
        (177, 177, 64, "float32", False),
    ],
)
def test_auto_fuses_where_it_can_and_pays(cudnn, tokens, context, head_width, dtype, fused):
    text = lower_for_gpu(tokens, context, head_width, dtype)
    assert ("__cudnn$fmhaSoftmax" in text) == fused
    assert ("__cudnn$fmhaSoftmaxBackward" in text) == fused


@pytest.mark.parametrize("tokens", [72, 73])
def test_a_mask_is_given_as_a_bias_of_even_size(cudnn, tokens):
    text = lower_for_gpu(tokens, tokens, 64, "bfloat16", implementation="cudnn", masked=True)
    assert "__cudnn$fmhaScaleBiasSoftmaxBackward" in text


def test_auto_is_plain_where_there_is_no_cudnn_and_says_so_once(caplog):
    cudnn_attention.warn_unavailable.cache_clear()
    with caplog.at_level("WARNING"):
        assert "__cudnn" not in lower_for_gpu(177, 177, 64, "bfloat16")
        assert "__cudnn" not in lower_for_gpu(197, 197, 64, "bfloat16")
    assert caplog.text.count("jax finds no cuDNN on this GPU") == 1


METHOD = dict(attention="cudnn", dtype="bfloat16", width=768, heads=12)


def test_nothing_is_fused_among_deterministic_kernels(cudnn, monkeypatch):
    """XLA fails to compile the fused kernel with this flag."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_exclude_nondeterministic_ops=true")
    assert "__cudnn" not in lower_for_gpu(177, 177, 64, "bfloat16")
    with tracing_for("gpu"):
        attention.check_fused({**METHOD, "attention": "auto"})
        with pytest.raises(UserError, match=r"attention=cudnn needs config\.deterministic=False"):
            attention.check_fused(METHOD)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(dtype="float32"), "needs config.method.dtype=bfloat16, not float32"),
        (dict(decoder_width=512, decoder_heads=12), "decoder_width / decoder_heads"),
    ],
)
def test_cudnn_that_cannot_be_is_refused(cudnn, change, message):
    with tracing_for("gpu"):
        attention.check_fused(METHOD)
        attention.check_fused({**METHOD, **change, "attention": "auto"})
        with pytest.raises(UserError, match=message):
            attention.check_fused({**METHOD, **change})


def test_cudnn_without_a_gpu_is_refused():
    with pytest.raises(
        UserError, match="attention=cudnn needs an NVIDIA GPU, and the devices here"
    ):
        attention.check_fused(METHOD)
    with tracing_for("gpu"), pytest.raises(UserError, match="needs cuDNN"):
        attention.check_fused(METHOD)


@pytest.mark.parametrize("qkv_bias", [True, (True, False, True)])
def test_projections_in_parts_equal_the_fused_one(qkv_bias):
    x, context = normal(2, 5, 16), normal(2, 3, 8)
    options = dict(heads=4, dtype=jnp.float32, implementation="xla", qkv_bias=qkv_bias)
    for module, inputs in (
        (Attention(**options), (x,)),
        (CrossAttention(**options), (x, context)),
    ):
        params = module.init(jax.random.key(0), *inputs)
        params = jax.tree.map(lambda leaf: normal(*leaf.shape), params)
        one = module.apply(params, *inputs)
        with tracing_for("gpu"):
            parts = module.apply(params, *inputs)
            fresh = module.init(jax.random.key(0), *inputs)
        np.testing.assert_allclose(parts, one, rtol=1e-5, atol=1e-4)
        assert jax.tree.structure(fresh) == jax.tree.structure(params)


def test_gelu_and_its_gradient_equal_those_in_float64():
    from scipy.special import ndtr

    x = np.linspace(-9, 9, 1001)
    expected = x * ndtr(x)
    slope = ndtr(x) + x * np.exp(-x * x / 2) / np.sqrt(2 * np.pi)
    x32 = jnp.asarray(x, jnp.float32)
    np.testing.assert_allclose(layers.gelu_float32(x32), expected, rtol=2e-6, atol=1e-6)
    gradient = jax.grad(lambda x: layers.gelu_float32(x).sum())(x32)
    np.testing.assert_allclose(gradient, slope, rtol=2e-6, atol=1e-6)
    half = layers.gelu_float32(x32.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), expected, rtol=1e-2, atol=4e-2)


RECIPES = ("vit_b", "mae_vit_b", "pilamim_vit_b", "ijepa_vit_b", "bootmae_vit_b")


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("name", RECIPES)
def test_float32_products_of_a_step_are_computed_in_float32(cudnn, name, platform):
    """The lowered program names the precision: default products of float32 are TF32 or bfloat16."""
    config = importlib.import_module(f"lmim_jax.configs.{name}").get_config()
    config.batch_size = 2
    for key in config.method:
        if key.endswith("depth"):
            config.method[key] = 1
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    parts = aot.build_for_images(config, images=100)
    with tracing_for(platform):
        step, arguments = aot.abstract_step(parts, mesh)
        lowered = step.trace(*arguments).lower(lowering_platforms=(platform,))
    found = program_stats.lowered_stats(lowered)
    assert found["products"] > 20
    assert bool(found["float32_products"]) == (name == "vit_b")  # its cues and its logits
    assert found["imprecise_products"] == {}


def rounded(precision):
    """A matrix product at a simulated precision: operands keep so many bits of their mantissa."""
    bits = {"tf32": 13, "bfloat16": 16}[precision]

    def cut(x):
        x = jnp.asarray(x, jnp.float32)
        as_bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
        half = jnp.uint32(1 << (bits - 1))
        as_bits = (as_bits + half) >> bits << bits
        return jax.lax.bitcast_convert_type(as_bits, jnp.float32)

    real = jnp.einsum

    def einsum(equation, *operands, precision=None, **options):
        if precision is None and all(x.dtype == jnp.float32 for x in operands):
            operands = [cut(x) for x in operands]
        return real(equation, *operands, precision=precision, **options)

    return einsum


@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_crops_stay_within_one_level_where_default_products_are_rounded(monkeypatch, precision):
    coarse = RNG.integers(0, 256, (40, 40, 3)).repeat(8, 0).repeat(8, 1)
    image = np.clip(coarse + RNG.integers(-20, 20, coarse.shape), 0, 255).astype(np.uint8)
    box = (13, 7, 251, 290)

    def crop():
        return np.asarray(device.crop_resize(jnp.asarray(image), box, (112, 96), device.bicubic))

    expected = crop()
    monkeypatch.setattr(jnp, "einsum", rounded(precision))
    with tracing_for("gpu"):
        found = crop()
    assert np.abs(found - expected).max() <= 1
    assert (found != expected).mean() < 0.01


@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_infonce_is_exact_where_default_products_are_rounded(monkeypatch, precision):
    predictions, targets = normal(2, 30, 64), normal(2, 30, 64)

    def loss():
        logits = losses.discrimination_logits(predictions, targets, 0.2)
        return losses.patch_infonce(logits, 0.2)

    expected = loss()
    monkeypatch.setattr(jnp, "einsum", rounded(precision))
    np.testing.assert_allclose(loss(), expected, rtol=1e-5)


@contextlib.contextmanager
def kernels_of(platform):
    """Trace for a platform, and interpret its kernels."""
    interpreted = functools.partial(gpu_attention.pl.pallas_call, interpret=True)
    pallas = mock.Mock(wraps=gpu_attention.pl, pallas_call=interpreted)
    mode = mock.patch.object(gpu_attention, "pl", pallas)
    if platform == "tpu":
        mode = pltpu.force_tpu_interpret_mode()
    with tracing_for(platform), mode:
        yield


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_layers_with_packed_attention_equal_plain_ones(platform):
    """Self- and cross-attention with their gradients, of heads that lie side by side."""
    x, context = normal(2, 21, 32), normal(2, 3, 8)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    for module, inputs in ((Attention, (x,)), (CrossAttention, (x, context))):
        layer = module(heads=2, dtype=jnp.bfloat16, implementation="auto")
        params = layer.init(jax.random.key(0), *inputs)

        def loss(params, *inputs, layer=layer):
            return jnp.square(layer.apply(params, *inputs).astype(jnp.float32)).sum()

        step = jax.value_and_grad(loss, argnums=(0, 1))
        plain = step(params, *inputs)
        on_device = jax.shard_map(
            step, mesh=mesh, in_specs=P(), out_specs=(P(), (P(), P())), check_vma=False
        )
        with kernels_of(platform):
            # XLA cannot split the kernel over devices
            assert "pallas_call" not in str(jax.make_jaxpr(layer.apply)(params, *inputs))
            assert "pallas_call" in str(jax.make_jaxpr(on_device)(params, *inputs))
            fused = jax.jit(on_device)(params, *inputs)
        for found, expected in zip(jax.tree.leaves(fused), jax.tree.leaves(plain), strict=True):
            error = jnp.linalg.norm(jnp.ravel(found - expected))
            assert error < 1e-2 * jnp.linalg.norm(jnp.ravel(expected))


@pytest.mark.parametrize(
    ("tokens", "context", "head_width", "separate"),
    [
        (37, 21, 16, True),
        (33, 130, 64, False),
        pytest.param(21, None, 32, False, marks=pytest.mark.slow),
        pytest.param(70, None, 16, False, marks=pytest.mark.slow),
        pytest.param(177, None, 64, False, marks=pytest.mark.slow),
    ],
)
def test_the_kernels_for_gpus_equal_plain_attention(tokens, context, head_width, separate):
    """Numbers of tokens that are no multiples of those of a program, several programs an image."""
    heads = 2
    width = heads * head_width
    shapes = [(2, tokens, 3 * width)]
    places = ((0, 0), (0, width), (0, 2 * width))
    if context is not None:
        shapes = [(2, tokens, width), (2, context, 2 * width)]
        places = ((0, 0), (1, 0), (1, width))
    if separate:  # keys and values are arrays of their own
        shapes = [shapes[0], *2 * [(2, context, width)]]
        places = ((0, 0), (1, 0), (2, 0))
    arrays = tuple(normal(*shape).astype(jnp.bfloat16) for shape in shapes)

    def plain(arrays):
        parts = []
        for index, start in places:
            part = arrays[index][..., start : start + width].astype(jnp.float32)
            parts.append(part.reshape(2, -1, heads, head_width))
        return attention.attend(*parts, "xla").reshape(2, tokens, width)

    def fused(arrays):
        return packed_attention.attend(arrays, places, heads)

    dy = normal(2, tokens, width)
    expected, backward = jax.vjp(plain, arrays)
    with kernels_of("gpu"):
        found, fused_backward = jax.vjp(fused, arrays)
        gradients = fused_backward(dy.astype(jnp.bfloat16))
        np.testing.assert_array_equal(fused(arrays), found)  # without gradients
    pairs = [(found, expected), *zip(gradients[0], backward(dy)[0], strict=True)]
    for ours, theirs in pairs:
        error = jnp.linalg.norm(ours.astype(jnp.float32) - theirs.astype(jnp.float32))
        assert error < 6e-3 * jnp.linalg.norm(theirs.astype(jnp.float32))


@pytest.mark.parametrize(
    ("platform", "capability", "context", "head_width", "fits"),
    [
        ("gpu", "9.0", 177, 64, True),
        ("gpu", "9.0", 256, 64, True),
        ("gpu", "9.0", 257, 32, False),
        ("gpu", "9.0", 21, 80, False),  # no power of 2
        ("gpu", "9.0", 21, 8, False),  # narrower than the matrix units
        ("gpu", "8.0", 128, 128, True),
        ("gpu", "8.0", 129, 128, False),
        ("gpu", "8.9", 177, 64, False),  # little shared memory
        ("gpu", "8.9", 177, 32, True),
        ("gpu", "7.5", 21, 64, False),
        ("gpu", "gfx942", 21, 64, False),
        ("cpu", None, 177, 64, True),  # compiled ahead of time
    ],
)
def test_the_kernels_for_gpus_are_used_where_keys_fit(
    monkeypatch, platform, capability, context, head_width, fits
):
    gpu = mock.Mock(platform=platform, compute_capability=capability)
    monkeypatch.setattr(jax, "devices", lambda: [gpu])
    found = gpu_attention._compute_capability.__wrapped__()
    monkeypatch.setattr(gpu_attention, "_compute_capability", lambda: found)
    assert gpu_attention.fits(context, head_width) == fits


@pytest.mark.parametrize(
    ("tokens", "context", "width", "fits"),
    [
        (177, 177, 768, True),
        (177, 21, 512, True),
        (257, 257, 1280, True),  # ViT-H/14; compiled for a v5e
        (393, 393, 1024, False),  # it does not compile
        (577, 577, 768, False),  # it does not compile
    ],
)
def test_the_kernel_for_tpus_is_used_where_images_fit(tokens, context, width, fits):
    assert tpu_attention.fits(tokens, context, width) == fits


def test_windows_of_patches_on_tpus_equal_gathered_ones():
    images = normal(2, 12, 18, 3)
    offsets = jnp.asarray(RNG.integers(0, 3, size=(2, 2, 3, 2)))
    expected = layers.patchify(images, (2, 3), 4, 2, offsets)
    with tracing_for("tpu"):
        text = str(jax.make_jaxpr(lambda x: layers.patchify(x, (2, 3), 4, 2, offsets))(images))
        found = layers.patchify(images, (2, 3), 4, 2, offsets)
    assert "gather" not in text
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("mean", "deviation"), [(20, 1e-3), (30, 1e-3), (100, 1e-2)])
def test_the_gradient_of_layer_norm_is_finite_for_nearly_constant_tokens(mean, deviation):
    x = mean + deviation * normal(64, 32)
    params = {"params": {"scale": jnp.ones(32), "bias": jnp.zeros(32)}}
    with tracing_for("gpu"):
        norm = layers.layer_norm(1e-6, jnp.float32, "norm")
        grads = jax.grad(lambda p, x: norm.apply(p, x).sum(), argnums=(0, 1))(params, x)
    for leaf in jax.tree.leaves(grads):
        assert jnp.isfinite(leaf).all()


def test_layer_norm_on_accelerators_equals_flax():
    x = normal(3, 5, 32) + 1
    params = {"params": {"scale": normal(32), "bias": normal(32)}}
    weights = normal(3, 5, 32)

    def loss(params, x):
        norm = layers.layer_norm(1e-6, jnp.float32, "norm")
        return (norm.apply(params, x) * weights).sum()

    step = jax.value_and_grad(loss, argnums=(0, 1))
    expected = step(params, x)
    with tracing_for("gpu"):
        assert isinstance(layers.layer_norm(1e-6, jnp.float32, "norm"), layers.LayerNorm)
        found = step(params, x)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
