"""Several modalities: pairs of files, one image of all their channels, ranges of their own."""

import pathlib
import shutil
import zipfile

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from lmim_jax.configs import vit_b
from lmim_jax.data import decode, inventory, pixel_range, records, sources
from lmim_jax.data.image_options import BadImage, ImageOptions
from lmim_jax.data.loader import BatchDecoder
from lmim_jax.utils.errors import UserError

ROADSCENE = pathlib.Path("/work/shared/data/roadscene_small.zip")
SIZE = (12, 10)  # width, height


def write_pairs(folder, names=("a", "b", "c", "d", "e"), size=SIZE):
    """RGB of 8 bits in rgb/NAME.png, thermal of 16 bits in thermal/NAME.tif."""
    rng = np.random.default_rng(0)
    for name in names:
        for modality, suffix in (("rgb", ".png"), ("thermal", ".tif")):
            path = folder / modality / f"{name}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            if modality == "rgb":
                pixels = rng.integers(0, 256, (size[1], size[0], 3), np.uint8)
            else:
                pixels = rng.integers(7000, 9000, (size[1], size[0]), np.uint16)
            Image.fromarray(pixels).save(path)
    return folder


def data_config(path):
    config = vit_b.data()
    config.path = str(path)
    config.canvas = 16
    common = dict(range="auto", patch_size=4)
    config.modalities.rgb = ConfigDict(
        dict(path="rgb", channels=3, mean=(0.5,) * 3, std=(0.5,) * 3, **common)
    )
    config.modalities.thermal = ConfigDict(
        dict(path="thermal", channels=1, mean=(0.4,), std=(0.2,), **common)
    )
    config.channels = 4
    return config


def test_files_are_packed_and_a_single_one_is_itself():
    files = [b"abc", b"", b"\x00" * 70_000]
    assert records.unpack(records.pack(files)) == files
    assert records.pack([b"abc"]) == b"abc"
    assert records.unpack(b"abc") == [b"abc"]


def test_an_image_has_the_channels_of_both_files_and_ranges_of_their_own(tmp_path):
    config = data_config(write_pairs(tmp_path))
    source = sources.from_config(config, "train")
    ranges, lines = pixel_range.resolve_all(config, source)
    assert ranges["rgb"] == "full"
    low, high = map(float, ranges["thermal"].split(","))
    assert 7000 <= low < 7100 and 8900 < high < 9000
    assert "thermal:" in lines
    pixel_range.set_ranges(config, ranges)
    options = ImageOptions.from_config(config)
    data, label = source.record(1)
    pixels = decode.decode(data, 16, 4, options)
    assert label == -1
    np.testing.assert_array_equal(pixels[..., :3], np.asarray(Image.open(tmp_path / "rgb/b.png")))
    thermal = np.asarray(Image.open(tmp_path / "thermal/b.tif")).astype(float)
    expected = np.rint((thermal - low) * 255 / (high - low))
    np.testing.assert_array_equal(pixels[..., 3], expected)
    batch = BatchDecoder(source, 16, 4, 1, replace=False, options=options).batch(np.arange(5))
    assert batch["image"].shape == (5, 16, 16, 4)
    assert (batch["bad"] == -1).all()


def test_files_without_a_partner_are_named_and_counted(tmp_path):
    write_pairs(tmp_path)
    (tmp_path / "rgb/c.png").unlink()
    (tmp_path / "thermal/e.tif").unlink()
    config = data_config(tmp_path)
    listings = {}
    splits = sources.open_splits(config, listings)
    assert list(splits["train"].files) == ["a.png", "b.png", "d.png"]
    assert splits["train"].missing == {"rgb": ("c.tif",), "thermal": ("e.png",)}
    text = "\n".join(inventory.describe_config(config, splits, listings, "--config.data"))
    assert "1 images have no partner in rgb: c.tif" in text
    assert "1 images have no partner in thermal: e.png" in text
    assert "rgb          12 x 10 pixels, RGB, PNG" in text
    assert "thermal      12 x 10 pixels, 1 x uint16, TIFF" in text


def test_splits_and_classes_are_those_of_the_first_modality(tmp_path):
    write_pairs(tmp_path, ("train/cat/1", "train/dog/1", "test/dog/2"))
    splits = sources.open_splits(data_config(tmp_path))
    assert splits["train"].classes == ("cat", "dog")
    assert [splits["train"].record(i)[1] for i in range(2)] == [0, 1]
    assert list(splits["test"].files) == ["dog/2.png"]
    assert splits["test"].sources[1].files[0] == "dog/2.tif"


def test_modalities_of_unequal_size_are_named(tmp_path):
    write_pairs(tmp_path)
    Image.new("L", (24, 20)).save(tmp_path / "thermal/a.tif")
    config = data_config(tmp_path)
    config.canvas = 8  # both would have the same size there
    source = sources.from_config(config, "train")
    with pytest.raises(BadImage, match="unequal size: rgb 12 x 10, thermal 24 x 20"):
        decode.decode(source.record(0)[0], 8, 4, ImageOptions.from_config(config))


def test_other_mistakes_are_named(tmp_path):
    config = data_config(write_pairs(tmp_path))
    options = ImageOptions.from_config(config)
    with pytest.raises(BadImage, match=r"1 files, but config.data.modalities: rgb, thermal"):
        decode.decode((tmp_path / "rgb/a.png").read_bytes(), 16, 4, options)
    (tmp_path / "rgb/a.jpg").write_bytes((tmp_path / "rgb/a.png").read_bytes())
    with pytest.raises(UserError, match=r"a\.jpg and a\.png have the same name"):
        sources.from_config(config, "train")
    (tmp_path / "rgb/a.jpg").unlink()
    config.modalities.thermal.path = "infrared"
    with pytest.raises(UserError, match=r"modalities\.thermal\.path='infrared'"):
        sources.from_config(config, "train")
    write_pairs(tmp_path / "other", ("x",))
    shutil.move(tmp_path / "other/thermal", tmp_path / "infrared")
    with pytest.raises(UserError, match="has a partner of the same name"):
        sources.from_config(config, "train")
    config.labels = "labels.csv"
    with pytest.raises(UserError, match="labels is not supported"):
        sources.from_config(config, "train")


def test_prepared_pairs_are_the_same_images(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    from lmim_jax.cli import prepare_data
    from lmim_jax.data.prepare import tfds_writer

    config = data_config(write_pairs(tmp_path / "images"))
    folder = sources.open_pairs(config.path, ("rgb", "thermal"), "train", {})
    target = tmp_path / "pairs/1.0.0"
    (target / tfds_writer.UNFINISHED).mkdir(parents=True)
    tasks = list(tfds_writer.plan_shards(target, "pairs", "train", folder, 0))
    for task in tasks:
        tfds_writer.write_shard(task)
    tfds_writer.finish_dataset(target, (), tasks)
    prepared = data_config(target)
    source = sources.from_config(prepared, "train")
    assert len(source) == 5
    assert source.record(3) == folder.record(3)
    assert source.identity()["modalities"] == "rgb,thermal"
    _, problems = prepare_data.verify(target, 5)
    assert not problems
    prepared.modalities.thermal.path = "infrared"
    with pytest.raises(UserError, match=r"no image 'infrared'.*it has: rgb, thermal"):
        sources.from_config(prepared, "train")
    prepared.modalities = ConfigDict()
    with pytest.raises(UserError, match="has the images rgb, thermal"):
        sources.from_config(prepared, "train")


@pytest.mark.skipif(not ROADSCENE.exists(), reason="the real images are not here")
def test_real_pairs(tmp_path):
    with zipfile.ZipFile(ROADSCENE) as file:
        file.extractall(tmp_path)
    config = data_config(tmp_path / "roadscene_small")
    config.modalities.thermal.path = "infrared"
    config.canvas = 64
    source = sources.from_config(config, "train")
    assert len(source) == 221 and not source.missing
    options = ImageOptions.from_config(config)
    for index in (0, 110, 220):
        assert decode.decode(source.record(index)[0], 64, 4, options).shape[-1] == 4
