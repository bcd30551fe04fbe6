"""Datasets prepared from WebDataset shards, parquet, zip and lists: the same as from a folder."""

import gzip
import io
import json
import random
import re
import shutil
import subprocess
import sys
import tarfile
import time
import warnings
import zipfile

import conftest
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from lmim_jax.cli import prepare_data
from lmim_jax.configs import vit_b
from lmim_jax.data import sources
from lmim_jax.data.prepare import inputs, packed, tfds_writer, webdataset
from lmim_jax.utils import faults
from lmim_jax.utils.errors import UserError

CLASSES = ("cat", "dog")
LIST = ["cat/00.png", "dog/01.jpg"]


def serially(task, items, *_):
    """In place of several processes."""
    return map(task, items)


@pytest.fixture(autouse=True)
def _one_process(monkeypatch):
    monkeypatch.setattr(prepare_data, "_run_in_parallel", serially)


def open_input(*arguments, kind="", image="", label="", root=""):
    given = inputs.recognize([str(argument) for argument in arguments], kind)
    return inputs.open_splits(given, image, label, str(root), map)


def members(images, split):
    """{path below the split: bytes} of the images of a split, in order."""
    found = {}
    for path in sorted((images / split).rglob("*.*")):
        found[path.relative_to(images / split).as_posix()] = path.read_bytes()
    return found


def write_tar(path, entries, mode="w"):
    """A tar of (name, bytes)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, data in entries:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def samples(files, *, number=False):
    """Members of WebDataset samples: each image, its class, and something else."""
    for name, data in files.items():
        key = name.rpartition(".")[0]
        folder = name.partition("/")[0]
        label = str(CLASSES.index(folder)) if number else folder
        yield name, data
        yield f"{key}.cls", f"{label}\n".encode()
        yield f"{key}.json", json.dumps({"category": {"name": folder}, "id": 7}).encode()


def parts(files, count):
    """Some files in `count` runs."""
    for names in np.array_split(np.array(list(files), object), count):
        yield {name: files[name] for name in names}


def write_shards(folder, images, suffix=".tar", **options):
    for split in ("train", "test"):
        for number, files in enumerate(parts(members(images, split), 3)):
            path = folder / f"pets-{split}-{number:04d}{suffix}"
            write_tar(path, samples(files, **options), "w:gz" if suffix.endswith("gz") else "w")
    return folder


IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def features(**columns):
    """The metadata that the library `datasets` writes."""
    return {"huggingface": json.dumps({"info": {"features": columns}})}


def table(files, *, names=CLASSES, **columns):
    """A table as the library `datasets` writes it."""
    rows = [{"bytes": data, "path": name} for name, data in files.items()]
    labels = [CLASSES.index(name.partition("/")[0]) for name in files]
    data = {"label": pa.array(labels, pa.int64()), "image": pa.array(rows, IMAGE), **columns}
    described = features(
        image={"_type": "Image"}, label={"_type": "ClassLabel", "names": list(names)}
    )
    return pa.table(data).replace_schema_metadata(described)


def write_parquet(folder, images):
    (folder / "data").mkdir(parents=True)
    for split in ("train", "test"):
        for number, files in enumerate(parts(members(images, split), 2)):
            path = folder / "data" / f"{split}-{number:05d}-of-00002.parquet"
            parquet.write_table(table(files), path, row_group_size=7)
    return folder


def write_zip(path, images, top=""):
    files = {}
    for split in ("test", "train"):
        for name, data in members(images, split).items():
            files[f"{split}/{name}"] = data
    names = list(files)
    random.Random(0).shuffle(names)  # a zip has no order
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(f"{top}{name}", files[name])
        archive.writestr(f"{top}README.md", "pets")
        archive.writestr(f"__MACOSX/{top}train/._x.jpg", "x")
    return path


def write_list(path, images):
    names = [f"{split}/{name}" for split in ("train", "test") for name in members(images, split)]
    lines = [str(images / name) if number % 2 else name for number, name in enumerate(names)]
    path.write_text("\n".join(lines) + "\n")
    return path


def make(kind, images, folder):
    """Arguments and options of an input of this kind."""
    folder.mkdir(exist_ok=True)
    if kind == "csv":
        rows = ["image,label"]
        for split in ("train", "test"):
            for name in members(images, split):
                rows.append(f"./{split}/{name},{name.partition('/')[0]}")
        path = folder / "pets.csv"
        path.write_text("\n".join(rows))
        return [path], {"root": images}
    if kind == "txt":
        return [write_list(folder / "pets.txt", images)], {"root": images}
    if kind == "zip":
        return [write_zip(folder / "pets.zip", images, "pets/")], {}
    if kind == "parquet":
        return [write_parquet(folder / "pets", images)], {}
    if kind == "json":
        return [write_shards(folder, images)], {"label": "json.category.name"}
    suffix = {"tar": ".tar", "gz": ".tar.gz", "braces": ".tar"}[kind]
    write_shards(folder, images, suffix)
    if kind == "braces":
        return [folder / "pets-{train,test}-{0000..0002}.tar"], {}
    return [folder], {}


def records(dataset):
    """All records of a prepared dataset, by file."""
    from array_record.python import array_record_module

    found = {}
    for path in sorted(dataset.glob("*.array_record*")):
        reader = array_record_module.ArrayRecordReader(str(path))
        found[path.name] = reader.read_all()
    return found


def in_order(dataset):
    """The records of the test and of the training images, in order."""
    return [record for file in records(dataset).values() for record in file]


@pytest.fixture(scope="module")
def from_folder(images, tmp_path_factory):
    """The dataset that a folder gives, in shards of 16 KiB."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_data, "_run_in_parallel", serially)
        patch.setattr(tfds_writer, "SHARD_BYTES", 1 << 14)
        out = tmp_path_factory.mktemp("from_folder")
        return prepare_data.convert(prepare_data.open_splits(images), out, "pets", 0, 1)


KINDS = ["tar", "gz", "json", "braces", "parquet", "zip", "txt", "csv"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_what_the_folder_gives(kind, images, from_folder, tmp_path, monkeypatch):
    """[the same bytes, also where the first attempt ends after two shards]"""
    arguments, options = make(kind, images, tmp_path)
    opened = open_input(*arguments, **options)
    assert {split: source.classes for split, source in opened.splits.items()} == {
        "train": CLASSES,
        "test": CLASSES,
    }
    monkeypatch.setattr(tfds_writer, "SHARD_BYTES", 1 << 14)

    def interrupted(task, tasks, *_):
        for item in list(tasks)[:2]:
            yield task(item)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare_data, "_run_in_parallel", interrupted)
        prepare_data.convert(opened.splits, tmp_path / "out", "pets", 0, 1)
    again = open_input(*arguments, **options)
    dataset = prepare_data.convert(again.splits, tmp_path / "out", "pets", 0, 1)
    assert prepare_data.verify(dataset, 3)[1] == []
    assert in_order(dataset) == in_order(from_folder)
    assert len(records(dataset)) > 4
    if kind == "parquet":  # whose images have sizes that are only known about
        return
    assert records(dataset) == records(from_folder)
    ours = json.loads((dataset / tfds_writer.MANIFEST).read_text())
    theirs = json.loads((from_folder / tfds_writer.MANIFEST).read_text())
    assert ours == theirs, "checksums"
    info = (dataset / "dataset_info.json").read_text()
    assert info == (from_folder / "dataset_info.json").read_text()


def test_a_prepared_dataset_is_opened_by_its_folder(images, from_folder):
    """[as `lmim train DIR` opens it: the folder of the dataset, or of its version]"""
    for folder in (from_folder, from_folder.parent):
        config = vit_b.data()
        config.path = str(folder)
        assert sources.kind(config) == "tfds"
        splits = sources.open_splits(config)
        assert (len(splits["train"]), len(splits["test"])) == (48, 16)
    config.test_split = "val"
    assert sources.open_splits(config)["test"] is None, "as of a folder"
    config.test_split = "train[75%:]"
    assert len(sources.open_splits(config)["test"]) == 12
    config.path = str(images)
    assert sources.kind(config) == "folder"
    config.path = str(from_folder.parent.parent)
    with pytest.raises(UserError, match=f"of a prepared dataset: give {from_folder}"):
        sources.open_splits(config)


# WebDataset


def png(color=0):
    stream = io.BytesIO()
    Image.new("L", (8, 8), color).save(stream, "PNG")
    return stream.getvalue()


def test_samples_are_grouped_by_key_and_images_are_found(tmp_path):
    path = tmp_path / "a.tar"
    entries = [
        ("./x.y/1.seg.png", png(1)),
        ("./x.y/1.JPG", png(2)),
        ("./x.y/2.image.webp", png(3)),
        ("3.cls", b"3"),
        ("3.txt", b"a caption"),
        ("README", b"no sample"),
        ("._4.jpg", b"hidden"),
        ("4.npy", b"an array beside an image"),
        ("4.png", png(4)),
        ("5.png", png(5)),
        ("5.cls", b" -1 "),
        ("x.y/1.cls", b"10\n"),  # not beside its image
        ("x.y/2.cls", b"9"),
        ("6.png", b"damaged"),
        ("6.cls", b""),
    ]
    write_tar(path, entries)
    opened = open_input(path)
    source = opened.splits["train"]
    assert list(source.files) == ["x.y/1.JPG", "x.y/2.image.webp", "4.png", "5.png", "6.png"]
    assert [source.record(i)[0] for i in range(3)] == [png(2), png(3), png(4)]
    assert source.classes == ("9", "10"), "sorted as numbers"
    assert source.labels.array.tolist() == [1, 0, -1, -1, -1]
    assert opened.left_out == {"samples without an image": 1}
    assert source.name(1) == f"{path}/x.y/2.image.webp"
    assert open_input(path, label="none").splits["train"].classes == ()
    masks = open_input(path, image="seg.png")
    assert list(masks.splits["train"].files) == ["x.y/1.seg.png"]
    assert masks.left_out == {"samples without a .seg.png": 5}


def test_a_tar_in_capital_letters_is_one(tmp_path):
    path = tmp_path / "A.TAR"
    write_tar(path, [("1.png", png(1))])
    assert open_input(path).splits["train"].record(0)[0] == png(1)


@pytest.mark.parametrize(
    ("entries", "options", "message"),
    [
        ([("1.jpg", b""), ("1.png", b"")], {}, "'1' holds several images .jpg, png.*--image=jpg"),
        ([("1.jpg", b""), ("1.jpg", b"")], {}, "holds '1.jpg' twice, at bytes 512 and 1,024"),
        ([("1.jpg", b""), ("1.cls", b"\xff")], {}, "a.tar, 1.cls cannot be read as a label"),
        (
            [("1.jpg", b""), ("1.json", b"{")],
            {"label": "json.x"},
            "a.tar, 1.json cannot be read as a label",
        ),
        (
            [("1.jpg", b""), ("1.json", b'{"x": 0.5}')],
            {"label": "json.x"},
            "1.json: x is '0.5', which is no class",
        ),
        ([("1.txt", b"")], {}, "no training images; 1 samples without an image"),
        ([], {}, "no training images; it is empty"),
    ],
)
def test_shards_that_cannot_be_used_are_named(entries, options, message, tmp_path):
    path = tmp_path / "a.tar"
    write_tar(path, entries)
    with pytest.raises(UserError, match=message):
        open_input(path, **options)


def test_a_truncated_shard_is_named_wherever_it_ends(tmp_path):
    path = tmp_path / "cut.tar"
    entries = [(f"{i}.png", png(i) + bytes(500 * i)) for i in range(4)]
    write_tar(path, entries)
    whole = path.read_bytes()
    (*_, last) = webdataset.members(str(path), path.open("rb"))
    end = last.start + -(-last.size // 512) * 512
    for size in (*range(0, end + 512, 129), end - 1, end, end + 1, end + 511):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=rf"{path} is truncated or damaged at byte \d"):
            open_input(path)
    path.write_bytes(whole[: end + 512])  # one block of zeros is an end
    assert len(open_input(path).splits["train"]) == 4
    damaged = bytearray(whole)
    damaged[last.start - 512 + 100] ^= 1  # in the last header
    path.write_bytes(damaged)
    where = last.start - 512
    with pytest.raises(UserError, match=rf"at byte {where:,}, after .* '2.png' .*no header"):
        open_input(path)
    packed_path = tmp_path / "cut.tar.gz"
    compressed = gzip.compress(whole)
    for data in (compressed[:-20], compressed[:40] + b"x" + compressed[41:], whole, b""):
        packed_path.write_bytes(data)
        with pytest.raises(UserError, match=rf"{packed_path} is truncated or damaged at byte"):
            open_input(packed_path)


def test_a_shard_is_not_held_in_memory(tmp_path):
    """[a tar of 16 MB costs less than 4]"""
    import tracemalloc

    path = tmp_path / "big.tar.gz"
    write_tar(path, [(f"{i}.png", bytes(1 << 20)) for i in range(16)], "w:gz")
    tracemalloc.start()
    source = open_input(path).splits["train"]
    for index in (0, 9, 15):
        assert len(source.record(index)[0]) == 1 << 20
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 << 20


# Parquet


def test_columns_are_found_by_type_and_name(tmp_path):
    path = tmp_path / "x.parquet"
    rows = [{"bytes": png(i), "path": None} for i in range(3)]
    words = pa.array(["b", None, "a"])
    images = pa.array(rows, IMAGE)
    parquet.write_table(pa.table({"photo": images, "label": words, "text": words}), path)
    source = open_input(path).splits["train"]
    assert (source.classes, source.labels.array.tolist()) == (("a", "b"), [1, -1, 0])
    assert list(source.files) == ["x[0]", "x[1]", "x[2]"]
    assert [source.record(i)[0] for i in (2, 0, 1)] == [png(2), png(0), png(1)]
    coarse = pa.array([5, 5, 7], pa.uint8())
    plain = pa.array([png(i) for i in range(3)], pa.large_binary())
    parquet.write_table(pa.table({"photo": plain, "group": coarse}), path)
    assert open_input(path).splits["train"].classes == ()
    grouped = open_input(path, label="group").splits["train"]
    assert (grouped.classes, grouped.record(2)) == (("5", "7"), (png(2), 1))


def test_labels_of_hugging_face_keep_their_numbers_and_names(images, tmp_path):
    """[classes without images count, and -1 is none]"""
    path = tmp_path / "train.parquet"
    files = members(images, "test")
    labels = pa.array([2, -1, *[0] * 14], pa.int64())
    names = ("cat", "dog", "emu")
    parquet.write_table(table(files, names=names, label=labels), path)
    source = open_input(path).splits["train"]
    assert source.classes == names
    assert source.labels.array.tolist() == [2, -1, *[0] * 14]


def bad_tables(images):
    files = members(images, "test")
    good = table(files)
    only_paths = pa.array([{"bytes": None, "path": name} for name in files], IMAGE)
    two = {"a": good["image"], "b": good["image"]}
    fine = {"fine": good["label"], "coarse": good["label"], "image": good["image"]}
    label = {"_type": "ClassLabel", "names": list(CLASSES)}
    described = features(image={"_type": "Image"}, fine=label, coarse=label)
    return {
        "paths of images, but not the images": (good.set_column(1, "image", only_paths), {}),
        "no column of images.*label .int64": (good.select(["label"]), {}),
        r"several columns of images \(a, b\).*--image=a": (pa.table(two), {}),
        "--label=age: .* has no such column; it has label": (good, {"label": "age"}),
        "--image=photo: .* has no such column": (good, {"image": "photo"}),
        "the column label is int64, and holds no images": (good, {"image": "label"}),
        r"several columns of classes \(fine, coarse\).*--label=fine": (
            pa.table(fine).replace_schema_metadata(described),
            {},
        ),
        "the column image is struct.*, and holds no classes": (good, {"label": "image"}),
        "the label 1 is none of 1 classes": (table(files, names=("cat",)), {}),
    }


@pytest.mark.parametrize("number", range(9))
def test_parquet_that_cannot_be_used_is_named(number, images, tmp_path):
    message, (content, options) = list(bad_tables(images).items())[number]
    path = tmp_path / "x.parquet"
    parquet.write_table(content, path)
    with pytest.raises(UserError, match=message):
        open_input(path, **options)


def test_damaged_and_different_parquet_files_are_named(images, tmp_path):
    folder = write_parquet(tmp_path / "pets", images)
    path = folder / "data" / "train-00001-of-00002.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(UserError, match=rf"{path} is no whole parquet file"):
        open_input(folder)
    source = table(members(images, "test"), names=("dog", "cat"))
    parquet.write_table(source, path)
    with pytest.raises(UserError, match=r"train-00001.* and .*differ in their columns"):
        open_input(folder)
    damaged = bytearray(content)
    damaged[4:400] = bytes(396)  # the header of the first pages
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=rf"{path} is damaged in row group 0"):
        opened = open_input(folder)
        prepare_data.convert(opened.splits, tmp_path / "out", "pets", 0, 1)
    path.write_bytes(content)  # the same command, where the file was fetched again
    prepare_data.convert(open_input(folder).splits, tmp_path / "out", "pets", 0, 1)


# Zip


def test_a_zip_without_splits(images, tmp_path):
    """[folders are classes if all images are in one; a folder around everything is skipped]"""
    path = tmp_path / "x.zip"
    for loose, classes in ((False, CLASSES), (True, ())):
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in members(images, "train").items():
                archive.writestr(f"a/b/{name}", data)
            if loose:
                archive.writestr("a/b/x.png", png())
        source = open_input(path).splits["train"]
        assert (len(source), source.classes) == (48 + loose, classes)
        assert source.files[0] == ("b/cat/00.png" if loose else "cat/00.png")


def test_odd_zip_files_are_named(images, tmp_path):
    path = tmp_path / "x.zip"
    whole = write_zip(path, images).read_bytes()
    path.write_bytes(whole[:-300])
    with pytest.raises(UserError, match=rf"{path} is no whole zip file"):
        open_input(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "")
    with pytest.raises(UserError, match=r"no images in this zip file; 1 .txt files"):
        open_input(path)
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
        warnings.simplefilter("ignore")
        for content in (png(1), png(1)):
            archive.writestr("a.png", content)
    opened = open_input(path)
    assert (len(opened.splits["train"]), opened.left_out) == (1, {"files that occur twice": 1})
    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr("a.png", png(2))
    with pytest.raises(UserError, match=r"two different files of the name 'a.png'"):
        open_input(path)
    locked = bytearray(whole)
    entry = locked.find(b"PK\1\2")
    while entry >= 0:
        locked[entry + 8] |= 1  # the flag of encryption, of each member
        entry = locked.find(b"PK\1\2", entry + 4)
    path.write_bytes(locked)
    with pytest.raises(UserError, match=r"x.zip is encrypted"):
        open_input(path)


def test_damaged_members_and_bombs_are_bad_images(tmp_path):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("bomb.bmp", bytes(70 << 20))
        archive.writestr("cut.png", png(3) * 9)
        archive.writestr("fine.png", png(4))
        (_, cut, _) = archive.infolist()
    content = bytearray(path.read_bytes())
    content[cut.header_offset + 45] ^= 255
    path.write_bytes(content)
    dataset = prepare_data.convert(open_input(path).splits, tmp_path, "odd", 0, 1)
    bad = (dataset / tfds_writer.BAD).read_text().splitlines()
    assert len(bad) == 2
    assert "x.zip/bomb.bmp: " in bad[0] and "a zip bomb" in bad[0]
    assert "x.zip/cut.png: " in bad[1]
    assert prepare_data.verify(dataset, 9)[1] == []


# Lists


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "x.jpg\n\nREADME\n", "a.txt, line 3: 'README' is no path of an image"),
        ("a.txt", "x.jpg 1\ny.jpg\n", "a.txt, line 2: only some lines end with the number"),
        ("a.txt", "", "a.txt is empty"),
        ("a.txt", "x.jpg\n", "none of its 1 files is there, such as .*x.jpg.*--root=DIR"),
        ("a.csv", "image,label\nx.jpg,\n", "a.csv, line 2: the cell of column label is empty"),
        ("a.csv", "file,label\nx.jpg,1\n", "a.csv, line 1: the header needs a column named image"),
        ("a.csv", "image,age\nx.jpg,3.5\n", "a.csv holds regression labels, .*--label=none"),
        ("a.csv", "image,split\nx.jpg,test\n", "no image is of the split train, but of: test"),
    ],
)
def test_lists_that_cannot_be_used_are_named(name, text, message, tmp_path):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        open_input(path)


def test_lists_keep_their_order_and_missing_files_are_bad_images(images, tmp_path):
    path = tmp_path / "list.txt"
    names = ["dog/01.jpg", "cat/00.png", "cat/99.png", "dog/00.png"]
    path.write_text("".join(f"{name} {number}\n" for number, name in enumerate(names, 3)))
    source = open_input(path, root=images / "train").splits["train"]
    assert list(source.files) == names
    assert (source.classes, source.record(3)[1]) == (("3", "4", "5", "6"), 3)
    dataset = prepare_data.convert({"train": source}, tmp_path, "listed", 0, 1)
    assert "cat/99.png: " in (dataset / tfds_writer.BAD).read_text()
    table_path = tmp_path / "list.csv"
    table_path.write_text("image,age\ndog/01.jpg,3.5\n")
    as_list = open_input(table_path, root=images / "train", label="none")
    assert as_list.splits["train"].classes == ()


# What is given


def test_ambiguous_and_unknown_inputs_are_refused(images, tmp_path):
    folder = write_shards(tmp_path / "a", images)
    (folder / "x.png").write_bytes(png())
    with pytest.raises(UserError, match=r"1 images .--kind=folder. and 6 .tar files .--kind=webd"):
        open_input(folder)
    assert len(open_input(folder, kind="webdataset").splits["train"]) == 48
    (folder / "x.png").unlink()
    write_parquet(folder / "b", images)
    with pytest.raises(UserError, match=r"4 .parquet files .--kind=parquet. and 6 .tar files"):
        open_input(folder)
    tar = folder / "pets-train-0000.tar"
    with pytest.raises(UserError, match=r"is webdataset and .* is parquet: prepare them as two"):
        open_input(tar, folder / "b")
    with pytest.raises(UserError, match=r"pets-train-0003.tar: there is no such file"):
        open_input(str(folder / "pets-train-{0000..0003}.tar"))
    (tmp_path / "x.rar").write_bytes(b"")
    with pytest.raises(UserError, match=r"x.rar: what is this\? Known are .tar"):
        open_input(tmp_path / "x.rar")
    with pytest.raises(UserError, match="give one zip at a time"):
        open_input(write_zip(tmp_path / "1.zip", images), write_zip(tmp_path / "2.zip", images))
    with pytest.raises(UserError, match=r"holds no .parquet files"):
        open_input(images, kind="parquet")
    assert inputs.recognize([str(images)]).kind == "folder"


def test_numbers_in_braces_count_up():
    assert inputs.expand("a{08..11}") == ["a08", "a09", "a10", "a11"]
    with pytest.raises(UserError, match=r"a-\{10\.\.05\}\.tar: \{10\.\.05\} counts down, from 10"):
        inputs.recognize(["a-{10..05}.tar"])


def test_splits_by_names(images, tmp_path):
    for name, split in {
        "train-00000-of-00010.parquet": "train",
        "imagenet1k-validation-00.tar": "validation",
        "cc_val2017_003.tar": "val",
        "default/test/0000.parquet": "test",
        "contest-0001.tar": "",
        "train_or_test.tar": "",
    }.items():
        assert inputs.split_of(f"/validation/{name}", "/validation") == split
    one = inputs.Given("webdataset", ("/a/test-0.tar", "/a/test-1.tar"), ("/a", "/a"))
    assert inputs.split_files(one) == {"train": ["/a/test-0.tar", "/a/test-1.tar"]}
    for names, message in {
        ("test-0.tar", "val-0.tar"): "splits test and val, none for training",
        ("train-0.tar", "x-0.tar"): "/a/x-0.tar tells no split, but /a/train-0.tar is of train",
    }.items():
        paths = tuple(f"/a/{name}" for name in names)
        with pytest.raises(UserError, match=message):
            inputs.split_files(inputs.Given("webdataset", paths, ("/a", "/a")))


def test_a_full_disk_is_found_before_anything_is_written(images, tmp_path, monkeypatch):
    opened = open_input(write_zip(tmp_path / "x.zip", images))
    usage = prepare_data.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(prepare_data.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=rf"needs about .* GB, and {tmp_path} has .* left"):
        prepare_data.convert(opened.splits, tmp_path / "out", "pets", 0, 1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["tar", "zip", "txt"])
def test_an_archive_that_is_gone_is_not_a_folder_of_bad_images(kind, images, tmp_path, monkeypatch):
    copied = tmp_path / "images"
    shutil.copytree(images, copied)
    arguments, options = make(kind, copied, tmp_path / "in")
    opened = open_input(*arguments, **options)
    for folder in (tmp_path / "in", copied):
        folder.rename(folder.with_name(f"{folder.name}_unmounted"))
    packed.opened.cache_clear()
    monkeypatch.setattr(faults, "RETRY_SECONDS", 0.0)
    with pytest.raises(faults.ReadFailed, match="is gone; is its file system mounted"):
        prepare_data.convert(opened.splits, tmp_path / "out", "pets", 0, 1)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("folder", ("jpg", "", ""), "--image=jpg: there is no such option for a folder"),
        ("folder", ("", "cls", ""), "--label=cls: for a folder only --label=none"),
        ("zip", ("", "cls", ""), "--label=cls: for a zip only --label=none"),
        ("list", ("", "label", ""), "--label=label: for a list only --label=none"),
        ("webdataset", ("", "", "x"), "--root=x is for lists of files, and this is a webdataset"),
    ],
)
def test_options_of_other_kinds_are_refused(kind, options, message):
    inputs.check_options(kind, "", "none", "")
    with pytest.raises(UserError, match=re.escape(message)):
        inputs.check_options(kind, *options)


def test_a_label_that_no_sample_has_is_named(images, tmp_path):
    folder = write_shards(tmp_path / "a", images)
    assert open_input(folder, label="CLS").splits["train"].classes == CLASSES
    with pytest.raises(UserError, match="--label=txt is in no sample"):
        open_input(folder, label="txt")


def test_classes_of_a_folder_can_be_left_out(images, tmp_path):
    labeled = prepare_data.open_splits(images)["train"]
    plain = prepare_data.open_splits(images, labeled=False)["train"]
    assert labeled.classes == CLASSES
    assert (plain.classes, plain.record(0)[1], len(plain)) == ((), -1, len(labeled))
    assert plain.identity() != labeled.identity()


def test_other_labels_are_another_dataset(images, tmp_path):
    folder = write_shards(tmp_path / "a", images)
    prepare_data.convert(open_input(folder).splits, tmp_path, "pets", 0, 1)
    with pytest.raises(UserError, match="holds something else"):
        prepare_data.convert(open_input(folder, label="none").splits, tmp_path, "pets", 0, 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tar", "gz", "parquet", "zip", "txt"])
def test_killed_and_resumed_a_command_makes_the_same_bytes(kind, tmp_path):
    """[SIGKILL while the second of several shards is written]"""
    rng = np.random.default_rng(0)
    images = tmp_path / "images"
    for number in range(2000):
        path = images / "train" / CLASSES[number % 2] / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(path)
    (images / "test").mkdir()
    for name in LIST:
        path = images / "test" / name
        path.parent.mkdir()
        path.write_bytes(png())
    arguments, options = make(kind, images, tmp_path / "input")
    whole = prepare_data.convert(
        open_input(*arguments, **options).splits, tmp_path / "whole", "pets", 0, 1, shard_mb=1
    )
    given = [*arguments, f"--out={tmp_path}/killed", "--name=pets", "--shard_mb=1", "--processes=1"]
    given += [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, "-m", "lmim_jax.cli", "prepare", *map(str, given)]
    out = tmp_path / "killed" / "pets" / "1.0.0"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    killed = subprocess.Popen(command, cwd=conftest.ROOT, **pipes)
    deadline = time.monotonic() + 240
    while not any(out.glob("*.array_record*")):
        assert killed.poll() is None, killed.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    killed.kill()
    killed.communicate()
    assert not (out / tfds_writer.MANIFEST).exists()
    again = subprocess.run(command, cwd=conftest.ROOT, timeout=300, check=False, **pipes)
    assert again.returncode == 0, again.stdout
    assert "2,000 training and 2 test images" in again.stdout
    for path in whole.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name
    assert len(records(whole)) > 4
