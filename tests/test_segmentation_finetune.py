"""Segmentation by trained heads: masks as a channel, windows, classes of pixels, training."""

import csv
import io
import types

import annotated
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from test_detection import Linear, weights

from lmim_jax.data import decode
from lmim_jax.data.eval import segmentation_sets
from lmim_jax.data.eval.mask_channel import VOID, WithMask
from lmim_jax.data.eval.segmentation_sets import Labels
from lmim_jax.evaluators import segmentation_finetune
from lmim_jax.models import pyramid
from lmim_jax.utils.errors import UserError

COLORS = np.array([(110, 110, 110), (230, 40, 40), (40, 60, 230)], np.uint8)
SMALL = dict(
    size=(32, 32), batch_size=8, total_steps=2, features=16, shown=2, ignore=(254,), drop_path=0.0
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """16 and 5 images of 48 x 40 pixels with rectangles of two colors; a border is ignored."""
    root = tmp_path_factory.mktemp("segments")
    rng = np.random.default_rng(0)
    for split, count in (("train", 16), ("test", 5)):
        for i in range(count):
            mask = np.zeros((40, 48), np.uint8)
            for kind in (1, 2):
                top, left = rng.integers(0, 20, 2)
                mask[top : top + 18, left + 8 * kind : left + 8 * kind + 16] = kind
            noise = rng.integers(-10, 10, (40, 48, 3))
            path = root / split / "images" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((COLORS[mask] + noise).astype(np.uint8)).save(path)
            mask[0] = 254
            annotated.save(root / split / "masks" / f"{i}.png", mask)
    return str(root)


def make(path, **change):
    return annotated.evaluator("segmentation_finetune", **{**SMALL, "path": path, **change})


def run(path, **change):
    data = annotated.evaluation(grid=(4, 4), patch_size=8)
    return make(path, **change).run(Linear(), weights(), data)


def test_masks_are_one_more_channel(dataset):
    source = segmentation_sets.open_split("folder", dataset, "train", 0)
    labels = Labels.from_options((2, 0, 1), (254,), (), "folder")
    for canvas, size in ((64, (40, 48)), (24, (20, 24))):
        records = WithMask(source, labels, canvas, 3, decode.DEFAULTS, 1.0)
        data, label = records.record(3)
        found = decode.decode(data, canvas, 4)
        assert found.shape == (*size, 4) and label == -1 and len(records) == 16
        pixels = decode.decode(source.record(3)[0], canvas, 3)
        np.testing.assert_array_equal(found[..., :3], pixels)
        mask = labels.read(source, 3, 1.0)
        step = 48 // size[1]
        assert set(np.unique(found[..., 3])) == ({0, 1, 2, VOID} if step == 1 else {0, 1, 2})
        if step == 1:
            np.testing.assert_array_equal(found[..., 3], np.where(mask < 0, VOID, mask))


class Pixels:
    """A method whose patches are pixels."""

    patch_size = 1


class Sees(segmentation_finetune.Evaluator):
    """Knows the classes: logits are the closeness of a patch's mean to each color."""

    def outputs(self, task, params, trained, images):
        side = task.method.patch_size
        batch, height, width, _ = images.shape
        cells = images.reshape(batch, height // side, side, width // side, side, 3).mean((2, 4))
        distance = cells[..., None, :] * 255 - jnp.asarray(COLORS, jnp.float32).reshape(
            1, 1, 1, 3, 3
        )
        return -jnp.square(distance).sum(-1) / 1e3


@pytest.mark.parametrize(
    ("size", "side"), [((40, 48), 0), ((100, 36), 0), ((20, 24), 0), ((40, 48), 80)]
)
def test_windows_cover_every_pixel_once_in_the_mean(size, side):
    fields = {**vars(make("", head="linear", short_side=side)), "step": 0.5, "size": (32, 32)}
    evaluator = Sees(**fields)
    data = annotated.evaluation(grid=(4, 4), patch_size=8)
    task = segmentation_finetune.DenseTask(Pixels(), evaluator.fit(Linear(), data), 3, 3)
    windows = segmentation_finetune._Windows(evaluator, task, {}, {}, data)
    mask = np.kron(np.random.default_rng(0).integers(0, 3, (5, 3)), np.ones((20, 16), int))
    mask = mask[: size[0], : size[1]]
    mask = np.pad(mask, [(0, size[0] - mask.shape[0]), (0, size[1] - mask.shape[1])])
    file = io.BytesIO()
    Image.fromarray(COLORS[mask]).save(file, "PNG")
    source = types.SimpleNamespace(record=lambda index: (file.getvalue(), -1))
    pixels = windows.read(source, 0)
    assert min(pixels.shape[:2]) == (side or min(size))
    found = windows.classify(pixels, size)
    assert found.shape == size
    if not side:
        np.testing.assert_array_equal(found, mask)
    assert (found == mask).mean() > 0.93
    tops, lefts = (sorted(set(part)) for part in zip(*windows._corners((100, 48)), strict=True))
    assert tops == [0, 16, 32, 48, 64, 68] and lefts == [0, 16]


def test_the_loss_counts_pixels_with_a_class():
    evaluator = make("", head="linear")
    data = annotated.evaluation(grid=(4, 4), patch_size=8)
    task = segmentation_finetune.DenseTask(Linear(), evaluator.fit(Linear(), data), 3, 3)
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 32, 32, 3)).astype(np.float32)
    classes = rng.integers(0, 3, (2, 32, 32)).astype(np.uint8)
    classes[0, :20] = VOID
    found = evaluator.loss(task, jnp.asarray(logits), jnp.asarray(classes))
    log_share = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = np.take_along_axis(log_share, np.minimum(classes, 2)[..., None], -1)[..., 0]
    assert float(found) == pytest.approx(-picked[classes != VOID].mean(), rel=1e-5)
    nothing = evaluator.loss(task, jnp.asarray(logits), jnp.full((2, 32, 32), VOID, jnp.uint8))
    assert float(nothing) == 0


def test_heads_have_the_resolution_they_say():
    x = jnp.zeros((1, 4, 6, 12))
    heads: list[tuple[nn.Module, tuple[int, ...]]] = [
        (pyramid.LinearSegmenter(5, jnp.float32), (1, 4, 6, 5)),
        (pyramid.PyramidSegmenter(5, 8, jnp.float32), (1, 16, 24, 5)),
    ]
    for head, shape in heads:
        found = jax.eval_shape(head.init_with_output, jax.random.key(0), x)[0]
        assert found.shape == shape


def test_bad_options_are_named(dataset):
    for change, message in (
        ({"head": "upernet"}, r"head='upernet' must be one of: linear \| pyramid"),
        ({"step": 0.0}, r"step=0.0 must be a share"),
        ({"size": (32, 30)}, r"size=\(32, 30\) must be height and width"),
        ({"classes": (0, 1)}, r"the numbers \[2\], which are neither in"),
        ({"layout": "vok"}, r"layout='vok' must be one of"),
        ({"test_split": "val"}, r"no images and masks of the split 'val'"),
    ):
        with pytest.raises(UserError, match=message):
            run(dataset, **change)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "frozen"), [("linear", True), ("linear", False), ("pyramid", False)]
)
def test_rectangles_are_learned(head, frozen, dataset):
    found = run(dataset, head=head, frozen=frozen, total_steps=150, base_lr=0.3, scale=(0.8, 1.2))
    least = 75 if head == "pyramid" else 45 if frozen else 55
    assert found["miou"] > least, found
    assert found["pixels"] > found["majority_pixels"] + 7
    rows = list(csv.DictReader(io.StringIO(found["classes"])))
    assert [row["class"] for row in rows] == ["0", "1", "2"]
    assert len(np.unique(found["segments"].reshape(-1, 3), axis=0)) > 20
