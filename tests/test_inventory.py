"""What is found in folders as people have them: splits, classes, other files, links, sizes."""

import errno
import shutil

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from lmim_jax.configs import vit_b
from lmim_jax.data import folder_listing, inventory, sources, tfds_source
from lmim_jax.data.eval.eval_data import EvaluationData, known_labels, only_labeled
from lmim_jax.evaluators import base
from lmim_jax.utils.errors import UserError


def draw(path, seed=0, size=(12, 10), mode="RGB"):
    """Write an image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(path)


def dataset(root, train="train", test="test", classes=("cat", "dog"), count=3):
    """Class folders of a few images, in two splits."""
    for split, images in ((train, count), (test, 2)):
        for name in classes:
            for i in range(images):
                draw(root / split / name / f"{i}.jpg", i)
    return root


def found(path, **options):
    """(sources, lines on them, why accuracies have no meaning)."""
    config = vit_b.get_config().data
    config.update(path=str(path), **options)
    listings = {}
    splits = sources.open_splits(config, listings)
    lines = inventory.describe_config(config, splits, listings, "--config.data")
    assert len(lines) <= 12
    assert max(map(len, lines)) <= 91
    return splits, lines, base.labels_problem(splits["train"].classes, splits)


def text(lines):
    """Lines without their heading, with single spaces."""
    return " ".join(" ".join(lines[1:]).split())


def labels(source):
    return [source.record(i)[1] for i in range(len(source))]


def test_a_plain_dataset(tmp_path):
    splits, lines, problem = found(dataset(tmp_path))
    assert not problem
    assert lines[0].endswith("6 training and 4 test images")
    assert text(lines) == (
        "train/ 6 images, 2 classes, 3 images each test/ 4 images, 2 classes, 2 images each "
        "sizes 12 x 10 pixels, RGB, JPEG (6 read)"
    )
    assert labels(splits["train"]) == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("flat", "message"),
    [("test", "8 images without classes; in test/CLASS/"), ("train", "8 images without classes")],
)
def test_a_split_without_classes_is_unlabeled(tmp_path, flat, message):
    dataset(tmp_path)
    shutil.rmtree(tmp_path / flat)
    for i in range(8):
        draw(tmp_path / flat / f"{i}.jpg", i)
    splits, lines, problem = found(tmp_path)
    assert message in text(lines)
    assert "have no classes" in problem
    assert set(labels(splits[flat])) == {-1}


def test_test_images_in_a_folder_that_is_no_class_are_unlabeled(tmp_path):
    dataset(tmp_path)
    shutil.rmtree(tmp_path / "test")
    draw(tmp_path / "test/images/0.jpg")
    draw(tmp_path / "test/images/1.jpg")
    splits, _, problem = found(tmp_path)
    assert problem.startswith("the test images have no classes")
    draw(tmp_path / "test/cat/0.jpg")
    draw(tmp_path / "test/dog/0.jpg")
    splits, lines, problem = found(tmp_path)
    assert not problem
    assert labels(splits["test"]) == [0, 1, -1, -1]
    assert "no class 2 of the images in test/, unlabeled: test/images/0.jpg" in text(lines)
    assert "(not in train/)" in text(lines)


@pytest.mark.parametrize("where", ["train", "test"])
@pytest.mark.parametrize("count", [1, 4])
def test_stray_images_are_named_and_cost_no_other_label(tmp_path, where, count):
    dataset(tmp_path)
    for i in range(count):
        draw(tmp_path / where / f"stray{i}.jpg", i)
    splits, lines, problem = found(tmp_path)
    assert not problem
    assert sorted(labels(splits[where]))[:count] == [-1] * count
    assert set(labels(splits[where])) == {-1, 0, 1}
    assert f"no class {count} of the images in {where}/, unlabeled: {where}/stray0" in text(lines)
    names = [splits[where].files[i] for i, x in enumerate(labels(splits[where])) if x < 0]
    assert names == [f"stray{i}.jpg" for i in range(count)]


@pytest.mark.parametrize("name", ["images", "all", "0"])
def test_one_class_is_no_label(tmp_path, name):
    splits, lines, problem = found(dataset(tmp_path, classes=(name,)))
    assert "the images have no classes" in problem
    assert f"without classes: {name}/ is the only folder" in text(lines)
    assert splits["train"].classes == ()


def test_test_images_of_a_single_class_measure_nothing(tmp_path):
    dataset(tmp_path)
    shutil.rmtree(tmp_path / "test/dog")
    assert found(tmp_path)[2] == "all labeled test images are of one class, 'cat'"


@pytest.mark.parametrize("limit", [1, 4, 100])
def test_limits_per_class_without_classes_take_the_first_images(tmp_path, limit):
    for i in range(6):
        draw(tmp_path / "train" / f"{i}.jpg", i)
    splits, lines, _ = found(tmp_path, train_per_class=limit)
    assert list(splits["train"].files) == [f"{i}.jpg" for i in range(6)][:limit]
    assert (f"the first {limit} of 6 images without classes" in text(lines)) == (limit < 6)


def test_limits_count_images_without_a_class_together(tmp_path):
    dataset(tmp_path)
    for name in ("0.jpg", "m.jpg", "z.jpg"):  # before, between and after the class folders
        draw(tmp_path / "train" / name)
    splits, _, _ = found(tmp_path, train_per_class=2)
    files = ["0.jpg", "cat/0.jpg", "cat/1.jpg", "dog/0.jpg", "dog/1.jpg", "m.jpg"]
    assert list(splits["train"].files) == files


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(train_per_class=-1), "train_per_class=-1 must be at least 0"),
        (dict(test_per_class=5, source="tfds"), "test_per_class=5 is for folders"),
    ],
)
def test_limits_without_meaning_are_refused(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        found(dataset(tmp_path), **options)


@pytest.mark.parametrize("name", ["val", "validation", "Test", "testing"])
def test_other_splits_beside_train_are_named(tmp_path, name):
    splits, lines, problem = found(dataset(tmp_path, test=name))
    assert splits["test"] is None
    assert problem == "there are no test images"
    assert f"not used {name}/; --config.data.test_split={name} would test on it" in text(lines)
    splits, lines, problem = found(tmp_path, test_split=name)
    assert len(splits["test"]) == 4
    assert "not used" not in text(lines)
    assert not problem


def test_other_folders_and_an_absent_split_are_named(tmp_path):
    dataset(tmp_path, test="notes")
    _, lines, _ = found(tmp_path, test_split="vall")
    assert "not used notes/" in text(lines)
    assert "test images none in vall/" in text(lines)
    (tmp_path / "vall").mkdir()
    splits, lines, _ = found(tmp_path, test_split="vall")
    assert splits["test"] is None
    assert "test images none in vall/" in text(lines)


@pytest.mark.parametrize(
    ("train", "test", "hint"),
    [
        ("pets/train", "pets/test", "the folder pets/ as --config.data.path"),
        ("coco/train_images", "coco/val2017", "the folder coco/ as --config.data.path"),
        ("Train", "Test", "--config.data.train_split=Train, --config.data.test_split=Test"),
        (
            "a/b/training",
            "a/b/val",
            "the folder a/b/ as --config.data.path, --config.data.train_split=training, "
            "--config.data.test_split=val",
        ),
    ],
)
def test_test_images_among_the_training_images_are_told(tmp_path, train, test, hint):
    splits, lines, _ = found(dataset(tmp_path, train, test))
    assert len(splits["train"]) == 10
    assert f"CAUTION 4 of the training images are in {test}/" in text(lines)
    assert f"to test on it, give {hint}" in text(lines)


@pytest.mark.parametrize(
    ("names", "listed"),
    [
        (("cat/0.txt", "cat/0.json", "cat/1.txt"), "2 .txt, 1 .json"),
        (("cat/Thumbs.db", "desktop.ini", ".DS_Store", "cat/._0.jpg"), "1 .db, 1 .ini"),
        (("LICENSE", "cat/0.xml"), "1 without suffix, 1 .xml"),
    ],
)
def test_other_files_are_counted_and_left_out(tmp_path, names, listed):
    dataset(tmp_path)
    for name in names:
        (tmp_path / "train" / name).write_text("{}")
    splits, lines, problem = found(tmp_path)
    assert not problem
    assert len(splits["train"]) == 6
    assert f"other files {listed}: left out (train/" in text(lines)


@pytest.mark.parametrize("target", ["..", "../..", "."])
def test_links_to_a_parent_folder_are_named_and_not_followed(tmp_path, target):
    dataset(tmp_path)
    (tmp_path / "train/cat/up").symlink_to(target)
    splits, lines, _ = found(tmp_path)
    assert len(splits["train"]) == 6
    assert "links train/cat/up -> " in text(lines)


def test_a_link_to_another_dataset_is_followed_once(tmp_path):
    dataset(tmp_path / "real", classes=("cat", "dog"))
    (tmp_path / "used/train").mkdir(parents=True)
    for name in ("cat", "dog"):
        (tmp_path / f"used/train/{name}").symlink_to(tmp_path / f"real/train/{name}")
    splits, lines, _ = found(tmp_path / "used")
    assert labels(splits["train"]) == [0, 0, 0, 1, 1, 1]
    assert "links" not in text(lines)


def test_classes_are_read_again_after_a_moment_without_storage():
    failures = [OSError(errno.EIO, "Input/output error")] * 3

    class Source:
        classes = ("a", "b")

        def __len__(self):
            return 4

        def record(self, index):
            if failures:
                raise failures.pop()
            return b"", index % 2

        def name(self, index):
            return str(index)

    assert known_labels(Source())[0].tolist() == [0, 1, 0, 1]
    assert not failures


def test_classes_are_chosen_without_a_cache(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tfds_source, "cache_folder", lambda: tmp_path / "file")
    (tmp_path / "file").touch()
    records = []
    for label in (0, 1, 1):
        example = tf_example_pb2.Example()
        example.features.feature["image"].bytes_list.value.append(b"")
        example.features.feature["label"].int64_list.value.append(label)
        records.append(example.SerializeToString())
    source = tfds_source.TfdsSource(records, "x", ("a", "b"), "image", "label", None)
    assert tfds_source._read_labels(source).tolist() == [0, 1, 1]
    assert "the labels are read again next time" in caplog.text
    monkeypatch.setattr(tfds_source, "cache_folder", lambda: tmp_path / "cache")
    tfds_source._read_labels(source)
    (cached,) = (tmp_path / "cache" / "labels").iterdir()
    cached.write_bytes(b"damaged")
    assert tfds_source._read_labels(source).tolist() == [0, 1, 1]


def test_records_without_a_class_are_told_and_no_probe_trains_on_them(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds_source, "cache_folder", lambda: tmp_path)
    draw(tmp_path / "a.png")
    records = []
    for label in (0, 1, -1, 1):
        example = tf_example_pb2.Example()
        feature = example.features.feature
        feature["image"].bytes_list.value.append((tmp_path / "a.png").read_bytes())
        if label >= 0:
            feature["label"].int64_list.value.append(label)
        records.append(example.SerializeToString())
    source = tfds_source.TfdsSource(records, "x", ("a", "b"), "image", "label", None)
    splits = {"train": source, "test": None}
    assert labels(source) == [0, 1, -1, 1]
    lines = inventory.describe(splits, {}, inventory.Places("", "train", "", "", 0))
    assert "train 4 images, 2 classes; of 4 that were read, 1 have no class" in text(lines)
    data = EvaluationData(splits, ConfigDict(), None, None)
    assert labels(only_labeled(data).sources["train"]) == [0, 1, 1]


def test_class_names_that_differ_in_case_are_named(tmp_path):
    dataset(tmp_path)
    draw(tmp_path / "train/Cat/0.jpg")
    if len(list((tmp_path / "train").iterdir())) < 3:
        pytest.skip("this file system does not tell case apart")
    _, lines, _ = found(tmp_path)
    assert "class names differ only in case: Cat, cat" in text(lines)
    assert "3 classes, 1 to 3 images each" in text(lines)


def test_sizes_and_modes_are_those_of_a_sample(tmp_path):
    dataset(tmp_path)
    draw(tmp_path / "train/cat/3.png", size=(700, 40), mode="L")
    (tmp_path / "train/cat/4.jpg").write_bytes(b"no image")
    _, lines, _ = found(tmp_path)
    assert (
        "sizes 12 x 10 to 700 x 40 pixels, RGB 6 + L 1, JPEG 6 + PNG 1 (8 read, 1 damaged); "
        "shrunk to 512"
    ) in text(lines)


def test_names_cannot_break_the_block(tmp_path):
    dataset(tmp_path)
    draw(tmp_path / "train" / "line\nbreak\x1b[31m.jpg")
    draw(tmp_path / "train" / f"{'long' * 50}.jpg")
    _, lines, _ = found(tmp_path)
    assert all(line.isprintable() for line in lines)


def test_an_empty_folder_is_refused_with_what_it_holds(tmp_path):
    (tmp_path / "a.heic").touch()
    (tmp_path / "b.heic").touch()
    with pytest.raises(UserError, match=r"no images .*\.jfif.* but other files: 2 \.heic"):
        found(tmp_path)


@pytest.mark.parametrize("suffix", [".jfif", ".jpe", ".JPE"])
def test_all_suffixes_of_jpegs_are_taken(tmp_path, suffix):
    draw(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").rename(tmp_path / f"a{suffix}")
    assert len(found(tmp_path)[0]["train"]) == 1


def test_a_folder_without_splits_is_described(tmp_path):
    dataset(tmp_path)
    (tmp_path / "a.txt").touch()
    listing = folder_listing.list_folder(tmp_path)
    lines = inventory.describe_folder(listing, lambda name: (tmp_path / name).read_bytes())
    assert lines[0].endswith(": 10 images")
    assert "other files 1 .txt" in text(lines)
    assert "12 x 10 pixels, RGB, JPEG (10 read)" in text(lines)


def test_a_part_that_is_held_out_keeps_images_without_a_class_for_training(tmp_path):
    dataset(tmp_path, count=10)
    shutil.rmtree(tmp_path / "test")
    draw(tmp_path / "train/stray.jpg")
    splits, lines, problem = found(tmp_path, held_out=0.1)
    assert not problem
    assert sorted(labels(splits["train"])) == [-1] + 9 * [0] + 9 * [1]
    assert labels(splits["test"]) == [0, 1]
    assert "held out 2 of 21 images, 2 classes, 1 images each" in text(lines)
