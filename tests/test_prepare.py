"""Prepared datasets: from a folder and from TFRecord files, killed and resumed, read, verified."""

import dataclasses
import io
import json
import os
import pathlib
import shutil
import signal
import struct
import subprocess
import sys
import time

import conftest
import google_crc32c
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from lmim_jax.cli import prepare_data
from lmim_jax.configs import vit_b
from lmim_jax.data import decode, loader, sources, tfds_source
from lmim_jax.data.image_options import ImageOptions
from lmim_jax.data.prepare import tfds_writer
from lmim_jax.distributed import sharding
from lmim_jax.utils.errors import UserError

DATA = vit_b.data().to_dict() | dict(
    source="tfds",
    path="",
    name="pets",
    dir="",
    train_split="train",
    test_split="test",
    classes="",
    train_per_class=0,
    test_per_class=0,
    canvas=40,
    channels=3,
    workers=0,
    threads=2,
    timeout=60.0,
    max_bad_fraction=0.2,
    resize_on="device",
)


def config(**change):
    return ConfigDict({**DATA, **{name: str(value) for name, value in change.items()}})


@pytest.fixture(scope="module")
def pets(images, tmp_path_factory):
    """The folder of the tests as a dataset."""
    out = tmp_path_factory.mktemp("prepared")
    return prepare_data.convert(prepare_data.open_splits(images), out, "pets", 0, 1)


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_folder_becomes_a_dataset_with_the_same_images(images, pets):
    for split, count in (("train", 48), ("test", 16)):
        ours, theirs = (
            sources.from_config(config(dir=pets.parent.parent), split),
            sources.open_folder(images, split),
        )
        assert (len(ours), ours.classes) == (count, ("cat", "dog"))
        assert [ours.record(i) for i in range(count)] == [theirs.record(i) for i in range(count)]
    assert ours.name(3) == "pets/1.0.0/test[3]"
    assert ours.identity() == {"source": "pets/1.0.0/test", "images": 16}
    assert not (pets / tfds_writer.UNFINISHED).exists()
    assert (pets / tfds_writer.BAD).read_text() == ""


def test_folder_and_dataset_give_the_same_batches(images, pets):
    streams = []
    for data in (config(dir=pets.parent.parent), config(source="folder", path=images)):
        source, mesh = sources.from_config(data, "train"), sharding.make_mesh()
        streams.append(
            loader.training_batches(source, data, seed=1, batch_size=8, steps=7, start=0, mesh=mesh)
        )
    for ours, theirs in zip(*streams, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name])


def test_slices_and_classes_can_be_chosen(pets, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = pets.parent.parent
    assert len(sources.from_config(config(dir=folder, train_split="train[:25%]"), "train")) == 12
    (tmp_path / "names").write_text("dog\n")
    for _ in range(2):  # the second time, labels come from the cache
        dogs = sources.from_config(config(dir=folder, classes=tmp_path / "names"), "train")
        assert (len(dogs), dogs.classes, {dogs.record(i)[1] for i in range(24)}) == (
            24,
            ("dog",),
            {0},
        )
    every = sources.from_config(config(dir=folder), "train")
    assert [dogs.record(i)[0] for i in range(24)] == [every.record(i)[0] for i in range(24, 48)]
    assert "classes" in dogs.identity()
    assert dogs.name(0) == "pets/1.0.0/train[24]"
    assert len(list((tmp_path / "lmim_jax" / "labels").iterdir())) == 1


def test_classes_of_a_folder_can_be_chosen(images, tmp_path):
    (tmp_path / "names").write_text("dog\ncat\n")
    chosen = sources.from_config(
        config(source="folder", path=images, classes=tmp_path / "names"), "test"
    )
    assert (chosen.classes, chosen.record(0)[1], chosen.record(15)[1]) == (("dog", "cat"), 1, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": ""}, "config.data.name is empty"),
        (
            {"name": "cats"},
            r"config.data.name='cats': no prepared dataset of that name in .*, which holds: pets",
        ),
        (
            {"train_split": "training"},
            r"pets/1.0.0 has no split 'training'; available: train \(48\), test \(16\)",
        ),
        ({"classes": "/no/such"}, "config.data.classes='/no/such' cannot be read"),
        ({"source": "tfd"}, "did you mean tfds"),
    ],
)
def test_a_wrong_dataset_is_named(pets, change, message):
    with pytest.raises(UserError, match=message):
        sources.from_config(config(**{"dir": pets.parent.parent, **change}), "train")


def test_a_folder_without_classes_and_with_bad_files(images, tmp_path):
    shutil.copytree(images / "train" / "cat", tmp_path / "any")
    (tmp_path / "any" / "05.jpg").write_bytes(b"broken")
    folder = prepare_data.convert(
        prepare_data.open_splits(tmp_path / "any"), tmp_path, "flat", 16, 1
    )
    flat = sources.from_config(config(dir=tmp_path, name="flat"), "train")
    assert (len(flat), flat.classes, flat.record(0)[1]) == (23, (), -1)
    assert "05.jpg: " in (folder / tfds_writer.BAD).read_text()
    assert {min(decode.decode(flat.record(i)[0], 0, 3).shape[:2]) for i in range(23)} == {
        16
    }  # shrunk
    with pytest.raises(UserError, match="holds something else"):
        prepare_data.convert(prepare_data.open_splits(tmp_path / "any"), tmp_path, "flat", 0, 1)
    with pytest.raises(UserError, match=r"has no split 'test'"):
        sources.from_config(config(dir=tmp_path, name="flat"), "test")


def test_names_that_are_no_utf_8_are_written(images, tmp_path, capsys):
    """[of a class, of a damaged image]"""
    train = tmp_path / "any" / "train"
    shutil.copytree(images / "train", train)
    (train / "cat").rename(train / os.fsdecode(b"caf\xe9"))
    (train / "dog" / os.fsdecode(b"M\xfcnchen.jpg")).write_bytes(b"broken")
    found = prepare_data.open_splits(tmp_path / "any")
    folder = prepare_data.convert(found, tmp_path, "names", 0, 1)
    assert b"M\xfcnchen.jpg: " in (folder / tfds_writer.BAD).read_bytes()
    prepare_data._report_bad_files(folder / tfds_writer.BAD)
    assert "1 files are not usable images" in capsys.readouterr().out
    assert (folder / "label.labels.txt").read_text().splitlines() == [r"caf\xe9", "dog"]


def test_links_that_lead_nowhere_are_bad_images(images, tmp_path):
    shutil.copytree(images / "train" / "cat", tmp_path / "any")
    (tmp_path / "any" / "lost.jpg").symlink_to(tmp_path / "gone.jpg")
    folder = prepare_data.convert(
        prepare_data.open_splits(tmp_path / "any"), tmp_path, "links", 0, 1
    )
    assert "lost.jpg: " in (folder / tfds_writer.BAD).read_text()
    assert len(sources.from_config(config(dir=tmp_path, name="links"), "train")) == 24


def test_a_dataset_that_is_there_stays_as_it_is_and_says_so(images, tmp_path, caplog):
    shutil.copytree(images / "train" / "cat", tmp_path / "any")
    (tmp_path / "any" / "05.jpg").write_bytes(b"broken")
    for repaired in (False, True):
        caplog.clear()
        folder = prepare_data.convert(
            prepare_data.open_splits(tmp_path / "any"), tmp_path, "again", 0, 1
        )
        assert ("was made before, and stays as it is" in caplog.text) == repaired
        shutil.copy(images / "train" / "cat" / "03.jpg", tmp_path / "any" / "05.jpg")
    assert "05.jpg: " in (folder / tfds_writer.BAD).read_text()


def test_what_is_shrunk_keeps_orientation_and_transparency(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (100, 80, 4), np.uint8)
    pixels[:50, :, 3] = 0
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, image in (("a.jpg", pixels[..., :3]), ("b.png", pixels)):
        Image.fromarray(image).save(tmp_path / name, exif=exif)
        data = (tmp_path / name).read_bytes()
        shrunk = tfds_writer._shrink_image(data, 40)
        upright = decode.decode(shrunk, 0, 3, ImageOptions(exif_orientation=True))
        assert upright.shape == (40, 50, 3)
        plain = decode.decode(shrunk, 0, 3)
        opaque = Image.fromarray(pixels[..., :3]).resize((40, 50), Image.Resampling.BICUBIC)
        if name == "b.png":
            np.testing.assert_array_equal(plain, np.asarray(opaque))
            white = decode.decode(shrunk, 0, 3, ImageOptions(transparency="white"))
            assert white[:20].min() == 255
            assert white[-20:].min() < 200


def test_images_of_more_pixels_are_left_out_or_shrunk(tmp_path):
    pixels = np.full((40, 50, 4), 100, np.uint8)
    (tmp_path / "any").mkdir()
    Image.fromarray(pixels).save(tmp_path / "any" / "a.png")
    Image.fromarray(pixels[:10, :10]).save(tmp_path / "any" / "b.png")
    found = prepare_data.open_splits(tmp_path / "any")
    few = prepare_data.convert(found, tmp_path, "few", 20, 1, max_pixels=1999)
    reason = "50 x 40 pixels, more than 1999 (--max_pixels)"
    assert reason in (few / tfds_writer.BAD).read_text()
    every = prepare_data.convert(found, tmp_path, "every", 0, 1, max_pixels=2000)
    assert (every / tfds_writer.BAD).read_text() == ""
    assert prepare_data.verify(every, 2)[1] == []
    assert len(prepare_data.verify(every, 2, max_pixels=1999)[1]) == 1


def test_the_opacity_of_a_larger_image_is_read_only_if_it_is_allowed():
    stream = io.BytesIO()
    Image.new("RGBA", (8, 6), (9, 9, 9, 100)).save(stream, "PNG")
    assert decode.alpha(stream.getvalue(), ImageOptions(max_pixels=48)).shape == (6, 8)
    with pytest.raises(decode.BadImage, match="more than 47"):
        decode.alpha(stream.getvalue(), ImageOptions(max_pixels=47))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF", "GIF", "BMP", "AVIF", "JPEG2000"])
def test_every_format_can_be_shrunk(format, mode):
    if (format, mode) == ("JPEG2000", "LA"):
        pytest.skip("two bands without a meaning, which are kept as they are")
    image = Image.fromarray(np.full((60, 80, 4), (200, 100, 50, 0), np.uint8)).convert(mode)
    stream = io.BytesIO()
    try:
        image.save(stream, format)
    except (OSError, KeyError, ValueError) as error:
        pytest.skip(f"{format} has no {mode}: {error}")
    shrunk = tfds_writer._shrink_image(stream.getvalue(), 30)
    assert decode.decode(shrunk, 0, 3).shape == (30, 40, 3)
    alpha = decode.alpha(stream.getvalue())
    assert (alpha is None) == (decode.alpha(shrunk) is None)
    if format in ("PNG", "WEBP", "TIFF") and mode in ("RGBA", "LA"):
        assert alpha.shape == (60, 80) and alpha.max() == 0


def test_damage_is_found(pets, tmp_path):
    copy = tmp_path / "pets" / "1.0.0"
    shutil.copytree(pets, copy)
    manifest, problems = prepare_data.verify(copy, 100)
    assert not problems
    assert {facts["records"] for facts in manifest.values()} == {48, 16}
    shard, train = next(copy.glob("*test*")), next(copy.glob("*train*"))
    content = bytearray(train.read_bytes())
    content[len(content) // 8] ^= 1  # inside a record
    train.write_bytes(content)
    source = sources.from_config(config(dir=tmp_path), "train")
    found = loader.BatchDecoder(source, 40, 3, 1, replace=False).batch(np.arange(48))
    assert (found["bad"] >= 0).sum() == 1
    assert len(prepare_data.verify(copy, 100)[1]) == 2  # its record, its checksum
    shutil.copy(pets / train.name, train)
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    assert prepare_data.verify(copy, 0)[1] == [f"{shard.name}: not as in manifest.json"]


def tool(*arguments):
    command = [sys.executable, "-m", "lmim_jax.cli", "prepare", *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=conftest.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """6,000 small images without classes: two shards."""
    root, rng = tmp_path_factory.mktemp("many"), np.random.default_rng(0)
    for i in range(6000):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(root / f"{i:05d}.bmp")
    return root


def test_killed_and_resumed_it_makes_the_same_bytes(many, tmp_path):
    whole = prepare_data.convert(prepare_data.open_splits(many), tmp_path / "whole", "many", 0, 1)
    out = tmp_path / "killed" / "many" / "1.0.0"
    killed = tool(
        f"--folder={many}", f"--out={tmp_path / 'killed'}", "--name=many", "--processes=1"
    )
    deadline = time.monotonic() + 120
    # Until the first shard is written, and the second in the making
    while not any(out.glob("*.array_record*")):
        assert killed.poll() is None, killed.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (out / tfds_writer.MANIFEST).exists()
    again = tool(f"--folder={many}", f"--out={tmp_path / 'killed'}", "--name=many", "--processes=2")
    output, _ = again.communicate(timeout=240)
    assert again.returncode == 0, output
    assert f"train {out.parent}\n" in output
    assert contents(out) == contents(whole)


def masked_checksum(data):
    crc = google_crc32c.value(data)
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


def write_tfrecord(path, examples):
    """A TFRecord file, by its specification."""
    with path.open("wb") as file:
        for data in examples:
            length = struct.pack("<Q", len(data))
            file.write(length + masked_checksum(length) + data + masked_checksum(data))


@pytest.fixture
def tfrecords(pets, tmp_path):
    """The dataset as TFDS with TensorFlow would have written it."""
    folder = tmp_path / "pets" / "1.0.0"
    folder.mkdir(parents=True)
    info = json.loads((pets / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps({**info, "fileFormat": "tfrecord"}))
    for name in ("features.json", "label.labels.txt"):
        shutil.copy(pets / name, folder / name)
    for split in ("train", "test"):
        source = sources.from_config(config(dir=pets.parent.parent), split)
        examples = [source.records[i] for i in range(len(source))]
        write_tfrecord(folder / f"pets-{split}.tfrecord-00000-of-00001", examples)
    return folder


def test_tfrecords_become_readable_beside_the_originals(pets, tfrecords, images):
    data = config(dir=tfrecords.parent.parent)
    with pytest.raises(UserError, match=r"prepared as tfrecord.*prepare --tfrecord=") as error:
        sources.from_config(data, "train")
    before = contents(tfrecords)
    flag = str(error.value).rpartition(" ")[2]
    running = tool(flag, "--processes=1")  # the command of the message
    output, _ = running.communicate(timeout=240)
    assert running.returncode == 0, output
    source, theirs = sources.from_config(data, "train"), sources.open_folder(images, "train")
    assert [source.record(i) for i in range(48)] == [theirs.record(i) for i in range(48)]
    after = contents(tfrecords)
    assert {path: after[path] for path in before if "tfrecord" in path.name} == {
        path: content for path, content in before.items() if "tfrecord" in path.name
    }
    for path in pets.glob("*.array_record*"):  # the records are the same, and so are the files
        assert (tfrecords / path.name).read_bytes() == path.read_bytes()
    assert prepare_data.verify(tfrecords, 4)[1] == []


@pytest.mark.parametrize("damage", ["bit", "cut"])
def test_a_damaged_tfrecord_file_is_named(tfrecords, damage):
    path = tfrecords / "pets-test.tfrecord-00000-of-00001"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content if damage == "bit" else content[: len(content) // 3])
    with pytest.raises(
        UserError, match=r"pets-test.tfrecord-00000-of-00001 is damaged at record \d+"
    ):
        prepare_data.convert_tfrecords(tfrecords, 1)
    assert not list(tfrecords.glob("*test.array_record*")), "nothing half-made"


def test_labels_are_not_trusted_when_the_files_have_changed(pets, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = sources.from_config(config(dir=pets.parent.parent), "train")
    assert tfds_source._read_labels(source).tolist() == [0] * 24 + [1] * 24
    (path,) = pathlib.Path(tmp_path, "lmim_jax", "labels").iterdir()
    np.save(path, 1 - np.load(path))
    assert tfds_source._read_labels(source).tolist() == [0] * 24 + [1] * 24


def test_labels_are_read_in_parts_and_damaged_records_have_none(
    pets, tmp_path, monkeypatch, caplog
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tfds_source, "LABELS", 7)
    every = sources.from_config(config(dir=pets.parent.parent), "train")
    records = [every.records[i] for i in range(len(every))]
    records[3] = b"damaged"
    chosen = tfds_source.select_classes(dataclasses.replace(every, records=records), ["dog", "cat"])
    assert "1 records have no class or are damaged" in caplog.text
    assert chosen.kept.array.tolist() == [i for i in range(48) if i != 3]
    assert chosen.labels.array.tolist() == [1] * 23 + [0] * 24
    assert chosen.record(0) == (every.record(0)[0], 1)
