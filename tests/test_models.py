"""Patches, positions, precision."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmim_jax.models import attention, blocks, layers
from lmim_jax.models.vit import ViT, features


@settings(max_examples=20, deadline=None)
@given(h=st.integers(1, 5), w=st.integers(1, 5), p=st.integers(1, 4), channels=st.integers(1, 5))
def test_unpatchify_undoes_patchify(h, w, p, channels):
    shape = (2, h * p, w * p, channels)
    images = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    patches = layers.patchify(images, (h, w), p)
    assert patches.shape == (2, h * w, p * p * channels)
    np.testing.assert_array_equal(layers.unpatchify(patches, (h, w), p), images)


@settings(max_examples=10, deadline=None)
@given(
    h=st.integers(1, 3),
    w=st.integers(1, 3),
    p=st.integers(1, 3),
    gap=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_windows_are_cut_at_their_offsets(h, w, p, gap, seed):
    rng = np.random.default_rng(seed)
    cell = p + gap
    images = rng.normal(size=(2, h * cell, w * cell, 3)).astype(np.float32)
    offsets = rng.integers(0, gap, (2, h, w, 2))
    patches = np.asarray(layers.patchify(images, (h, w), p, gap, offsets))
    for b, r, c in np.ndindex(2, h, w):
        top = r * cell + offsets[b, r, c, 0]
        left = c * cell + offsets[b, r, c, 1]
        window = images[b, top : top + p, left : left + p]
        np.testing.assert_array_equal(patches[b, r * w + c], window.ravel())


def test_patchify_rejects_an_image_that_does_not_fit():
    with pytest.raises(ValueError, match=r"30 x 28 pixels does not fit a grid of 7 x 7 cells of 4"):
        layers.patchify(np.zeros((1, 30, 28, 3)), (7, 7), 4)


def test_positions_of_a_wide_grid_follow_rows_and_columns():
    table = layers.sincos_positions((2, 3), 16).reshape(2, 3, 16)
    assert (table[0, :, :8] == table[1, :, :8]).all()  # the first half depends on the column only
    assert (table[:, 0, 8:] == table[:, 2, 8:]).all()  # the second on the row only
    assert len(np.unique(table.reshape(6, 16), axis=0)) == 6


def test_positions_at_another_size_span_the_trained_range():
    trained = layers.sincos_positions((14, 14), 32, (14, 14))
    finer = layers.sincos_positions((27, 27), 32, (14, 14))
    every_second = finer.reshape(27, 27, 32)[::2, ::2].reshape(-1, 32)
    np.testing.assert_allclose(every_second, trained, atol=1e-6)


def test_gelu_is_exact():
    x = np.linspace(-4, 4, 101, dtype=np.float32)
    expected = [0.5 * v * (1 + math.erf(v / 2**0.5)) for v in x]
    np.testing.assert_allclose(layers.gelu(x), expected, atol=1e-6)


def vit(dtype="float32"):
    return ViT(
        width=32,
        depth=2,
        heads=4,
        mlp_ratio=4.0,
        norm_eps=1e-6,
        dtype=jnp.dtype(dtype),
        attention="xla",
    )


def test_attention_equals_the_textbook():
    rng = np.random.default_rng(0)
    query = rng.normal(size=(2, 5, 3, 8)).astype(np.float32)
    key = rng.normal(size=(2, 7, 3, 8)).astype(np.float32)
    value = rng.normal(size=(2, 7, 3, 8)).astype(np.float32)
    scores = np.einsum("btad,bsad->bats", query, key) / 8**0.5
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    expected = np.einsum("bats,bsad->btad", weights, value)
    found = attention.attend(query, key, value, "xla")
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(attention.attention_weights(query, key), weights, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 0.03)])
def test_attention_and_its_gradients_equal_those_of_jax(dtype, tolerance, masked):
    rng = np.random.default_rng(0)
    query = jnp.asarray(rng.normal(size=(2, 5, 2, 4)), dtype)
    key = jnp.asarray(rng.normal(size=(2, 7, 2, 4)), dtype)
    value = jnp.asarray(rng.normal(size=(2, 7, 2, 4)), dtype)
    mask = None
    jax_mask = None
    if masked:
        mask = jnp.arange(7)[None] < jnp.array([[7], [3]])
        jax_mask = mask[:, None, None]

    def ours(query, key, value):
        return attention.attend(query, key, value, "xla", mask)

    def theirs(query, key, value):
        return jax.nn.dot_product_attention(query, key, value, mask=jax_mask)

    def output_and_gradients(attend):
        def loss(query, key, value):
            return jnp.sum(jnp.sin(attend(query, key, value).astype(jnp.float32)))

        gradients = jax.grad(loss, argnums=(0, 1, 2))(query, key, value)
        return [attend(query, key, value), *gradients]

    pairs = zip(output_and_gradients(ours), output_and_gradients(theirs), strict=True)
    for found, expected in pairs:
        assert found.dtype == dtype
        np.testing.assert_allclose(np.float32(found), np.float32(expected), atol=tolerance)


def cross_attention(qkv_bias):
    return blocks.CrossAttention(
        heads=4, dtype=jnp.dtype("float32"), implementation="xla", qkv_bias=qkv_bias
    )


def test_a_missing_bias_equals_a_bias_of_zero():
    # 10 wide, in 4 heads of 2
    x = np.random.default_rng(0).normal(size=(2, 5, 10)).astype(np.float32)
    context = x[:, :, :6]
    without_key_bias = cross_attention((True, False, True))
    params = without_key_bias.init(jax.random.key(0), x, context)["params"]
    kernel = params["kv"]["kernel"]
    assert kernel.shape == (6, 16)
    value_bias = np.arange(8, dtype=np.float32)
    params["kv"]["bias"] = value_bias
    found = without_key_bias.apply({"params": params}, x, context)

    full_bias = np.concatenate([np.zeros(8, np.float32), value_bias])
    full_params = dict(params, kv={"kernel": kernel, "bias": full_bias})
    expected = cross_attention(True).apply({"params": full_params}, x, context)
    np.testing.assert_array_equal(found, expected)


def test_attention_without_bias_has_no_bias_parameter():
    unbiased = blocks.Attention(
        heads=2, dtype=jnp.dtype("float32"), implementation="xla", qkv_bias=False
    )
    params = unbiased.init(jax.random.key(0), np.zeros((2, 5, 10), np.float32))["params"]
    assert params["qkv"].keys() == {"kernel"}


def test_bfloat16_computes_in_bfloat16_with_float32_parameters():
    patches = np.ones((2, 6, 12), np.float32)
    positions = np.ones((1, 6, 32), np.float32)
    params = vit("bfloat16").init(jax.random.key(0), patches, positions)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    tokens, prenorm = vit("bfloat16").apply(params, patches, positions)
    assert tokens.dtype == prenorm.dtype == jnp.bfloat16
    text = jax.jit(vit("bfloat16").apply).lower(params, patches, positions).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert products
    for line in products:
        arguments, _ = line.split("->")
        assert "bf16" in arguments
        assert "xf32" not in arguments.split(" : ")[-1]


def test_registers_take_part_and_are_left_out():
    patches = np.random.default_rng(0).normal(size=(2, 6, 12)).astype(np.float32)
    positions = np.ones((1, 6, 32), np.float32)
    encoder = vit().clone(registers=4)
    params = encoder.init(jax.random.key(0), patches, positions)
    assert params["params"]["registers"].shape == (1, 4, 32)
    tokens, prenorm = encoder.apply(params, patches, positions)
    kept, _ = encoder.apply(params, patches, positions, keep_registers=True)
    assert tokens.shape == prenorm.shape == (2, 7, 32)
    np.testing.assert_array_equal(tokens, jnp.delete(kept, jnp.arange(1, 5), axis=1))
    params["params"]["registers"] += 1.0
    assert not np.allclose(encoder.apply(params, patches, positions)[0], tokens)

    found = features(encoder, params["params"], patches, positions)
    assert found["registers"].shape == (2, 4, 32)
    assert found["block01/tokens"].shape == (2, 7, 32)
    np.testing.assert_array_equal(found["block01/tokens"][:, 1:], found["patches_prenorm"])
    assert found["block01/attention"].shape == (2, 4, 7, 7)
    assert (found["block01/attention"].sum(-1) < 1).all()

    mask = np.broadcast_to(np.arange(9) < 6, (2, 9))
    padded = np.pad(patches, ((0, 0), (0, 3), (0, 0)), constant_values=9.0)
    places = np.ones((1, 9, 32), np.float32)
    shown = features(encoder, params["params"], padded, places, mask)
    np.testing.assert_allclose(shown["patches"][:, :6], found["patches"], atol=1e-5)


def test_tokens_do_not_depend_on_other_images():
    patches = np.random.default_rng(0).normal(size=(3, 6, 12)).astype(np.float32)
    positions = np.ones((1, 6, 32), np.float32)
    params = vit().init(jax.random.key(0), patches, positions)
    changed = patches.copy()
    changed[0] = 0
    before = np.asarray(vit().apply(params, patches, positions)[0])
    after = np.asarray(vit().apply(params, changed, positions)[0])
    np.testing.assert_array_equal(before[1:], after[1:])
    assert not np.allclose(before[0], after[0])


def test_hyperparameters_are_given_by_keyword():
    with pytest.raises(TypeError, match="positional"):
        ViT(32, 2, 4, 4.0, 1e-6, jnp.dtype("float32"), "xla")
