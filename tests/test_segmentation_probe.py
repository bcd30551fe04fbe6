"""Frozen segmentation on official splits: layouts, labels, the sample, pixels and figures."""

import csv
import io
import pathlib
import shutil
import zipfile

import annotated
import conftest
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from lmim_jax.configs import evaluate
from lmim_jax.data.augment.device import Squash
from lmim_jax.data.eval import segmentation_sets
from lmim_jax.data.eval.segmentation_sets import Labels
from lmim_jax.distributed import sharding
from lmim_jax.evaluators.common import classifiers, pixel_labels
from lmim_jax.evaluators.common.patch_sample import PatchSample
from lmim_jax.evaluators.common.pixel_labels import Confusion
from lmim_jax.report import segmentation_section
from lmim_jax.train.metric_writer import write_picture
from lmim_jax.utils.errors import UserError

REAL = pathlib.Path(conftest.ROOT).parent / "shared" / "data" / "camvid_small.zip"
SMALL = dict(
    layout="folder",
    batch_size=8,
    k=(1, 3),
    metric=("cosine", "l2"),
    c=(1.0, 100.0),
    iterations=30,
    upsampling="nearest",
    ignore=(255, 254),
    names=("ground", "tree", "car", "sign"),
    shown=2,
)
SIDES = ((4, 4), (6, 8), (8, 4), (5, 7))  # pixels of a patch in the files
METRICS = ("knn_miou", "knn_pixels", "linear_miou", "linear_pixels")


def draw(seed):
    """The class of each of 8 x 8 patches."""
    rng = np.random.default_rng(seed)
    cells = np.zeros((8, 8), int)
    cells[1:4, 1:4] = 1
    cells[5:8, 2:6] = 2
    cells[2:4, 5:8] = 3
    return np.roll(cells, rng.integers(0, 3, 2), (0, 1))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Splits of 12 and 8 images of four sizes, whose level is the class of each patch; masks."""
    root = tmp_path_factory.mktemp("dataset")
    for split, count in (("train", 12), ("test", 8)):
        for i in range(count):
            mask = np.kron(draw(i), np.ones(SIDES[i % 4], int))
            annotated.save(root / split / "images" / f"{i:02d}.png", mask, annotated.STEP)
            mask[0, :3] = 255  # borders that do not count
            mask[-1, -2:] = 254
            annotated.save(root / split / "masks" / f"{i:02d}.png", mask)
    return str(root)


def run(path, method=None, data=None, **change):
    evaluator = annotated.evaluator("segmentation_probe", **{**SMALL, "path": path, **change})
    return evaluator.run(method or annotated.Sees(), {}, data or annotated.evaluation())


def figures(found):
    return {name: found[name] for name in METRICS}


def test_perfect_features_score_100_and_the_files_say_it(dataset):
    found = run(dataset)
    assert figures(found) == {name: pytest.approx(100) for name in METRICS}
    truth = np.concatenate([draw(i).ravel() for i in range(8)])
    assert found["majority_pixels"] == pytest.approx(100 * np.mean(truth == 0), abs=3)
    assert len(np.unique(found["segments"].reshape(-1, 3), axis=0)) > 20
    rows = list(csv.DictReader(io.StringIO(found["classes"])))
    assert [row["class"] for row in rows] == list(SMALL["names"])
    assert all(row["knn_iou"] == row["linear_iou"] == "100.00" for row in rows)
    # Neither padding nor the size of a batch, nor one label instead of those of 4 x 4 parts
    assert figures(run(dataset, batch_size=5, cells=4)) == figures(found)
    shuffled = run(dataset, annotated.Sees(shuffled=True))
    assert max(shuffled["knn_miou"], shuffled["linear_miou"]) < 35


def test_masks_lie_on_images_that_exif_data_would_turn(dataset, tmp_path):
    copy = tmp_path / "dataset"
    shutil.copytree(dataset, copy)
    for split in ("train", "test"):
        annotated.turn(copy / split / "images")
    found = run(str(copy), data=annotated.evaluation(exif_orientation=True))
    assert figures(found) == {name: pytest.approx(100) for name in METRICS}


def test_the_report_shows_the_last_probe(tmp_path):
    counts = {"knn": Confusion(2), "linear": Confusion(2)}
    for count in counts.values():
        count.add(np.array([0, 0, 1]), np.array([0, 1, 1]))
    written = pixel_labels.class_table(("road", "sky <b>"), counts)
    assert written.splitlines()[1] == "road,66.67,50.00,50.00"
    assert segmentation_section.section(tmp_path) is None
    picture = np.random.default_rng(0).integers(0, 255, (20, 30, 3)).astype(np.uint8)
    write_picture(tmp_path / "evaluations", "camvid_classes", written)
    write_picture(tmp_path / "evaluations", "camvid_segments", picture)
    write_picture(tmp_path / "evaluations", "drones_class_ap", "class,ap\nwheel,12.34\n")
    write_picture(tmp_path / "evaluations", "drones_boxes", picture)
    content = segmentation_section.section(tmp_path).content
    assert all(text in content for text in ("66.67", "sky &lt;b&gt;", "camvid", "wheel", "12.34"))
    assert content.count("<img") == 2


def test_a_crop_is_scored_where_the_model_sees(tmp_path):
    for split in ("train", "test"):
        for i in range(4):
            cells = np.pad(draw(i), ((0, 0), (2, 2)), constant_values=1)  # unseen margins
            mask = np.kron(cells, np.ones((4, 4), int))
            annotated.save(tmp_path / "images" / split / f"{i}.png", mask, annotated.STEP)
            annotated.save(tmp_path / "labels" / split / f"{i}.png", mask)
    found = run(str(tmp_path), fit="crop", c=(100.0,), k=(1,), metric=("l2",))
    assert figures(found) == {name: pytest.approx(100) for name in METRICS}
    truth = np.concatenate([draw(i).ravel() for i in range(4)])
    assert found["majority_pixels"] == pytest.approx(100 * np.mean(truth == 0))
    square = annotated.evaluation().augment
    rows, columns = pixel_labels.axes((64, 96), square, 4)
    mask = np.arange(64 * 96).reshape(64, 96)
    np.testing.assert_array_equal(pixel_labels.crop(mask, rows, columns), mask[:, 16:80])
    np.testing.assert_allclose(columns.positions(), (np.arange(64) + 0.5) / 8)
    whole, _ = pixel_labels.axes((64, 96), Squash(**vars(square)), 4)
    assert (whole.first, whole.stop, whole.offset) == (0, 64, 0)


def test_iou_equals_an_independent_count():
    rng = np.random.default_rng(0)
    truth = rng.integers(-1, 5, (3, 40, 50))
    truth[truth == 4] = 0  # class 4 is predicted only, class 5 never
    predicted = np.where(rng.random(truth.shape) < 0.5, truth, rng.integers(0, 5, truth.shape))
    predicted = np.maximum(predicted, 0)
    counts = Confusion(6)
    for one_truth, one_prediction in zip(truth, predicted, strict=True):
        counts.add(one_truth, one_prediction)
    expected = []
    counted = truth >= 0
    for number in range(5):
        both = np.sum((truth == number) & (predicted == number))
        either = np.sum(((truth == number) | (predicted == number)) & counted)
        expected.append(both / either)
    np.testing.assert_allclose(counts.iou(), [*expected, np.nan])
    assert counts.mean_iou() == pytest.approx(np.mean(expected))
    assert counts.accuracy() == pytest.approx(np.mean((truth == predicted)[counted]))


@pytest.mark.parametrize("size", [(37, 150), (128, 40)])
def test_scores_are_interpolated_to_pixels(size):
    rng = np.random.default_rng(1)
    scores = rng.normal(size=(6, 5, 3)).astype(np.float32)
    rows = pixel_labels.Axis(2, size[0] - 3, 6 / size[0] * 1.1, offset=-0.3)
    columns = pixel_labels.Axis(0, size[1], 5 / size[1], offset=0.0)
    found = pixel_labels.pixel_classes(jnp.asarray(scores), rows, columns, (6, 5), "bilinear")
    nearest = pixel_labels.pixel_classes(jnp.asarray(scores), rows, columns, (6, 5), "nearest")
    down = np.empty((size[0] - 5, 5, 3))
    across = np.empty((size[0] - 5, size[1], 3))
    for number in range(3):
        for column in range(5):
            line = scores[:, column, number]
            down[:, column, number] = np.interp(rows.positions(), np.arange(6) + 0.5, line)
        for row, line in enumerate(down[..., number]):
            across[row, :, number] = np.interp(columns.positions(), np.arange(5) + 0.5, line)
    best = np.sort(across, axis=-1)
    clear = best[..., -1] - best[..., -2] > 1e-5
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(found[clear], across.argmax(-1)[clear])
    row = np.clip(np.floor(rows.positions()), 0, 5).astype(int)
    column = np.floor(columns.positions()).astype(int)
    np.testing.assert_array_equal(nearest, scores[np.ix_(row, column)].argmax(-1))


def test_labels_of_patches_and_of_their_parts():
    mask = np.repeat(np.repeat(np.array([[0, 1], [2, -1]], np.int16), 6, 0), 6, 1)
    mask[:2, :6] = 1  # 12 of 36 pixels
    mask[6:, 7:] = 1  # 30 of 36 pixels of an ignored patch
    axis = pixel_labels.Axis(0, 12, 2 / 12, 0.0)
    labels = pixel_labels.patch_labels(mask, axis, axis, (2, 2), 3)
    assert labels.tolist() == [0, 1, 2, 1]
    mask[6:, 7:10] = -1
    assert pixel_labels.patch_labels(mask, axis, axis, (2, 2), 3).tolist() == [0, 1, 2, -1]
    cells = pixel_labels.cell_labels(mask, axis, axis, (2, 2), 3)
    assert cells.tolist() == [[1] * 3 + [0] * 6, [1] * 9, [2] * 9, [-1, -1, 1] * 3]
    small = pixel_labels.Axis(0, 1, 2.0, 0.0)  # one pixel for two patches
    found = pixel_labels.patch_labels(np.ones((1, 1), np.int16), small, small, (2, 2), 3)
    assert sorted(found.tolist()) == [-1, -1, -1, 1]


@pytest.mark.parametrize("size", [7, 40, 1000])
def test_a_sample_from_a_stream_equals_one_taken_at_once(size):
    rng = np.random.default_rng(2)
    features = rng.normal(size=(30, 9, 2)).astype(np.float32)
    labels = rng.integers(-1, 3, (30, 9))
    cells = rng.integers(-1, 3, (30, 9, 4)).astype(np.int16)
    samples = []
    for order in (range(30), reversed(range(30)), rng.permutation(30).tolist()):
        sample = PatchSample(size, seed=5)
        for image in order:
            sample.add(image, features[image], labels[image], cells[image])
            rows = len(sample._buffers["keys"])
            assert rows <= size + max(size // 8, 9)
        samples.append(sample.finish())
    keys = np.stack([np.random.default_rng((5, image)).random(9) for image in range(30)])
    keys[labels < 0] = np.inf
    count = min(size, np.sum(labels >= 0))
    image, place = np.nonzero(keys <= np.sort(keys.ravel())[count - 1])
    for found in samples:
        np.testing.assert_array_equal(found.images, image)
        np.testing.assert_array_equal(found.features, features[image, place])
        np.testing.assert_array_equal(found.labels, labels[image, place])
        np.testing.assert_array_equal(found.cells, cells[image, place])


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_neighbors_in_a_placed_bank(metric, monkeypatch):
    monkeypatch.setattr(classifiers, "BANK_ROWS", 64)
    rng = np.random.default_rng(3)
    bank = rng.normal(size=(150, 6)).astype(np.float32)
    queries = rng.normal(size=(20, 6)).astype(np.float32)
    placed = classifiers.PlacedBank(bank, metric, sharding.make_mesh())
    distances = np.linalg.norm(queries[:, None] - bank, axis=-1)
    if metric == "cosine":
        unit = bank / np.linalg.norm(bank, axis=-1, keepdims=True)
        distances = -queries @ unit.T
    np.testing.assert_array_equal(placed.nearest(queries, 5), np.argsort(distances, 1)[:, :5])


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def make_layout(root, layout, split="train"):
    """Two images of 8 x 8 pixels as the dataset has them; one mask has two classes, or colors."""
    mask = np.zeros((8, 8), int)
    if layout == "voc":
        top = root / "VOCdevkit" / "VOC2012"
        write(top / "ImageSets" / "Segmentation" / f"{split}.txt", "2007_01\n2007_02\n")
        images = [top / "JPEGImages" / f"2007_0{i}.jpg" for i in (1, 2)]
        masks = [top / "SegmentationClass" / f"2007_0{i}.png" for i in (1, 2)]
        mask[4:] = 15
        mask[0] = 255
    elif layout == "ade20k":
        top = root / "ADEChallengeData2016"
        write(top / "objectInfo150.txt", "Idx\tName\n1\twall\n2\tbuilding, edifice\n")
        images = [top / "images" / "train" / f"ADE_{i}.jpg" for i in (1, 2)]
        masks = [top / "annotations" / "train" / f"ADE_{i}.png" for i in (1, 2)]
        mask[4:] = 150
    elif layout == "cityscapes":
        names = ("aachen/aachen_0", "bochum/bochum_1")
        images = [root / "leftImg8bit" / split / f"{name}_leftImg8bit.png" for name in names]
        masks = [root / "gtFine" / split / f"{name}_gtFine_labelIds.png" for name in names]
        mask[4:] = 33
    elif layout == "camvid":
        write(root / "train.txt", "0001TP_1.png\n0001TP_2.png\n")
        images = [root / "701_StillsRaw_full" / f"0001TP_{i}.png" for i in (1, 2)]
        masks = [root / "LabeledApproved_full" / f"0001TP_{i}_L.png" for i in (1, 2)]
    else:
        images = [root / "images" / split / f"{i}.png" for i in (1, 2)]
        masks = [root / "masks" / split / f"{i}.png" for i in (1, 2)]
    for image, path in zip(images, masks, strict=True):
        annotated.save(image, np.zeros((8, 8), int))
        annotated.save(path, mask)
    if layout == "camvid":
        colors = np.zeros((8, 8, 3), np.uint8)
        colors[4:] = (64, 128, 192)  # SUVPickupTruck
        for path in masks:
            Image.fromarray(colors).save(path)
    return images, masks


EXPECTED = {  # the classes above and below
    "voc": (0, 15),
    "ade20k": (-1, 149),
    "cityscapes": (-1, 18),
    "camvid": (-1, 8),
}


@pytest.mark.parametrize("layout", [*EXPECTED, "folder"])
def test_official_layouts_and_numbers(layout, tmp_path):
    images, masks = make_layout(tmp_path, layout)
    section = {"classes": (0, 1), "ignore": (), "names": ()}
    if layout in EXPECTED:
        section = evaluate.get_config("segmentation")[layout].to_dict()
    source = segmentation_sets.open_split(layout, str(tmp_path), "train", 0)
    assert [source.name(i) for i in (0, 1)] == [str(path) for path in images]
    if layout == "camvid":  # masks in colors
        assert segmentation_sets.find_classes(source, (), layout, 1.0) <= set(range(32))
    labels = Labels.from_options(section["classes"], section["ignore"], section["names"], layout)
    classes = labels.read(source, 1, 1.0)
    above, below = EXPECTED.get(layout, (0, 0))
    assert (classes[2, 0], classes[6, 0]) == (above, below)
    assert layout != "voc" or classes[0, 0] == -1
    if layout == "ade20k":
        assert segmentation_sets.read_ade20k_names(str(tmp_path)) == ("wall", "building")
    assert len(segmentation_sets.open_split(layout, str(tmp_path), "train", 1)) == 1
    masks[0].unlink()
    if layout == "folder":  # the other pair is used
        assert len(segmentation_sets.open_split(layout, str(tmp_path), "train", 0)) == 1
        masks[1].unlink()
    with pytest.raises(UserError, match=r"lack a file: .*|no images in this folder") as error:
        segmentation_sets.open_split(layout, str(tmp_path), "train", 0)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(not REAL.exists(), reason="needs shared/data/camvid_small.zip")
def test_camvid(tmp_path):
    with zipfile.ZipFile(REAL) as archive:
        archive.extractall(tmp_path)
    section = evaluate.get_config("segmentation").camvid
    labels = Labels.from_options(section.classes, section.ignore, section.names, "camvid")
    counts = {}
    for split in ("train", "test"):
        source = segmentation_sets.open_split("camvid", str(tmp_path / "camvid_small"), split, 0)
        counts[split] = len(source)
    assert counts == {"train": 74, "test": 39}
    sky = labels.read(source, 0, 1.0)[:60] == section.names.index("sky")
    road = labels.read(source, 0, 1.0)[-60:-20, 100:300] == section.names.index("road")
    assert (sky.mean() > 0.5, road.mean() > 0.8) == (True, True)


def test_lists_of_pairs_that_begin_elsewhere(tmp_path):
    for part in ("trainannot", "train"):
        annotated.save(tmp_path / part / "a.png", np.zeros((8, 8), int))
    write(tmp_path / "train.txt", "/SegNet/CamVid/train/a.png /SegNet/CamVid/trainannot/a.png\n")
    source = segmentation_sets.open_split("camvid", str(tmp_path), "train", 0)
    assert source.files == (str(tmp_path / "trainannot" / "a.png"),)
    (tmp_path / "train.txt").unlink()
    assert segmentation_sets.open_split("camvid", str(tmp_path), "train", 0).files == source.files


def test_what_is_wrong_is_named(dataset, tmp_path):
    images, masks = make_layout(tmp_path / "city", "cityscapes")
    labels = Labels.from_options((7, 8), (0, 255), (), "cityscapes")
    source = segmentation_sets.open_split("cityscapes", str(tmp_path / "city"), "train", 0)
    with pytest.raises(UserError, match=r"aachen_0.*the numbers \[33\], which are neither"):
        labels.read(source, 0, 1.0)
    annotated.save(images[0], np.zeros((8, 12), int))
    with pytest.raises(UserError, match=r"aachen_0.* has 12 x 8 pixels, and its mask 8 x 8"):
        labels.read(source, 0, 1.0)
    masks[1].write_bytes(b"no image")
    with pytest.raises(UserError, match=r"the mask of .*bochum_1.* cannot be used"):
        labels.read(source, 1, 1.0)
    colors = Labels.from_options((0, 1), (11,), (), "camvid")
    Image.fromarray(np.full((8, 8, 3), (1, 2, 3), np.uint8)).save(masks[1])
    with pytest.raises(UserError, match=r"the color \(1, 2, 3\) is that of no class"):
        colors.read(source, 1, 1.0)
    for change, message in (
        ({"layout": "vok"}, r"layout='vok' must be one of: .*did you mean voc"),
        ({"path": "missing"}, r"path='missing' is not a folder"),
        ({"layout": "voc"}, "has no folder SegmentationClass"),
        ({"test_split": "val"}, r"no images and masks of the split 'val'; expected val/images"),
        ({"fit": "stretch"}, r"fit=.*stretch.*must be among: squash \| crop"),
        ({"classes": (0, 1, 2)}, r"names has 4 names for 3 classes"),
        ({"classes": (0, 255, 1, 2)}, r"\[255\] are in `classes` and in `ignore`"),
        ({"classes": (0, 1, 2, 7)}, r"the numbers \[3\], which are neither in"),
        ({"feature": "cls"}, r"feature='cls' has no vector per patch"),
        ({"held_out": 0.0}, r"held_out=0.0 must be a share"),
        ({"train_images": 1}, r"come from 1 image\(s\)"),
    ):
        with pytest.raises(UserError, match=message) as error:
            run(**{"path": dataset, **change})
        assert "\n" not in str(error.value)


def test_k_and_c_are_those_of_held_out_images(dataset, caplog):
    caplog.set_level("INFO")
    run(dataset, k=(1, 600), metric=("cosine",), c=(1e-6, 100.0))
    text = caplog.text
    assert "k-NN: chosen cosine, k = 1," in text
    assert "linear: chosen c = 100;" in text
