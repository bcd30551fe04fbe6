"""Patches, positions, precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmim_jax.models import attention, blocks, layers
from lmim_jax.models.vit import ViT


@settings(max_examples=20, deadline=None)
@given(h=st.integers(1, 5), w=st.integers(1, 5), p=st.integers(1, 4), channels=st.integers(1, 5))
def test_unpatchify_undoes_patchify(h, w, p, channels):
    images = np.arange(2 * h * p * w * p * channels, dtype=np.float32).reshape(
        2, h * p, w * p, channels
    )
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
    rng, cell = np.random.default_rng(seed), p + gap
    images = rng.normal(size=(2, h * cell, w * cell, 3)).astype(np.float32)
    offsets = rng.integers(0, gap, (2, h, w, 2))
    patches = np.asarray(layers.patchify(images, (h, w), p, gap, offsets))
    for b, r, c in np.ndindex(2, h, w):
        top, left = r * cell + offsets[b, r, c, 0], c * cell + offsets[b, r, c, 1]
        np.testing.assert_array_equal(
            patches[b, r * w + c], images[b, top : top + p, left : left + p].ravel()
        )


def test_patchify_refuses_an_image_that_does_not_fit():
    with pytest.raises(ValueError, match=r"30 x 28 pixels does not fit a grid of 7 x 7 cells of 4"):
        layers.patchify(np.zeros((1, 30, 28, 3)), (7, 7), 4)


def test_positions_of_a_wide_grid_follow_rows_and_columns():
    table = layers.sincos_positions((2, 3), 16).reshape(2, 3, 16)
    assert (table[0, :, :8] == table[1, :, :8]).all()  # the first half depends on the column only
    assert (table[:, 0, 8:] == table[:, 2, 8:]).all()  # the second on the row only
    assert len(np.unique(table.reshape(6, 16), axis=0)) == 6


def test_positions_at_another_size_span_the_trained_range():
    trained, finer = (layers.sincos_positions(grid, 32, (14, 14)) for grid in ((14, 14), (27, 27)))
    np.testing.assert_allclose(
        finer.reshape(27, 27, 32)[::2, ::2].reshape(-1, 32), trained, atol=1e-6
    )


def test_gelu_is_exact():
    from math import erf

    x = np.linspace(-4, 4, 101, dtype=np.float32)
    expected = [0.5 * v * (1 + erf(v / 2**0.5)) for v in x]
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
    q, k, v = (rng.normal(size=(2, t, 3, 8)).astype(np.float32) for t in (5, 7, 7))
    scores = np.einsum("btad,bsad->bats", q, k) / 8**0.5
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    np.testing.assert_allclose(
        attention.attend(q, k, v, "xla"), np.einsum("bats,bsad->btad", weights, v), atol=1e-5
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 0.03)])
def test_attention_and_its_gradients_are_those_of_jax(dtype, tolerance):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, tokens, 2, 4)), dtype) for tokens in (5, 7, 7))
    mask = jnp.arange(7)[None] < jnp.array([[7], [3]])

    def value(attend):
        return lambda *qkv: jnp.sum(jnp.sin(attend(*qkv).astype(jnp.float32)))

    for ours, theirs in (
        (lambda *qkv: attention.attend(*qkv, "xla"), jax.nn.dot_product_attention),
        (
            lambda *qkv: attention.attend(*qkv, "xla", mask),
            lambda *qkv: jax.nn.dot_product_attention(*qkv, mask=mask[:, None, None]),
        ),
    ):
        for found, wanted in zip(
            (ours(q, k, v), *jax.grad(value(ours), (0, 1, 2))(q, k, v)),
            (theirs(q, k, v), *jax.grad(value(theirs), (0, 1, 2))(q, k, v)),
            strict=True,
        ):
            assert found.dtype == dtype
            np.testing.assert_allclose(np.float32(found), np.float32(wanted), atol=tolerance)


def test_a_bias_left_out_is_a_bias_of_zero():
    x = (
        np.random.default_rng(0).normal(size=(2, 5, 10)).astype(np.float32)
    )  # 10 wide in 4 heads of 2
    some, every = (
        blocks.CrossAttention(
            heads=4, dtype=jnp.dtype("float32"), implementation="xla", qkv_bias=on
        )
        for on in ((True, False, True), True)
    )
    params = some.init(jax.random.key(0), x, x[:, :, :6])["params"]
    assert params["kv"]["kernel"].shape == (6, 16)
    params["kv"]["bias"] = np.arange(8, dtype=np.float32)
    full = {
        **params,
        "kv": {**params["kv"], "bias": np.r_[np.zeros(8), np.arange(8)].astype(np.float32)},
    }
    first, second = (
        np.asarray(layer.apply({"params": p}, x, x[:, :, :6]))
        for layer, p in ((some, params), (every, full))
    )
    np.testing.assert_array_equal(first, second)
    unbiased = blocks.Attention(
        heads=2, dtype=jnp.dtype("float32"), implementation="xla", qkv_bias=False
    )
    params = unbiased.init(jax.random.key(0), x)["params"]
    assert params["qkv"].keys() == {"kernel"}


def test_bfloat16_computes_in_bfloat16_with_float32_parameters():
    patches, positions = np.ones((2, 6, 12), np.float32), np.ones((1, 6, 32), np.float32)
    params = vit("bfloat16").init(jax.random.key(0), patches, positions)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    tokens, prenorm = vit("bfloat16").apply(params, patches, positions)
    assert tokens.dtype == prenorm.dtype == jnp.bfloat16
    text = jax.jit(vit("bfloat16").apply).lower(params, patches, positions).as_text()
    dots = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert dots
    assert all(
        "bf16" in line.split("->")[0] and "xf32" not in line.split("->")[0].split(" : ")[-1]
        for line in dots
    )


def test_tokens_do_not_depend_on_other_images():
    rng = np.random.default_rng(0)
    patches, positions = (
        rng.normal(size=(3, 6, 12)).astype(np.float32),
        np.ones((1, 6, 32), np.float32),
    )
    params = vit().init(jax.random.key(0), patches, positions)
    changed = patches.copy()
    changed[0] = 0
    before, after = (np.asarray(vit().apply(params, x, positions)[0]) for x in (patches, changed))
    np.testing.assert_array_equal(before[1:], after[1:])
    assert not np.allclose(before[0], after[0])
