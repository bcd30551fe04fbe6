"""Files of more than 8 bits, of other bands than gray and RGB, and of rarer formats."""

import errno
import io
import json

import imagecodecs
import jax
import numpy as np
import pytest
import tifffile
import tiny
from PIL import Image, ImageOps, PngImagePlugin

from lmim_jax.cli import export, prepare_data
from lmim_jax.configs import vit_b
from lmim_jax.data import decode, folder_listing, pixel_range, samples, sources
from lmim_jax.data.augment.host import HostCrop
from lmim_jax.data.augment.randaugment import luminance
from lmim_jax.data.image_options import ImageOptions, format_ranges, parse_ranges, to_levels
from lmim_jax.distributed import sharding
from lmim_jax.train import inference, loop, runs, workdir
from lmim_jax.train.build import build
from lmim_jax.utils import faults
from lmim_jax.utils.errors import UserError

RNG = np.random.default_rng(0)
BANDS = RNG.integers(0, 4096, (20, 24, 13)).astype(np.uint16)
GRAY = BANDS[..., 0]
RGB = np.ascontiguousarray(BANDS[..., :3])
LEVELS = np.rint(BANDS / 4095 * 255).astype(np.uint8)
RANGE = ImageOptions(ranges=((0.0, 4095.0),))
PHOTO = Image.fromarray(RNG.integers(0, 255, (17, 23, 3), dtype=np.uint8))


def tiff(array, **options):
    stream = io.BytesIO()
    tifffile.imwrite(stream, array, **options)
    return stream.getvalue()


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def by_pillow(image, format, **options):
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


BLACK = {"photometric": "minisblack"}
LAST = {**BLACK, "planarconfig": "contig"}
FIRST = np.moveaxis(BANDS, -1, 0)
MANY = {
    "bands last": tiff(BANDS, **LAST),
    "bands first": tiff(FIRST, **BLACK, planarconfig="separate"),
    "as pages": tiff(FIRST),
    "as rows of pages": tiff(BANDS),
    "LZW": tiff(BANDS, **LAST, compression="lzw", predictor=True),
    "ZSTD": tiff(BANDS, **LAST, compression="zstd"),
    "big endian": tiff(BANDS.astype(">u2"), **LAST, byteorder=">"),
    "BigTIFF": tiff(BANDS, **LAST, bigtiff=True),
    "float32": tiff(BANDS.astype(np.float32), **LAST),
    "npy": npy(BANDS),
    "npy, bands first": npy(FIRST),
}


@pytest.mark.parametrize("name", MANY)
def test_13_bands(name):
    levels = decode.decode(MANY[name], 0, 13, RANGE)
    assert np.abs(levels.astype(int) - LEVELS).max() == 0
    assert decode.decode(MANY[name], 12, 13, RANGE).shape == (10, 12, 13)


@pytest.mark.parametrize("bands", [2, 4, 6])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float16, np.float32])
def test_any_number_of_bands_of_any_type(bands, dtype):
    values = (BANDS[..., :bands] // 32).astype(dtype)
    options = ImageOptions(ranges=tuple((0.0, 127.0 + band) for band in range(bands)))
    want = values
    if dtype != np.uint8:  # as it is
        want = np.rint(values / (127 + np.arange(bands)) * 255)
    for data in (tiff(values, **LAST), npy(values)):
        np.testing.assert_array_equal(decode.decode(data, 0, bands, options), want)


GRAYS = {
    "png": by_pillow(Image.fromarray(GRAY), "PNG"),
    "tiff": by_pillow(Image.fromarray(GRAY), "TIFF"),
    "jpeg 2000": imagecodecs.jpeg2k_encode(GRAY, reversible=True, level=0),
    "int16": tiff(GRAY.astype(np.int16)),
    "float64": tiff(GRAY.astype(np.float64)),
    "int32": npy(GRAY.astype(np.int32)),
    "pgm": b"P5 24 20 65535\n" + GRAY.astype(">u2").tobytes(),
    "npy": npy(GRAY),
}


@pytest.mark.parametrize("name", GRAYS)
def test_gray_of_more_than_8_bits(name):
    np.testing.assert_array_equal(decode.decode(GRAYS[name], 0, 1, RANGE), LEVELS[..., :1])
    colors = decode.decode(GRAYS[name], 0, 3, RANGE)
    np.testing.assert_array_equal(colors, np.repeat(LEVELS[..., :1], 3, axis=-1))


@pytest.mark.parametrize(
    "data", [imagecodecs.png_encode(RGB), imagecodecs.jpeg2k_encode(RGB, reversible=True, level=0)]
)
def test_colors_of_16_bits(data):
    np.testing.assert_array_equal(decode.decode(data, 0, 3, RANGE), LEVELS[..., :3])


def test_signed_values_and_missing_ones():
    values = np.array([[-30.0, -25.0, np.nan], [0.0, np.inf, -np.inf]])
    levels = to_levels(values[..., None], ((-25.0, 0.0),))[..., 0]
    np.testing.assert_array_equal(levels, [[0, 0, 0], [255, 255, 0]])


@pytest.mark.parametrize(
    ("data", "channels", "message"),
    [
        (tiff(BANDS[..., :6].astype(np.uint8), **LAST), 3, "6 bands of uint8, not the 3"),
        (tiff(BANDS[..., :2], **LAST), 3, "2 bands of uint16, not the 3"),
        (npy(BANDS), 3, "13 bands of uint16, not the 3"),
        (by_pillow(PHOTO, "PNG"), 13, "the colors RGB, not the 13"),
        (by_pillow(PHOTO, "JPEG"), 6, "the colors RGB, not the 6"),
        (npy(np.zeros((3, 3), complex)), 3, "complex128"),
        (npy(np.zeros(9)), 3, r"shape \(9,\)"),
        (npy(BANDS)[:400], 13, "truncated: an array"),
        (b"no image at all", 3, "not an image of a known format"),
    ],
)
def test_what_is_wrong_is_said(data, channels, message):
    for _ in range(2):  # the same text each time
        with pytest.raises(decode.BadImage, match=message):
            decode.decode(data, 0, channels)


@pytest.mark.parametrize("format", ["AVIF", "JPEG2000", "PPM"])
def test_rarer_formats(format, tmp_path):
    suffix = {"AVIF": "avif", "JPEG2000": "jp2", "PPM": "ppm"}[format]
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(by_pillow(PHOTO, format))
    data, _ = sources.open_folder(tmp_path, "train").record(0)
    np.testing.assert_array_equal(decode.decode(data, 0, 3), np.asarray(Image.open(path)))


def test_arrays_beside_images_are_left_out(tmp_path):
    for name in ("photos/a.png", "photos/labels.npy", "arrays/a.npy", "arrays/b.npy"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"-")
    listing = folder_listing.list_folder(tmp_path)
    assert list(listing.images) == ["arrays/a.npy", "arrays/b.npy", "photos/a.png"]
    assert list(listing.others) == ["photos/labels.npy"]


def test_more_pixels_on_request():
    data = by_pillow(Image.new("L", (2000, 1500)), "PNG")
    few = ImageOptions(max_pixels=2_999_999)
    with pytest.raises(
        decode.BadImage, match=r"2000 x 1500 pixels, more than 2999999 .*max_pixels"
    ):
        decode.decode(data, 40, 3, few)
    for other in (MANY["bands last"], MANY["npy"], MANY["as rows of pages"], GRAYS["jpeg 2000"]):
        with pytest.raises(decode.BadImage, match="max_pixels"):
            decode.decode(other, 40, 13, ImageOptions(max_pixels=100))
    assert decode.decode(data, 40, 3, ImageOptions(max_pixels=3_000_000)).shape == (30, 40, 3)


def test_pillows_own_limit_follows(monkeypatch, tmp_path):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    (tmp_path / "a.png").write_bytes(by_pillow(PHOTO, "PNG"))
    (tmp_path / "b.png").write_bytes(by_pillow(PHOTO, "PNG"))
    config = vit_b.data()
    config.max_pixels = 1000
    pixel_range.resolve(config, sources.open_folder(tmp_path, "train"))
    for options in (ImageOptions(max_pixels=1000), ImageOptions(exif_orientation=True)):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # as in another process
        decode.decode(by_pillow(PHOTO, "JPEG"), 40, 3, options)


def test_headers_that_promise_more_than_the_file_holds_are_damage():
    flipped = bytearray(tiff(np.zeros((2000, 2000, 3), np.uint16), compression="zlib"))
    with tifffile.TiffFile(io.BytesIO(flipped)) as file:
        place = file.pages[0].tags["SamplesPerPixel"].valueoffset
    flipped[place + 1] ^= 0x80  # 32,771 bands: 244 GiB
    with pytest.raises(decode.BadImage, match="damaged: 244 GiB of samples"):
        decode.decode(bytes(flipped), 40, 3)
    header = npy(np.zeros((7, 7, 7), np.uint8))
    longer = header.replace(b"(7, 7, 7), }      ", b"(7000, 7000, 7), }")
    assert len(longer) == len(header)
    with pytest.raises(decode.BadImage, match="truncated: an array of the shape"):
        decode.decode(longer, 40, 7)


def test_long_texts_of_pngs():
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "y" * 5_000_000, zip=True)
    pixels = decode.decode(by_pillow(PHOTO, "PNG", pnginfo=info), 0, 3)
    np.testing.assert_array_equal(pixels, np.asarray(PHOTO))


def pages(count, *, bands=1, **options):
    """A TIFF file of so many pages."""
    shape = (count, 20, 24, bands)[: 3 + (bands > 1)]
    values = np.random.default_rng(0).integers(0, 4000, shape).astype(np.uint16)
    stream = io.BytesIO()
    tifffile.imwrite(stream, values, photometric="rgb" if bands == 3 else "minisblack", **options)
    return stream.getvalue(), values


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("options", [{}, {"metadata": None}, {"ome": True}, {"bigtiff": True}])
def test_pages_are_bands_and_none_is_taken_for_the_image(channels, options):
    data, values = pages(13, **options)
    with pytest.raises(decode.WrongBands, match=rf"13 pages of uint16, not the {channels} of"):
        decode.decode(data, 0, channels)
    assert "13 pages" in samples.read_header(data).mode
    found = samples.read(data, 13, decode.DEFAULTS)
    np.testing.assert_array_equal(found.values, np.moveaxis(values, 0, -1))


def test_as_many_pages_as_channels_are_its_bands():
    data, values = pages(3)
    found = samples.read(data, 3, decode.DEFAULTS)
    np.testing.assert_array_equal(found.values, np.moveaxis(values, 0, -1))


def test_pages_of_colors_are_several_images():
    with pytest.raises(decode.BadImage, match="4 pages of 3 bands: which of them is the image"):
        decode.decode(pages(4, bands=3)[0], 0, 3)


def test_thumbnails_of_tiffs_are_skipped():
    thumbnail = Image.new("RGB", (8, 6))
    plain = by_pillow(thumbnail, "TIFF", save_all=True, append_images=[PHOTO.copy()])
    np.testing.assert_array_equal(decode.decode(plain, 0, 3), np.asarray(PHOTO))
    stream = io.BytesIO()
    with tifffile.TiffWriter(stream) as writer:
        writer.write(BANDS[:4, :4], **LAST, subfiletype=1)
        writer.write(BANDS, **LAST)
    np.testing.assert_array_equal(decode.decode(stream.getvalue(), 0, 13, RANGE), LEVELS)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_on_request(format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = by_pillow(PHOTO, format, exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    ours = decode.decode(data, 0, 3, ImageOptions(exif_orientation=True))
    np.testing.assert_array_equal(ours, upright)


@pytest.mark.parametrize("bits", [8, 16])
def test_transparency_on_request(bits):
    pixels = np.dstack([np.full((4, 4, 3), 200), np.zeros((4, 4))])
    data = imagecodecs.png_encode(pixels.astype(np.uint8))
    if bits == 16:
        data = imagecodecs.png_encode((pixels * 257).astype(np.uint16))
    for transparency, level in {"ignore": 200, "white": 255, "black": 0}.items():
        assert (decode.decode(data, 0, 3, ImageOptions(transparency=transparency)) == level).all()


@pytest.mark.parametrize("channels", [4, 13])
def test_host_crops_of_any_number_of_bands(channels):
    config = tiny.get_config()
    config.data.channels = channels
    config.augment.update(mean=(0.5,) * channels, std=(0.2,) * channels)
    augment = build(config, 1).augmentation
    size = np.array(LEVELS.shape[:2], np.int32)
    draw = jax.device_get(augment.draw(jax.random.key(3)))
    ours = HostCrop(augment, None, 24)(LEVELS[..., :channels], draw)
    canvas = np.zeros((24, 24, channels), np.uint8)
    decode.place_on_canvas(LEVELS[..., :channels], canvas)
    batch = {"image": canvas[None], "size": size[None]}
    theirs = augment.denormalize(augment(jax.random.key(3)[None], batch))[0]
    assert np.abs(ours.astype(int) - np.asarray(theirs)).max() <= 1


def test_gray_of_bands_is_their_mean():
    levels = LEVELS[..., :4].astype(np.float32)
    np.testing.assert_array_equal(luminance(levels), np.round(levels.mean(-1)))


# Ranges


@pytest.mark.parametrize("text", ["0,4095", "-25,0", "0,3000;0.5,1e4;-1,1"])
def test_ranges_as_texts(text):
    ranges = parse_ranges(text, 3)
    assert parse_ranges(format_ranges(ranges), 3) == ranges


@pytest.mark.parametrize("text", ["4095", "5,5", "9,1", "a,b", "0,nan", "0,1;0,1", "1%,2", "9%,1%"])
def test_ranges_without_meaning(text):
    config = vit_b.data()
    config.range = text
    with pytest.raises(UserError, match=r"config.data.range"):
        ImageOptions.from_config(config)


def fill(folder, count, make, suffix=".tif"):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (folder / f"{i}{suffix}").write_bytes(make(i))


def resolved(folder, text="auto", channels=3, stored=None):
    config = vit_b.data()
    config.update(path=str(folder), range=text, channels=channels)
    lines = pixel_range.resolve(config, sources.open_folder(folder, "train"), stored)
    return config.range, lines


def test_the_range_is_measured(tmp_path, caplog):
    fill(tmp_path / "gray", 4, lambda i: tiff(GRAY + np.uint16(i)))
    found, lines = resolved(tmp_path / "gray")
    assert found == f"{GRAY.min()},{GRAY.max() + 3}" and "uint16" in lines[0]
    assert resolved(tmp_path / "gray", stored="0,9")[0] == "0,9"
    assert resolved(tmp_path / "gray", "7,9", stored="0,9")[0] == "7,9"
    low, high = map(float, resolved(tmp_path / "gray", "10%,90%")[0].split(","))
    assert 350 < low < 500 and 3500 < high < 3800
    assert not caplog.records
    fill(tmp_path / "low", 4, lambda i: tiff(GRAY // 4))
    assert resolved(tmp_path / "low", "full")[0] == "full"
    assert "less than 1/16 of config.data.range=full" in caplog.text


def test_a_storage_that_fails_for_a_moment_leaves_the_range_as_it_is(tmp_path, monkeypatch):
    fill(tmp_path, 4, lambda i: tiff(GRAY))
    expected = resolved(tmp_path, channels=1)
    failures = [OSError(errno.EIO, "Input/output error")] * 3
    read = sources.FolderSource.record

    def record(self, index):
        if failures:
            raise failures.pop()
        return read(self, index)

    monkeypatch.setattr(sources.FolderSource, "record", record)
    assert resolved(tmp_path, channels=1) == expected
    failures += [OSError(errno.EIO, "Input/output error")] * 99
    monkeypatch.setattr(faults, "RETRY_SECONDS", 0.2)
    with pytest.raises(faults.ReadFailed):
        resolved(tmp_path, channels=1)


def test_every_band_has_its_range(tmp_path):
    scale = np.array([1, 2, 3, 4, 5, 6], np.uint16)
    fill(tmp_path, 3, lambda i: tiff(np.minimum(BANDS[..., :6], 999) * scale, **LAST))
    ranges = parse_ranges(resolved(tmp_path, channels=6)[0], 6)
    assert [high for _, high in ranges] == [999, 1998, 2997, 3996, 4995, 5994]


def test_8_bits_need_no_range(tmp_path):
    fill(tmp_path, 3, lambda i: by_pillow(PHOTO, "PNG"), ".png")
    assert resolved(tmp_path) == ("full", [])


def test_a_constant_is_no_range(tmp_path, caplog):
    for number in range(4):
        (tmp_path / f"{number}.npy").write_bytes(npy(np.full((20, 24), 700, np.uint16)))
    config = vit_b.get_config().data
    pixel_range.resolve(config, sources.open_folder(tmp_path, "train"), None)
    assert "all pixel values are 700" in caplog.text
    assert "1/16" not in caplog.text


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (npy(np.zeros((2, 3, 20, 24), np.float32)), r"an array of the shape \(2, 3, 20, 24\)"),
        (npy(np.zeros((20, 24), np.complex64)), "samples of the type complex64"),
        (b"<html>404 Not Found</html>", "not an image"),
    ],
)
def test_images_that_cannot_be_read_at_all_are_an_error_before_the_run(tmp_path, content, reason):
    for number in range(4):
        (tmp_path / f"{number}.npy").write_bytes(content)
    config = vit_b.get_config().data
    source = sources.open_folder(tmp_path, "train")
    with pytest.raises(UserError, match=f"none of 4 images can be read, .*0.npy .{reason}"):
        pixel_range.resolve(config, source, None)


def test_wrong_bands_are_an_error_before_the_run(tmp_path):
    fill(tmp_path / "bands", 8, lambda i: MANY["bands last"])
    with pytest.raises(UserError, match=r"13 bands of uint16, .* --config.data.channels=13"):
        resolved(tmp_path / "bands")
    config = tiny.get_config()
    config.data.update(path=str(tmp_path / "bands"), channels=13)
    with pytest.raises(UserError, match=r"lmim prepare .*--statistics --channels=13"):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def write_satellite(folder):
    """TIFFs of 13 bands of 12 bits in two classes; returns a recipe for them."""
    for split in ("train", "test"):
        fill(folder / split / "a", 8, lambda i: tiff(BANDS // 2, **LAST))
        fill(folder / split / "b", 8, lambda i: tiff(BANDS[::-1] // 2, **LAST))
    config = tiny.get_config()
    config.epochs = 2
    config.data.update(path=str(folder), channels=13)
    config.augment.update(mean=(0.5,) * 13, std=(0.3,) * 13)
    return config


@pytest.fixture(scope="module")
def satellite(tmp_path_factory):
    """A fresh run on TIFFs of 13 bands."""
    folder = tmp_path_factory.mktemp("satellite")
    config = write_satellite(folder / "images")
    pixel_range.resolve(config.data, sources.open_folder(folder / "images", "train"))
    tiny.run(build(config, 1).config, folder / "run")
    return folder


@pytest.mark.slow
def test_13_bands_train_and_resume_with_their_range(tmp_path):
    config = write_satellite(tmp_path / "images")
    summary = loop.train(config, tmp_path / "run")
    stored = json.loads((tmp_path / "run/config.json").read_text())["data"]["range"]
    assert len(parse_ranges(stored, 13)) == 13
    assert summary["loss"] > 0
    assert len(list((tmp_path / "run/pictures").rglob("*.png"))) > 2
    config.data.range = "auto"
    assert loop.train(config, tmp_path / "run")["loss"] == summary["loss"]
    config.data.range = "0,9999"
    with pytest.raises(UserError, match=r"data\.range"):
        loop.train(config, tmp_path / "run")


def test_13_bands_are_read_alike_by_every_tool(satellite):
    run = runs.open_run(satellite / "run")
    assert len(parse_ranges(run.config.data.range, 13)) == 13
    export.export(run, "flax", "online", str(satellite / "flax"), "", "")
    path = satellite / "images/test/b/0.tif"
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    data = run.open_images(run.data_config(vit_b.data().to_dict(), {}), mesh)
    batch, indices = data.sample("test", 16)
    row = [data.sources["test"].name(i) for i in indices].index(str(path))
    for place in ("run", "flax"):
        model = inference.load(satellite / place)
        ours = model.preprocess([path])
        np.testing.assert_array_equal(ours[0], np.asarray(batch["images"])[row])
        assert np.abs(model.encode(ours).mean).max() > 0


@pytest.mark.parametrize("format", ["timm", "hf", "safetensors"])
def test_13_bands_are_exported(satellite, format):
    run = runs.open_run(satellite / "run")
    export.export(run, format, "online", str(satellite / format), "", "")
    assert (satellite / format / "README.md").exists()


def test_runs_from_before_the_option_resume(satellite):
    stored = json.loads((satellite / "run/config.json").read_text())
    now = dict(stored, data=dict(stored["data"], range="full"))
    for key in ("range", "max_pixels", "exif_orientation", "transparency"):
        del stored["data"][key]
    old = satellite / "old"
    old.mkdir()
    (old / "config.json").write_text(json.dumps(stored))
    assert workdir.stored_ranges(old) == {"": "full"}
    assert workdir.stored_ranges(satellite / "none") is None
    workdir.check(old, now, None)
    now["data"]["transparency"] = "white"
    with pytest.raises(UserError, match=r"data\.transparency ignore -> white"):
        workdir.check(old, now, None)


def test_statistics(tmp_path):
    fill(tmp_path / "bands", 3, lambda i: MANY["bands last"])
    source = sources.open_folder(tmp_path / "bands", "train")
    assert prepare_data._find_channels(source) == 13
    config = vit_b.data()
    config.update(channels=13, range="0,4095")
    mean, std, count = pixel_range.statistics(source, config, 100)
    assert count == 3
    np.testing.assert_allclose(mean, LEVELS.mean((0, 1)) / 255)
    np.testing.assert_allclose(std, LEVELS.std((0, 1)) / 255)
