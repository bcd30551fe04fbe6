"""The mask samplers: their coverage, compared with an independent version of the official ones."""

import functools

import jax
import numpy as np
import pytest

from lmim_jax.methods.common import masking

GRID = (14, 14)
SCALE = (0.15, 0.2)
ASPECT = (0.75, 1.5)
CONTEXT = (0.85, 1.0)


def multiblock(group, biased=True, capacity=169):
    return masking.Multiblock(
        grid=GRID,
        blocks=4,
        scale=SCALE,
        aspect=ASPECT,
        context_scale=CONTEXT,
        capacity=capacity,
        min_context=10,
        group=group,
        biased=biased,
    )


@functools.cache
def draws(group, biased=True, batches=40, images=32):
    """Numpy views of many images, concatenated."""
    sample = jax.jit(multiblock(group, biased))
    keys = [jax.random.split(jax.random.key(1000 + i), images) for i in range(batches)]
    views = [jax.device_get(sample(jax.random.key(i), k)) for i, k in enumerate(keys)]
    return {name: np.concatenate([view[name] for view in views]) for name in views[0]}


def official_contexts(group, rng, batches):
    """Contexts as the released sampler draws them: bool [batches, N], one image of each group.

    Written from its description: one draw sets scale and aspect, sizes are shared by the group,
    starts never reach the last place, contexts are truncated to the shortest of the group in raster
    order.
    """
    height, width = GRID

    def size(scale, aspect):
        u = rng.random()
        area = int(height * width * (scale[0] + u * (scale[1] - scale[0])))
        ratio = aspect[0] + u * (aspect[1] - aspect[0])
        return min(round((area * ratio) ** 0.5), height - 1), min(
            round((area / ratio) ** 0.5), width - 1
        )

    def block(h, w):
        out = np.zeros(GRID, bool)
        top = rng.integers(0, height - h)
        left = rng.integers(0, width - w)
        out[top : top + h, left : left + w] = True
        return out

    def image(target_size, context_size):
        targets = np.any([block(*target_size) for _ in range(4)], axis=0)
        while True:
            context = block(*context_size) & ~targets
            if context.sum() > 10:
                return np.flatnonzero(context)

    out = np.zeros((batches, height * width), bool)
    for row in out:
        target_size = size(SCALE, ASPECT)
        context_size = size(CONTEXT, (1, 1))
        contexts = [image(target_size, context_size) for _ in range(group)]
        row[contexts[0][: min(map(len, contexts))]] = True
    return out


def coverage(index, mask):
    """How often each patch is drawn, [N]."""
    return np.bincount(index[mask], minlength=GRID[0] * GRID[1]) / len(index)


# Published simulation of the released sampler on a 14 x 14 grid: images per group -> mean context
@pytest.mark.parametrize(("group", "expected"), [(1, 81), (16, 59), (128, 50)])
def test_multiblock_contexts_are_as_long_as_the_official_ones(group, expected):
    lengths = draws(group)["visible_mask"].sum(axis=1)
    assert (
        abs(lengths.mean() - expected) < 2.5
    )  # sizes are shared by a batch of 32: 40 independent ones
    targets = draws(group)["target_mask"].sum(axis=2)
    assert set(np.unique(targets)) <= set(range(30, 41))
    assert abs(targets.mean() - 33.5) < 1


def test_multiblock_covers_the_grid_as_the_official_sampler_does():
    view = draws(16)
    ours = coverage(view["visible"], view["visible_mask"])
    theirs = official_contexts(16, np.random.default_rng(0), 1500)
    error = np.sqrt(0.25 / 1500 + 0.25 / len(view["visible"]))
    assert np.abs(ours - theirs.mean(axis=0)).max() < 5 * error
    rows = ours.reshape(GRID).mean(axis=1)
    assert rows[0] > 0.7
    assert rows[-1] == 0
    assert (ours.reshape(GRID)[:, -1] == 0).all()


@pytest.mark.parametrize("biased", [True, False])
def test_multiblock_targets_are_blocks_that_the_context_avoids(biased):
    view = draws(16, biased)
    for i in range(64):
        context = view["visible"][i][view["visible_mask"][i]]
        assert len(set(context)) == len(context) > 10
        for index, mask in zip(view["targets"][i], view["target_mask"][i], strict=True):
            rows, columns = np.divmod(index[mask], GRID[1])
            assert (
                mask.sum()
                == len(set(rows)) * len(set(columns))
                == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
            )
            assert not set(index[mask]) & set(context)


def test_unbiased_multiblock_reaches_every_patch_and_varies_per_image():
    view = draws(16, biased=False)
    assert (coverage(view["visible"], view["visible_mask"]) > 0.05).all()
    targets = coverage(
        view["targets"].reshape(-1, view["targets"].shape[2]),
        view["target_mask"].reshape(-1, view["targets"].shape[2]),
    )
    assert (targets > 0).all()
    assert len(np.unique(view["target_mask"][:32].sum(axis=2)[:, 0])) > 3


def test_the_default_capacity_is_hardly_ever_short():
    lengths = draws(128, batches=150, images=4)["visible_mask"].sum(axis=1)
    assert lengths.max() <= 72
    shorter = jax.jit(multiblock(128, capacity=20))(
        jax.random.key(0), jax.random.split(jax.random.key(1), 4)
    )
    assert shorter["visible"].shape == (4, 20)
    assert shorter["visible_mask"].all()


@pytest.mark.parametrize("name", ["checkerboard", "checkerboard2"])
def test_checkerboards_halve_the_grid_and_swap(name):
    split = jax.jit(lambda key: masking.SAMPLERS[name](key, (8, 4), 0.5))
    cell = 2 if name.endswith("2") else 1
    seen = set()
    for i in range(20):
        visible, masked = split(jax.random.key(i))
        assert sorted([*visible, *masked]) == list(range(32))
        rows, columns = np.divmod(np.asarray(visible), 4)
        colors = set((rows // cell + columns // cell) % 2)
        assert len(colors) == 1
        seen |= colors
    assert seen == {0, 1}
    with pytest.raises(ValueError, match=r"mask_ratio 0\.5"):
        masking.SAMPLERS[name](jax.random.key(0), (8, 4), 0.75)


def test_the_highest_ratio_leaves_one_patch_visible():
    for patches in range(2, 120):  # (1 - ratio) times some of these is just below 1
        split = functools.partial(
            masking.SAMPLERS["random"], grid=(1, patches), mask_ratio=1 - 1 / patches
        )
        visible, masked = jax.eval_shape(split, jax.random.key(0))
        assert (visible.shape, masked.shape) == ((1,), (patches - 1,))
