"""Labels and lists from CSV files, for folders and prepared datasets; what is said about them."""

import dataclasses

import numpy as np
import pytest
from test_inventory import dataset, draw, found, labels, text

from lmim_jax.data import tfds_source
from lmim_jax.data.shared_array import share
from lmim_jax.utils.errors import UserError


def write(folder, *rows):
    """A CSV file beside a folder, with these rows; its path."""
    path = folder.parent / f"{folder.name}.csv"
    path.write_text("\n".join(rows) + "\n")
    return str(path)


def names(source):
    return list(source.files)


@pytest.fixture
def flat(tmp_path):
    """A folder of six images in no subfolders."""
    for i in range(6):
        draw(tmp_path / "flat" / f"{i}.png", i)
    return tmp_path / "flat"


def test_classes_and_a_split(flat):
    rows = ["image,label,split", "3.png,cat,train", "1.png,dog,train", "0.png,dog,test"]
    file = write(flat, *rows, "2.png,emu,test", "4.png,dog,val")
    splits, lines, problem = found(flat, labels=file)
    assert names(splits["train"]) == ["1.png", "3.png"]
    assert splits["train"].classes == ("cat", "dog")
    assert labels(splits["train"]) == [1, 0]
    assert labels(splits["test"]) == [1, -1]  # no class of the training images
    assert problem == "all labeled test images are of one class, 'dog'"
    assert "classes: 5 rows, 3 classes; another kind: --config.data.labels_kind=multi" in text(
        lines
    )
    assert "train 2 of 6 images, 2 classes, 1 images each" in text(lines)
    assert "not used 1 rows of split val" in text(lines)
    again = found(flat, labels=write(flat, *[row.replace("dog", "cow") for row in rows]))[0]
    assert again["train"].identity() != splits["train"].identity()


def test_several_labels_and_numbers(flat):
    rows = ["image,cat,dog", "0.png,1,0", "1.png,1,1", "2.png,0,0", "5.png,1,0"]
    splits, lines, _ = found(flat, labels=write(flat, *rows), held_out=0.25)
    train, test = splits["train"], splits["test"]
    assert (len(train), len(test)) == (3, 1)
    assert train.targets.kind == "multilabel"
    given = {row[:5]: [int(row[6]), int(row[8])] for row in rows[1:]}
    for source in (train, test):
        for name, values in zip(names(source), source.targets.values, strict=True):
            assert values.tolist() == given[name]
    assert "no row 2 images are not in the file: 3.png, 4.png" in text(lines)
    assert "train 3 of 6 images, 2 labels: cat" in text(lines)
    splits, lines, _ = found(flat, labels=write(flat, *rows), labels_kind="regression")
    assert splits["train"].targets.kind == "regression"
    assert splits["test"] is None
    assert "2 labels: cat 0 .. 1, dog 0 .. 1" in text(lines)
    assert "--config.data.labels_kind=regression" in text(lines)


def test_a_list_keeps_the_classes_of_folders(tmp_path):
    root = dataset(tmp_path / "a")
    rows = ["image", "train/dog/1.jpg", "train/cat/0.jpg", "test/dog/0.jpg", "test/cat/1.jpg"]
    splits, lines, problem = found(root, labels=write(root, *rows))
    assert not problem
    assert names(splits["train"]) == ["train/cat/0.jpg", "train/dog/1.jpg"]
    assert labels(splits["test"]) == [0, 1]
    assert "list: 4 rows, images, without labels" in text(lines)
    only = tmp_path / "only.txt"
    only.write_text("\n dog \n")
    splits = found(root, labels=write(root, *rows), classes=str(only))[0]
    assert names(splits["train"]) == ["train/dog/1.jpg"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["0.png,a", "x.png,b"], r"flat.csv, line 3: there is no image 'x.png' in .*1 of 2 rows"),
        (["0,a", "1,b"], r"line 2: there is no image '0' in .*\(is '0.png' meant\?\)"),
    ],
)
def test_rows_without_an_image_are_named(flat, rows, message):
    with pytest.raises(UserError, match=message):
        found(flat, labels=write(flat, "image,label", *rows))


@pytest.mark.parametrize("again", ["1.png", "{root}/1.png"])
def test_an_image_in_two_splits_is_named(flat, again):
    rows = ["0.png,a,train", "1.png,b,train", f"{again.format(root=flat)},b,test"]
    message = r"line 4: '1.png' is already in .*line 3, of the split train"
    with pytest.raises(UserError, match=message):
        found(flat, labels=write(flat, "image,label,split", *rows))


def test_few_rows_without_an_image_are_missing_files(flat):
    file = write(flat, "image,label", "0.png,a", "x.png,b", "1.png,b")
    _, lines, _ = found(flat, labels=file, max_bad_fraction=0.4)
    assert "CAUTION 1 rows without an image" in text(lines)


def test_a_split_that_is_not_there_is_named(tmp_path, flat):
    file = write(flat, "image,label,split", "0.png,a,Train", "1.png,b,Train")
    with pytest.raises(UserError, match=r"no row is of the split .*'train'; the file has: Train"):
        found(flat, labels=file)
    root = dataset(tmp_path / "a")
    with pytest.raises(UserError, match=r"line 2: 'cat/0.jpg' is not in a subfolder of .*train/"):
        found(root, labels=write(root, "image,label", "cat/0.jpg,a"))


class Records:
    """Records of a prepared dataset that know their file names."""

    def __init__(self, files, labels=None):
        from tensorflow_datasets.proto import tf_example_pb2

        self.examples = []
        for file, label in zip(files, labels or [7] * len(files), strict=True):
            example = tf_example_pb2.Example()
            example.features.feature["image"].bytes_list.value.append(file.encode())
            example.features.feature["file"].bytes_list.value.append(file.encode())
            example.features.feature["label"].int64_list.value.append(label)
            self.examples.append(example.SerializeToString())

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        return self.examples[index]


@pytest.fixture
def prepared(monkeypatch):
    """A dataset of four records in either split."""

    def open_tfds(name, folder, split, *rest):
        files = Records([f"{split}/{i}.jpg" for i in range(4)])
        return tfds_source.TfdsSource(files, f"d/{split}", ("x",) * 9, "image", "label", None)

    monkeypatch.setattr(tfds_source, "open_tfds", open_tfds)


@pytest.mark.parametrize("name", ["{}", "{split}/{}.jpg"])
def test_prepared_datasets_by_number_or_file_name(tmp_path, prepared, name):
    def rows(header, *labels):
        lines = [header]
        for number, split, label in labels:
            lines.append(f"{name.format(number, split=split)},{split},{label}")
        return write(tmp_path, *lines)

    given = [(3, "train", "b"), (1, "train", "a"), (0, "test", "b")]
    splits, _, _ = found("", source="tfds", labels=rows("image,split,label", *given))
    assert labels(splits["train"]) == [0, 1]
    assert splits["train"].record(1)[0] == b"train/3.jpg"
    assert labels(splits["test"]) == [1]
    assert splits["test"].classes == ("a", "b")
    given = [(3, "train", 2.5), (1, "train", 1), (2, "test", 3)]
    splits, lines, _ = found("", source="tfds", labels=rows("image,split,age", *given))
    np.testing.assert_array_equal(splits["train"].targets.values, [[1], [2.5]])
    assert labels(splits["train"]) == [-1, -1]
    assert "train 2 images, 1 labels: age 1 .. 2.5" in text(lines)
    with pytest.raises(UserError, match=r"line 5: there is no record .* among the 4 of d/train"):
        found("", source="tfds", labels=rows("image,split,label", *given, (4, "train", "a")))


def test_a_record_twice_is_named(tmp_path, prepared):
    rows = ["image,label,split", "1,a,train", "2,b,train", "01,a,train"]
    with pytest.raises(UserError, match=r"line 4: the same record as in .*line 2"):
        found("", source="tfds", labels=write(tmp_path, *rows))


def test_classes_are_chosen_among_the_images_of_a_list(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    records = Records([f"{i}.jpg" for i in range(6)], [0, 0, 1, -1, 1, 0])
    stored = tfds_source.TfdsSource(records, "d/train", ("x", "y"), "image", "label", None)
    listed = dataclasses.replace(stored, kept=share(np.array([2, 3, 4, 5])))
    for source, places in ((stored, [0, 1, 2, 4, 5]), (listed, [2, 4, 5])):
        chosen = tfds_source.select_classes(source, ("y", "x"))
        assert [chosen.record(i)[0].decode() for i in range(len(chosen))] == [
            f"{place}.jpg" for place in places
        ]
        assert labels(chosen) == [[1, 1, 0, None, 0, 1][place] for place in places]
