"""Clusters and classifiers of patches against masks; scenes; masks and folders of masks."""

import hashlib
import io
import itertools
import shutil

import annotated
import numpy as np
import pytest
from PIL import Image

from lmim_jax.data.eval import segmentation_masks
from lmim_jax.data.synthetic import drawing, scenes, shapes
from lmim_jax.distributed import sharding
from lmim_jax.evaluators import segmentation
from lmim_jax.evaluators.common import classifiers
from lmim_jax.utils.errors import UserError

MESH = sharding.make_mesh()

RNG = np.random.default_rng(0)
SMALL = dict(
    zoom=1,
    center=False,
    train_images=10,
    test_images=10,
    batch_size=8,
    l2=(1e-4, 1e-2),
    iterations=20,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """20 images of 32 x 32 pixels, whose level is the class 0 .. 3 of each 4 x 4 patch; masks."""
    root = tmp_path_factory.mktemp("masked")
    for i in range(20):
        cells = np.zeros((8, 8), int)
        cells[1:4, 1:4] = 1
        cells[5:8, 2:6] = 2
        cells[2:4, 5:8] = 3 * (i % 2)
        mask = np.kron(np.roll(cells, RNG.integers(0, 2, 2), (0, 1)), np.ones((4, 4), int))
        annotated.save(root / "images" / "sub" / f"{i:02d}.png", mask, annotated.STEP)
        annotated.save(root / "masks" / "sub" / f"{i:02d}.png", mask)
    annotated.save(root / "images" / "unmasked.png", mask)
    return {"images": str(root / "images"), "masks": str(root / "masks")}


def run(folders, method=None, data=None, **change):
    evaluator = annotated.evaluator("segmentation", **{**SMALL, **folders, **change})
    return evaluator.run(method or annotated.Sees(), {}, data or annotated.evaluation())


def test_perfect_features_score_100_and_shuffled_ones_do_not(folders):
    found = run(folders, clusters=(4, 5))
    names = {"miou4", "miou5", "knn_miou", "knn_accuracy", "linear_miou", "linear_accuracy"}
    assert found == {name: pytest.approx(100) for name in names}
    shuffled = run(folders, annotated.Sees(shuffled=True))
    assert shuffled["miou4"] < 35
    assert shuffled["linear_miou"] < 35


def test_masks_lie_on_images_that_exif_data_would_turn(folders, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(folders["images"], images)
    annotated.turn(images)
    data = annotated.evaluation(exif_orientation=True)
    found = run({**folders, "images": str(images)}, data=data)
    assert found["linear_miou"] == pytest.approx(100)


def test_padding_and_batch_size_change_no_metric(folders):
    assert run(folders, batch_size=8) == run(folders, batch_size=24)


def test_fewer_clusters_than_classes_lose_whole_classes(folders):
    # two of three or four classes found: the others score 0, and what is left over is background
    assert run(folders, clusters=(2,))["miou2"] < 75


def test_pixels_and_colors_serve_as_features(folders):
    assert run(folders, feature="histogram")["knn_accuracy"] == 100
    assert run(folders, feature="pixels")["linear_accuracy"] > 80


def test_matching_equals_the_best_of_all_pairings():
    """By hand and by brute force over all one-to-one pairings."""
    # 6 patches of 4 pixels; clusters 0 0 1 1 2 2, truth: background (8 pixels), class 1 (16 pixels)
    counts = np.array([[4, 0], [4, 0], [0, 4], [0, 4], [0, 4], [0, 4]])
    # cluster 2 is left over and becomes background: background 8 / 16, class 1: 8 / 16
    assert segmentation.matched_iou(np.array([0, 0, 1, 1, 2, 2]), counts, 0) == pytest.approx(0.5)
    assert segmentation.matched_iou(np.array([0, 0, 1, 1, 1, 1]), counts, 0) == 1
    assert segmentation.matched_iou(np.array([0, 0, 1, 1, 2, 2]), counts, None) == pytest.approx(
        (1 + 0.5) / 2
    )
    for _ in range(20):
        clusters = RNG.integers(0, 4, 30)
        truth = RNG.integers(0, 3, 30)
        table = np.array(
            [[np.sum((clusters == k) & (truth == c)) for c in range(3)] for k in range(4)]
        )
        overlap = table / (table.sum(1, keepdims=True) + table.sum(0) - table)
        pairings = list(itertools.permutations(range(4), 3))
        totals = [overlap[list(rows), range(3)].sum() for rows in pairings]
        best = pairings[int(np.argmax(totals))]
        label = np.zeros(4, int)
        label[list(best)] = range(3)
        found = label[clusters]
        expected = []
        for c in range(3):
            intersection = np.sum((found == c) & (truth == c))
            expected.append(intersection / np.sum((found == c) | (truth == c)))
        result = segmentation.matched_iou(clusters, np.eye(3, dtype=int)[truth], 0)
        assert result == pytest.approx(np.mean(expected))


def test_an_image_without_a_labeled_pixel_does_not_count():
    nothing = np.zeros((6, 3), int)
    assert np.isnan(segmentation.matched_iou(np.array([0, 0, 1, 1, 2, 2]), nothing, 0))


def test_ignored_pixels_count_for_nothing():
    maps = np.array([[[0, 0, 255, 255], [0, 0, 255, 1]]])
    assert segmentation.count_pixels(maps, [0, 1], 2).tolist() == [[[4, 0], [0, 1]]]
    counts = np.array([[4, 0], [0, 1]])
    assert segmentation.iou(np.array([0, 1]), counts).tolist() == [1, 1]
    assert segmentation.iou(np.array([0, 0]), counts).tolist() == [0.8, 0]


def test_neighbors_and_regression_equal_scikit_learn():
    neighbors = pytest.importorskip("sklearn.neighbors")
    linear_model = pytest.importorskip("sklearn.linear_model")
    labels = RNG.integers(0, 3, 120)
    x = (RNG.normal(size=(3, 6))[labels] + RNG.normal(size=(120, 6))).astype(np.float32)
    queries = RNG.normal(size=(50, 6)).astype(np.float32)
    reference = neighbors.KNeighborsClassifier(1, metric="cosine").fit(x, labels)
    by_neighbors = classifiers.predict_by_neighbors(
        x, labels, queries, k=1, num_classes=3, mesh=MESH
    )
    assert (by_neighbors == reference.predict(queries)).all()
    model = linear_model.LogisticRegression(C=1 / (1e-2 * 120), tol=1e-8, max_iter=1000)
    model.fit((x - x.mean(0)) / x.std(0), labels)
    by_regression = classifiers.predict_by_regression(
        x, labels, queries, num_classes=3, l2=(1e-2,), iterations=200, mesh=MESH
    )
    expected = model.predict((queries - x.mean(0)) / x.std(0))
    assert (by_regression.classes == expected).all()


def test_a_mask_lies_where_its_image_is():
    augment = annotated.evaluation().augment
    mask = RNG.integers(0, 3, (64, 96))  # twice as high: every second row and column of the middle
    found = segmentation_masks.resize_and_crop(mask, augment)
    np.testing.assert_array_equal(found, mask[1::2, 17:80:2])


def test_numbers_of_palette_and_gray_files():
    stream = io.BytesIO()
    image = Image.fromarray(np.array([[0, 1], [2, 255]], np.uint8)).convert("P")
    image.putpalette(list(range(255, -1, -1)) * 3)
    image.save(stream, format="PNG")
    assert segmentation_masks.decode_mask(stream.getvalue()).tolist() == [[0, 1], [2, 255]]
    stream = io.BytesIO()
    Image.fromarray(RNG.integers(0, 255, (4, 4, 3)).astype(np.uint8)).save(stream, format="PNG")
    with pytest.raises(segmentation_masks.BadImage, match="a mask in colors"):
        segmentation_masks.decode_mask(stream.getvalue())


def test_bad_input_is_named(folders, tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("no image")
    annotated.save(tmp_path / "other" / "z.png", np.zeros((8, 8), int))
    annotated.save(tmp_path / "one" / "z.png", np.zeros((8, 8), int))
    for change, message in (
        ({"images": "", "masks": ""}, "no masks.*set `images` and `masks`"),
        ({"images": str(tmp_path / "none")}, "images=.*is not a folder"),
        ({"masks": str(tmp_path / "text")}, "masks=.*no images in this folder"),
        ({"masks": str(tmp_path / "other")}, r"no mask in .* is named like an image"),
        ({"images": str(tmp_path / "one"), "masks": str(tmp_path / "other")}, "too few"),
        (
            {"feature": "cls"},
            "feature='cls' has no vector per patch; choices: patches, pixels, histogram",
        ),
    ):
        with pytest.raises(UserError, match=message) as error:
            run({**folders, **change})
        assert "\n" not in str(error.value)


def test_the_default_shapes_are_as_they_were():
    digest = hashlib.sha256()
    for split, index in (("train", 0), ("train", 1), ("train", 4097), ("test", 7)):
        picture, label, mask = shapes.draw(split, index)
        digest.update(picture.tobytes() + bytes([label]) + mask.tobytes())
    known = "3df280ed1460c699af1ff0177ba2c79ba875570ead90583482ccc6f5b8336d1e"
    assert digest.hexdigest() == known, (
        "other images under the same version: results no longer compare"
    )


def test_stills_show_what_they_say():
    stills = [scenes.draw_still("train", i) for i in range(40)]
    np.testing.assert_array_equal(stills[3][0], scenes.draw_still("train", 3)[0])
    assert (stills[3][0] != scenes.draw_still("test", 3)[0]).any()
    assert {count for _, _, count, _ in stills} == set(scenes.COUNTS)
    low, high = scenes.NEAREST
    assert all(low <= nearest <= high for *_, nearest in stills)
    for picture, mask, count, _ in stills:
        assert (picture.shape, mask.shape, mask.dtype) == ((64, 64, 3), (64, 64), np.uint8)
        assert 1 <= len(set(np.unique(mask)) - {0}) <= count
        assert mask.max() <= len(drawing.CLASSES)
    centers = scenes._draw_centers(np.random.default_rng(1), 5, 15.0)
    apart = np.linalg.norm(centers[:, None] - centers, axis=-1) + 99 * np.eye(5)
    assert apart.min() == pytest.approx(15.0)


def test_half_of_the_images_test_where_there_is_one_split(folders):
    data = annotated.evaluation()
    picked = segmentation_masks.open_images_with_masks(
        data, **folders, max_train=99, max_test=99, augment=data.augment
    ).sources
    assert (len(picked["train"]), len(picked["test"])) == (10, 10)
    assert not set(picked["train"].indices) & set(picked["test"].indices)
