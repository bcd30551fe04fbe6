"""Detection: annotations, views, assignment, loss, suppression, average precision, training."""

import contextlib
import csv
import functools
import io
import json
import shutil

import annotated
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from lmim_jax.data.augment import view
from lmim_jax.data.augment.view import View
from lmim_jax.data.eval import coco
from lmim_jax.distributed import sharding
from lmim_jax.evaluators import detection
from lmim_jax.evaluators.common import coco_metrics, fcos
from lmim_jax.evaluators.common.coco_metrics import Detections
from lmim_jax.models import pyramid
from lmim_jax.utils.errors import UserError

COLORS = ((230, 40, 40), (40, 60, 230))
CATEGORIES = [{"id": 7, "name": "red"}, {"id": 3, "name": "blue"}, {"id": 5, "name": "fog"}]
SMALL = dict(
    size=(32, 32), batch_size=8, total_steps=2, features=16, depth=1, shown=2, ignore=("fog",)
)


class Linear:
    """A method whose features of a patch are its pixels times a matrix, which is the encoder."""

    patch_size = 8
    width = 12

    def features(self, params, images):
        """Of patches."""
        batch, height, width, channels = images.shape
        side = self.patch_size
        x = images.reshape(batch, height // side, side, width // side, side, channels)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, side * side * channels)
        return {"patches": x @ params["encoder"]["kernel"], "cls": x.mean((1, 2))}


def weights():
    kernel = np.random.default_rng(0).normal(size=(192, Linear.width)) / 12
    return {"encoder": {"kernel": jnp.asarray(kernel, jnp.float32)}}


def draw(rng):
    """An image of 40 x 32 pixels with one or two rectangles: pixels, boxes, categories."""
    pixels = rng.integers(90, 130, (32, 40, 3)).astype(np.uint8)
    boxes = []
    categories = []
    for column in range(rng.integers(1, 3)):
        kind = int(rng.integers(2))
        width, height = rng.integers(9, 16, 2).tolist()
        left = 20 * column + int(rng.integers(0, 20 - width))
        top = int(rng.integers(0, 32 - height))
        pixels[top : top + height, left : left + width] = COLORS[kind]
        boxes.append([left, top, width, height])
        categories.append(CATEGORIES[kind]["id"])
    return pixels, boxes, categories


def write(root, train=24, test=11):
    """A folder with train.json and test.json, images and boxes; the ids are those of no order."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        (root / split).mkdir(parents=True)
        content = {"images": [], "annotations": [], "categories": CATEGORIES}
        for i in range(count):
            pixels, boxes, categories = draw(rng)
            Image.fromarray(pixels).save(root / split / f"{i:03d}.png")
            entry = {"id": 900 - i, "file_name": f"{i:03d}.png", "width": 40, "height": 32}
            content["images"].append(entry)
            for box, category in zip(boxes, categories, strict=True):
                number = len(content["annotations"]) + 50
                content["annotations"].append(
                    {"id": number, "image_id": 900 - i, "category_id": category, "bbox": box}
                )
        if split == "test":
            content["annotations"][0]["iscrowd"] = 1
            content["annotations"].append(
                {"id": 1, "image_id": 895, "category_id": 5, "bbox": [0, 0, 20, 30]}
            )
        for one in content["annotations"]:
            one.setdefault("iscrowd", 0)
            one["area"] = one["bbox"][2] * one["bbox"][3] * 0.8
        (root / f"{split}.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write(tmp_path_factory.mktemp("boxes"))


def make(path, **change):
    return annotated.evaluator("detection", **{**SMALL, "path": str(path), **change})


def run(path, **change):
    data = annotated.evaluation(grid=(4, 4), patch_size=8)
    return make(path, **change).run(Linear(), weights(), data)


def guesses(split, seed=0):
    """True boxes, moved a little, some with another class, and boxes anywhere."""
    rng = np.random.default_rng(seed)
    count = len(split.boxes)
    image = np.concatenate([split.image, rng.integers(0, len(split.ids), count)])
    near = split.boxes + rng.normal(0, 1.2, split.boxes.shape)
    corner = rng.uniform(0, 20, (count, 2))
    boxes = np.concatenate([near, np.concatenate([corner, corner + 10], axis=1)])
    labels = np.concatenate([np.maximum(split.labels, 0), rng.integers(0, 2, count)])
    labels = np.where(rng.random(2 * count) < 0.2, 1 - labels, labels)
    return Detections(image, boxes, rng.random(2 * count), labels)


# -- average precision


def test_ap_equals_that_of_pycocotools_on_the_files(dataset, tmp_path):
    pytest.importorskip("pycocotools")
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    split = coco.open_split(str(dataset), "test.json", "test", ("red", "blue"))
    found = guesses(split)
    entries = []
    for i in range(len(found.boxes)):
        left, top, right, bottom = found.boxes[i].tolist()
        entries.append(
            {
                "image_id": split.ids[found.image[i]],
                "category_id": [7, 3][found.labels[i]],
                "bbox": [left, top, right - left, bottom - top],
                "score": float(found.scores[i]),
            }
        )
    (tmp_path / "found.json").write_text(json.dumps(entries))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(dataset / "test.json")
        evaluation = COCOeval(truth, truth.loadRes(str(tmp_path / "found.json")), "bbox")
        evaluation.params.catIds = [7, 3]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    expected = dict(zip(coco_metrics.NAMES, 100 * evaluation.stats, strict=False))
    metrics = coco_metrics.measure(split, found).metrics
    assert 5 < metrics["ap"] < metrics["ap50"] < 95
    known = {name: value for name, value in expected.items() if value >= 0}
    assert metrics == pytest.approx(known)
    assert "ap_large" not in metrics  # there are no large boxes
    of_class = coco_metrics.measure(split, found).of_class
    assert np.mean(of_class) == pytest.approx(metrics["ap"])


def test_perfect_boxes_score_100_also_among_regions_that_do_not_count(dataset):
    pytest.importorskip("pycocotools")
    split = coco.open_split(str(dataset), "test.json", "test", (), ("fog",))
    assert split.classes == ("blue", "red")  # in the order of their numbers
    assert (split.labels == coco.ALL_CLASSES).sum() == 1 and split.crowd.sum() == 2
    true = np.flatnonzero(~split.crowd)
    found = Detections(split.image[true], split.boxes[true], np.ones(len(true)), split.labels[true])
    precision = coco_metrics.measure(split, found)
    assert set(precision.metrics.values()) == {100.0}
    rows = list(csv.DictReader(io.StringIO(coco_metrics.class_table(split, split, precision))))
    assert [row["ap"] for row in rows] == ["100.00", "100.00"]
    # Where fog is, a wrong box counts for nothing; elsewhere it does
    place = split.ids.index(895)
    for box, perfect in (([1.0, 1, 18, 28], True), ([25.0, 20, 39, 31], False)):
        more = Detections(*(np.concatenate([part, part[:1]]) for part in found))
        more.image[-1] = place
        more.boxes[-1] = box
        more.scores[-1] = 2.0
        assert (coco_metrics.measure(split, more).metrics["ap"] == 100.0) == perfect


# -- annotations


def test_boxes_lie_on_images_that_exif_data_would_turn(dataset, tmp_path, monkeypatch):
    class Read(Exception):
        """Ends the evaluation with what it would train on."""

    def train(probe, task, params, data, table):
        raise Read(next(data.batches("train", 4))["images"])

    monkeypatch.setattr(detection, "train", train)
    turned = tmp_path / "turned"
    shutil.copytree(dataset, turned)
    annotated.turn(turned)
    data = annotated.evaluation(grid=(4, 4), patch_size=8, exif_orientation=True)
    read = []
    for path in (dataset, turned):
        with pytest.raises(Read) as raised:
            make(path).run(Linear(), weights(), data)
        read.append(raised.value.args[0])
    np.testing.assert_array_equal(read[0], read[1])


def test_rotated_boxes_become_enclosing_ones():
    assert coco.enclosing_box([1, 2, 3, 4], "") == (1, 2, 4, 6)
    turned = coco.enclosing_box([10, 20, 8, 4, 90], "")
    np.testing.assert_allclose(turned, (8, 16, 12, 24))
    slanted = coco.enclosing_box([0, 0, 2, 2, 45], "")
    np.testing.assert_allclose(slanted, np.array([-1, -1, 1, 1]) * 2**0.5)
    assert coco.enclosing_box([5, 1, 9, 4, 6, 8, 2, 5], "") == (2, 1, 9, 8)


def test_boxes_are_padded_and_the_largest_are_kept(dataset, caplog):
    split = coco.open_split(str(dataset), "train.json", "train", (), ("fog",))
    table = split.padded(0)
    assert table.shape == (24, 2, 5)
    assert ((table[..., 4] >= 0).sum(axis=1) == np.bincount(split.image, minlength=24)).all()
    sides = np.array([40, 32, 40, 32])
    pixels = table[split.image[0], :, :4] * sides
    assert np.abs(pixels - split.boxes[0]).max(axis=1).min() < 1e-4
    assert (np.bincount(split.image) == 2).any()
    kept = split.padded(1)
    assert "image(s) have more than max_boxes=1" in caplog.text
    areas = np.where(table[..., 4] >= 0, np.prod(table[..., 2:4] - table[..., :2], axis=-1), -1)
    np.testing.assert_array_equal(kept[:, 0], table[np.arange(24), areas.argmax(axis=1)])


def change_first(key, value):
    def change(content):
        content["annotations"][0][key] = value

    return change


def empty(key):
    def change(content):
        content[key] = []

    return change


def lose_image(content):
    content["images"][2]["file_name"] = "lost.png"


def narrow(content):
    content["images"][0]["width"] = 30


def only_fog(content):
    for entry in content["annotations"]:
        entry["category_id"] = 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_first("image_id", 1), r"1 of \d+ annotations are of images .* annotation 50$"),
        (change_first("category_id", 9), r"annotation 50 has category_id=9"),
        (change_first("bbox", [1, 2, 3]), r"annotation 50 has bbox=\[1, 2, 3\]; expected"),
        (change_first("bbox", [50, 2, 9, 9]), r"1 of \d+ boxes are outside .*of 40 x 32 pixels"),
        (empty("annotations"), r"the list 'annotations' is empty"),
        (empty("categories"), r"the list 'categories' is empty"),
        (lose_image, r"1 of 24 images are not in .*: lost.png; complete the folder"),
        (narrow, r"000.png has 40 x 32 pixels, and by .* 30 x 32"),
        (only_fog, r"no box of the classes blue, red in 24 images"),
    ],
)
def test_bad_annotations_are_named(change, message, dataset):
    content = json.loads((dataset / "train.json").read_text())
    change(content)
    (dataset / "bad.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as error:
        coco.open_split(str(dataset), "bad.json", "train", (), ("fog",))
    assert "\n" not in str(error.value)


def test_empty_classes_and_boxes_are_named(dataset, caplog):
    content = json.loads((dataset / "train.json").read_text())
    content["annotations"][0]["bbox"] = [3, 3, 0, 5]
    content["annotations"][1]["bbox"][0] = -4
    (dataset / "odd.json").write_text(json.dumps(content))
    split = coco.open_split(str(dataset), "odd.json", "train")
    assert "1 box(es) without an area are left out" in caplog.text
    assert "1 box(es) reach beyond their images" in caplog.text
    assert "no boxes of fog" in caplog.text
    assert split.boxes.min() == 0 and len(split.boxes) == len(content["annotations"]) - 1


def test_bad_options_are_named(dataset):
    pytest.importorskip("pycocotools")
    for change, message in (
        ({"path": "missing"}, r"path='missing' is not a folder"),
        ({"train_annotations": "no.json"}, r"no.json cannot be read as annotations"),
        ({"test_images": "none"}, r"none is not a folder; train_images and test_images"),
        ({"classes": ("rad",)}, r"no category 'rad'; did you mean red"),
        ({"classes": ("red", "fog")}, r"\['fog'\] are in `classes` and in `ignore`"),
        ({"feature": "cls"}, r"feature='cls' has no vector per patch; choices: patches"),
        ({"size": (30, 32)}, r"size=\(30, 32\) must be height and width .* multiples of .* 8"),
        ({"scale": (0.0, 1.0)}, r"scale=\(0.0, 1.0\) must be"),
        ({"batch_size": 12}, r"batch_size=12 must be a multiple of the 8"),
        ({"remat": "all"}, r"remat='all' must be one of"),
    ):
        with pytest.raises(UserError, match=message):
            run(**{"path": dataset, **change})


# -- views


def test_a_view_moves_pixels_boxes_and_masks_alike():
    out = (24, 32)
    augment = annotated.evaluation().augment
    mask = np.zeros((64, 64), np.uint8)
    mask[8:20, 12:36] = 255  # of an image of 40 x 48
    boxes = jnp.asarray([[12 / 48, 8 / 40, 36 / 48, 20 / 40], [0.0, 0.0, 0.01, 0.01]])
    size = jnp.asarray([40, 48])
    cases = [view.whole_view(size, out)]
    for resized, corner, flip in (((40, 48), (5, 9), False), ((20, 24), (0, 0), True)):
        cases.append(View(jnp.asarray(resized), jnp.asarray(corner), jnp.bool_(flip)))
    for seed in range(4):
        whole = view.fitting_scale(size, out)
        cases.append(view.draw_view(jax.random.key(seed), size, out, whole, (0.6, 1.6), True))
    image = jnp.asarray(mask)[..., None].repeat(3, -1)
    see = jax.jit(functools.partial(view.view_pixels, out=out, augment=augment))
    label = jax.jit(functools.partial(view.view_mask, out=out, padding=7))
    move = jax.jit(functools.partial(view.view_boxes, out=out))
    for case in cases:
        pixels = np.asarray(see(case, image, size))[..., 0]
        numbers = np.asarray(label(case, jnp.asarray(mask), size))
        found, is_seen = move(case, boxes)
        left, top, right, bottom = np.asarray(found[0])
        assert bool(is_seen[0]) and not is_seen[1]
        rows, columns = np.nonzero(pixels > 0.5)
        edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        np.testing.assert_allclose(edges, [left, top, right, bottom], atol=0.75)
        rows, columns = np.nonzero(numbers == 255)
        edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        np.testing.assert_allclose(edges, [left, top, right, bottom], atol=0.75)
        padding = ~np.asarray(view.seen(case, out))
        assert (numbers[padding] == 7).all() and (pixels[padding] == 0).all()
        assert not (numbers[~padding] == 7).any()
    assert any(np.asarray(~view.seen(case, out)).any() for case in cases)


# -- assignment, loss, suppression


def assign_slowly(places, boxes, labels, radius):
    """The rules of FCOS, place by place and box by box."""
    found = []
    distances = []
    for place, (x, y) in enumerate(places.points):
        best = (np.inf, -1, np.zeros(4))
        for box, label in zip(boxes, labels, strict=True):
            four = np.array([x - box[0], y - box[1], box[2] - x, box[3] - y])
            if label < 0 or four.min() <= 0:
                continue
            if not places.low[place] <= four.max() <= places.high[place]:
                continue
            if radius:
                reach = radius * places.strides[place]
                middle = (box[:2] + box[2:]) / 2
                low = np.maximum(middle - reach, box[:2])  # cut off at the box
                high = np.minimum(middle + reach, box[2:])
                if not (low[0] < x < high[0] and low[1] < y < high[1]):
                    continue
            area = (box[2] - box[0]) * (box[3] - box[1])
            if area < best[0]:
                best = (area, label, four)
        found.append(best[1])
        distances.append(best[2])
    return np.array(found), np.array(distances)


@pytest.mark.parametrize("radius", [0.0, 1.5])
def test_assignment_equals_an_independent_one(radius):
    rng = np.random.default_rng(1)
    places = fcos.lay_out((7, 6), pyramid.strides(16), 16)
    assert places.counts == (28 * 24, 14 * 12, 42, 9, 4)
    np.testing.assert_array_equal(places.points[1], [6, 2])
    np.testing.assert_array_equal(np.unique(places.strides), [4, 8, 16, 32, 64])
    assert sorted(set(places.low)) == [0, 32, 64, 128, 256] and places.high.max() == np.inf
    corners = rng.uniform(0, 96, (14, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(2, 110, (14, 2))], axis=1)
    boxes[:6, 2:] = boxes[:6, :2] + rng.uniform(3, 20, (6, 2))
    boxes = np.minimum(boxes, [96, 112, 96, 112]).astype(np.float32)
    labels = rng.integers(0, 3, 14)
    labels[[3, 9]] = -1
    found, distances = fcos.assign(places, jnp.asarray(boxes), jnp.asarray(labels), radius)
    expected, expected_distances = assign_slowly(places, boxes, labels, radius)
    np.testing.assert_array_equal(found, expected)
    assert len(np.unique(expected)) == 4
    is_box = expected >= 0
    np.testing.assert_allclose(distances[is_box], expected_distances[is_box], atol=1e-4)


def test_the_loss_equals_an_independent_one_and_ignores_padding():
    rng = np.random.default_rng(2)
    places = fcos.lay_out((4, 4), pyramid.strides(8), 8)
    count = len(places.points)
    boxes = np.array([[2, 3, 14, 19], [16, 8, 31, 30], [0, 0, 0, 0]], np.float32)
    labels = np.array([1, 0, -1])
    outputs = {
        "logits": rng.normal(size=(2, count, 3)),
        "distances": rng.normal(size=(2, count, 4)),
        "centerness": rng.normal(size=(2, count, 1)),
    }
    outputs = {name: jnp.asarray(value, jnp.float32) for name, value in outputs.items()}
    learned = []
    assign = jax.jit(functools.partial(fcos.assign, places, radius=1.5))
    differentiate = jax.jit(jax.value_and_grad(fcos.loss))
    for more in (0, 5):  # rows of padding
        padded = jnp.asarray(np.pad(boxes, ((0, more), (0, 0))))
        marks = jnp.asarray(np.pad(labels, (0, more), constant_values=-1))
        first = assign(padded, marks)
        second = assign(padded, jnp.full(3 + more, -1))  # an empty image
        found = tuple(jnp.stack(pair) for pair in zip(first, second, strict=True))
        loss = differentiate(outputs, *found, places.strides)
        learned.append((found[0], loss))
    np.testing.assert_array_equal(learned[0][0], learned[1][0])
    jax.tree.map(np.testing.assert_array_equal, learned[0][1], learned[1][1])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(learned[0][1]))

    classes, distances = (np.asarray(part, np.float64) for part in found)
    values = {name: np.asarray(value, np.float64) for name, value in outputs.items()}
    chance = 1 / (1 + np.exp(-values["logits"]))
    hot = classes[..., None] == np.arange(3)
    share = np.where(hot, chance, 1 - chance)
    focal = np.where(hot, 0.25, 0.75) * (1 - share) ** 2 * -np.log(share)
    b, p = np.nonzero(classes >= 0)
    assert len(b) > 4
    four = distances[b, p] / places.strides[p, None]
    pairs = four[:, :2], four[:, 2:]
    center = np.sqrt(np.prod(np.minimum(*pairs) / np.maximum(*pairs), axis=1))
    guess = np.exp(values["distances"][b, p])
    areas = [np.prod(d[:, :2] + d[:, 2:], axis=1) for d in (guess, four)]
    inner = np.prod(np.minimum(guess, four)[:, :2] + np.minimum(guess, four)[:, 2:], axis=1)
    outer = np.prod(np.maximum(guess, four)[:, :2] + np.maximum(guess, four)[:, 2:], axis=1)
    union = areas[0] + areas[1] - inner
    giou = inner / union - (outer - union) / outer
    near = 1 / (1 + np.exp(-values["centerness"][b, p, 0]))
    entropy = -(center * np.log(near) + (1 - center) * np.log(1 - near))
    expected = focal.sum() / len(b) + ((1 - giou) * center).sum() / center.sum() + entropy.mean()
    assert float(learned[0][1][0]) == pytest.approx(expected, rel=1e-5)


def test_candidates_give_back_what_was_assigned():
    """Outputs made of the targets are decoded into the boxes, each once after suppression."""
    places = fcos.lay_out((8, 8), pyramid.strides(8), 8)
    boxes = np.array([[3, 4, 20, 30], [30, 8, 61, 33], [10, 38, 22, 52]], np.float32)
    labels = np.array([1, 0, 1])
    learned, distances = fcos.assign(places, jnp.asarray(boxes), jnp.asarray(labels), 1.5)
    strides = places.strides[:, None]
    outputs = {
        "logits": 20 * jax.nn.one_hot(learned, 2)[None] - 10,
        "distances": jnp.log(jnp.maximum(distances / strides, 1e-3))[None],
        "centerness": (8 * fcos.centerness(distances) - 4)[None, :, None],
    }
    find = jax.jit(functools.partial(fcos.candidates, places=places))
    found, scores, kinds, probability = (np.asarray(x[0]) for x in find(outputs))
    chosen = probability > 0.5
    found, scores, kinds = found[chosen], scores[chosen], kinds[chosen]
    assert len(found) == (np.asarray(learned) >= 0).sum() > 3
    kept = fcos.suppress(found, scores, kinds, 0.6, 100)
    assert len(kept) == 3 and (np.diff(scores[kept]) <= 0).all()
    order = [int(np.abs(found[kept] - box).max(axis=1).argmin()) for box in boxes]
    np.testing.assert_allclose(found[kept][order], boxes, atol=1e-3)
    np.testing.assert_array_equal(kinds[kept][order], labels)
    assert len(fcos.suppress(found, scores, kinds, 0.6, 2)) == 2
    assert len(fcos.suppress(found, scores, kinds, 1.0, 100)) == len(found)  # equal ones stay


# -- the evaluator


@pytest.mark.slow
def test_padding_size_of_a_batch_and_devices_change_no_detection(dataset):
    data = annotated.evaluation(grid=(4, 4), patch_size=8)
    found = []
    for batch_size, devices in ((8, 8), (16, 1)):
        data.mesh = sharding.make_mesh(devices=jax.devices()[:devices])
        evaluator = make(dataset, batch_size=batch_size, threshold=0.005)
        split = coco.open_split(str(dataset), "test.json", "test", (), ("fog",))
        images = data.with_sources(
            {"train": split.source, "test": split.source}, evaluator.fit(Linear(), data)
        )
        task = detection.DenseTask(Linear(), images.augment, 2, 3)
        x = jnp.zeros((1, 4, 4, Linear.width))
        trained = {"head": evaluator.network(task, x.dtype).init(jax.random.key(0), x)["params"]}
        trained["encoder"] = weights()["encoder"]
        boxes, seen = evaluator.detect(task, weights(), trained, images, split)
        assert seen.tolist() == list(range(11))
        found.append(boxes)
    assert len(found[0].boxes) > 50
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-4)
    assert found[0].boxes.min() >= 0 and (found[0].boxes <= [40, 32, 40, 32]).all()


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True])
def test_rectangles_are_learned(frozen, tmp_path):
    pytest.importorskip("pycocotools")
    write(tmp_path, train=64, test=16)
    change = dict(batch_size=16, total_steps=250, base_lr=0.1, features=32, drop_path=0.0)
    found = run(tmp_path, frozen=frozen, scale=(0.8, 1.2), **change)
    assert found["ap50"] > 60, found
    rows = list(csv.DictReader(io.StringIO(found["class_ap"])))
    assert [row["class"] for row in rows] == ["blue", "red"]
    assert min(float(row["ap50"]) for row in rows) > 50
    assert len(np.unique(found["boxes"].reshape(-1, 3), axis=0)) > 20
