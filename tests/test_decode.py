"""Decoding equals Pillow for every format and rejects damage, on drawn and on real images."""

import functools
import io
import pathlib
import struct
import zipfile
import zlib

import conftest
import jax
import numpy as np
import pytest
from PIL import Image

from lmim_jax.data import decode, sources
from lmim_jax.data.augment.device import Augment
from lmim_jax.data.augment.host import HostCrop

REAL = pathlib.Path(conftest.ROOT).parent / "shared" / "data" / "imagenet_jpegs_125.zip"
needs_real = pytest.mark.skipif(not REAL.is_file(), reason=f"no real ImageNet files at {REAL}")
RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (30, 42, 3), dtype=np.uint8)
SMOOTH = np.asarray(Image.fromarray(NOISE[:5, :6]).resize((160, 120), Image.Resampling.BICUBIC))


def encoded(pixels, format="JPEG", mode=None, **how):
    stream, image = io.BytesIO(), Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(stream, format=format, **how)
    return stream.getvalue()


def by_pillow(data, mode="RGB"):
    return np.asarray(Image.open(io.BytesIO(data)).convert(mode)).astype(int)


def test_small_images_stay_and_large_ones_shrink():
    image, size = decode.decode_to_canvas(encoded(NOISE, "PNG"), 48, 3)
    assert size.tolist() == [30, 42]
    np.testing.assert_array_equal(image[:30, :42], NOISE)
    assert not image[30:].any()
    assert not image[:, 42:].any()
    assert decode.decode(encoded(NOISE), 21, 3).shape == (15, 21, 3)
    assert decode.decode(encoded(np.zeros((90, 300, 3), np.uint8)), 40, 3).shape == (12, 40, 3)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"progressive": True},
        {"subsampling": 0},
        {"mode": "L"},
        {"mode": "CMYK"},
        {"format": "PNG"},
        {"format": "PNG", "mode": "P"},
        {"format": "PNG", "mode": "LA"},
        {"format": "WEBP"},
        {"format": "BMP"},
        {"format": "GIF"},
        {"format": "TIFF"},
    ],
    ids=str,
)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_every_format_gives_pillows_pixels(how, channels):
    data = encoded(SMOOTH, **how)
    ours = decode.decode(data, 0, channels)
    np.testing.assert_array_equal(ours.squeeze(), by_pillow(data, decode.MODES[channels]))
    shrunk = decode.decode(data, 40, channels)  # whatever decodes, it is shrunk alike
    np.testing.assert_array_equal(shrunk, decode._decode_with_pillow(data, 40, channels))
    assert shrunk.shape == (30, 40, channels)


def test_16_bits_without_a_range_take_that_of_their_type():
    values = np.arange(256 * 256).reshape(256, 256).astype(np.uint16)
    levels = decode.decode(encoded(values, "PNG"), 0, 1)[..., 0]
    np.testing.assert_array_equal(levels, np.rint(values / 257))


def test_transparent_colors_count():
    pixels = np.dstack([SMOOTH, np.zeros(SMOOTH.shape[:2], np.uint8)])
    np.testing.assert_array_equal(decode.decode(encoded(pixels, "PNG"), 0, 3), SMOOTH)
    palette = Image.fromarray(SMOOTH).quantize(16)
    stream = io.BytesIO()
    palette.save(stream, "PNG", transparency=3)
    np.testing.assert_array_equal(
        decode.decode(stream.getvalue(), 0, 3), np.asarray(palette.convert("RGB"))
    )


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_ignored(format):
    exif = Image.Exif()
    exif[0x0112] = 6
    plain, turned = encoded(SMOOTH, format), encoded(SMOOTH, format, exif=exif)
    assert plain != turned
    np.testing.assert_array_equal(decode.decode(plain, 0, 3), decode.decode(turned, 0, 3))


def test_the_suffix_does_not_matter(tmp_path):
    (tmp_path / "really_a_png.jpg").write_bytes(encoded(NOISE, "PNG"))
    data, _ = sources.open_folder(tmp_path, "train").record(0)
    np.testing.assert_array_equal(decode.decode(data, 0, 3), NOISE)


def header_of(width, height):
    """A JPEG whose header lies about its size."""
    data = bytearray(encoded(NOISE))
    frame = data.index(b"\xff\xc0") + 5  # marker, length, precision; then height and width
    data[frame : frame + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def damaged():
    bad = {
        "empty": b"",
        "text": b"hello world, not an image",
        "svg": b"<svg/>",
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0",
    }
    for name, how in (
        ("jpeg", {}),
        ("progressive", {"progressive": True}),
        ("cmyk", {"mode": "CMYK"}),
    ):
        good = encoded(SMOOTH, **how)
        half = len(good) // 2
        bad[f"{name}, half"] = good[:half]
        bad[f"{name}, 99 %"] = good[: len(good) * 99 // 100]
        bad[f"{name}, half with an end mark"] = good[:half] + b"\xff\xd9"
        bad[f"{name}, half, then zeros"] = good[:half] + bytes(len(good) - half)
    for name in ("PNG", "WEBP", "GIF", "BMP", "TIFF"):
        good = encoded(NOISE, name)
        bad[f"{name}, half"] = good[: len(good) // 2]
    return bad


@pytest.mark.parametrize("name", damaged())
def test_damaged_images_are_rejected(name):
    with pytest.raises(decode.BadImage):
        decode.decode(damaged()[name], 40, 3)


@pytest.mark.parametrize(("width", "height"), [(65000, 65000), (8000, 9000)])
def test_a_decompression_bomb_is_rejected_by_its_header(width, height):
    with pytest.raises(decode.BadImage, match=f"{width} x {height} pixels, more than 50000000"):
        decode.decode(header_of(width, height), 40, 3)


@pytest.mark.parametrize(("width", "height"), [(49_000_000, 1), (1, 70_000)])
def test_a_line_of_millions_of_pixels_is_rejected_by_its_header(width, height):
    """A PNG of 49,000,000 x 1 pixels took 10 seconds and 1.7 GB."""
    data = bytearray(encoded(NOISE, "PNG"))
    header = data.index(b"IHDR")
    data[header + 4 : header + 12] = struct.pack(">II", width, height)
    checksum = zlib.crc32(data[header : header + 17])
    data[header + 17 : header + 21] = struct.pack(">I", checksum)
    with pytest.raises(decode.BadImage, match=f"{width} x {height} pixels, a side of more than"):
        decode.decode(bytes(data), 40, 3)


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_values_without_a_natural_range_are_rejected(dtype):
    data = encoded(np.full((8, 8), 300, dtype), "TIFF")
    with pytest.raises(decode.BadImage, match=f"{np.dtype(dtype)} samples .* config.data.range"):
        decode.decode(data, 8, 3)


@functools.cache
def real():
    """The 125 real files, by name."""
    with zipfile.ZipFile(REAL) as archive:
        return {
            name: archive.read(name)
            for name in sorted(archive.namelist())
            if not name.endswith("/")
        }


def size_of(data):
    return Image.open(io.BytesIO(data)).size


def small():
    """Those of them that fit a canvas of 512."""
    return [data for data in real().values() if max(size_of(data)) <= 512]


@needs_real
def test_real_files_have_pillows_pixels():
    assert (len(real()), len(small())) == (125, 111)
    for data in small()[::2]:
        np.testing.assert_array_equal(decode.decode(data, 512, 3), by_pillow(data))
    for data in real().values():
        width, height = size_of(data)
        if max(width, height) > 512:
            ours = decode.decode(data, 512, 3)
            assert max(ours.shape) == 512
            np.testing.assert_array_equal(ours, decode._decode_with_pillow(data, 512, 3))


def augmentation(**change):
    options = dict(
        scale=(0.2, 1.0),
        ratio=(3 / 4, 4 / 3),
        flip=True,
        interpolation="bicubic",
        mean=(0.0,) * 3,
        std=(1 / 255,) * 3,
        image_size=(280, 280),
        eval_resize=256,
        eval_size=(224, 224),
    )
    return Augment(**options | change)


def crop_keys(step, positions):
    return jax.vmap(lambda position: jax.random.fold_in(jax.random.key(step), position))(positions)


@needs_real
def test_real_crops_and_evaluation_images_equal_pillows_within_a_level():
    """Every file that fits the canvas: a crop on host and device, and the evaluation transform."""
    ours = augmentation()
    crop = HostCrop(ours, crop_keys, 512)
    train = jax.jit(lambda keys, batch: ours(keys, batch))
    evaluate = jax.jit(ours.evaluation)
    draws = crop.draws(0, np.arange(len(small())))
    for i, data in enumerate(small()):
        canvas, size = decode.decode_to_canvas(data, 512, 3)
        batch = {"image": canvas[None], "size": size[None]}
        pixels = canvas[: size[0], : size[1]]
        device = np.asarray(train(crop_keys(0, np.array([i])), batch)[0])
        assert np.abs(device - crop(pixels, draws[i])).max() <= 1.001
        width, height = size[::-1]
        resized = tuple(int(256 * side) // int(min(size)) for side in (width, height))
        whole = Image.fromarray(pixels).resize((resized[0], int(height)), Image.Resampling.BICUBIC)
        whole = np.asarray(whole.resize(resized, Image.Resampling.BICUBIC)).astype(int)
        top, left = (round((resized[axis] - 224) / 2) for axis in (1, 0))
        expected = whole[top : top + 224, left : left + 224]
        assert np.abs(np.asarray(evaluate(batch)[0]) - expected).max() <= 1.001
