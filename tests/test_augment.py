"""Crops and resizes against Pillow, boxes against torchvision's rule."""

import functools

import jax
import numpy as np
import pytest
from PIL import Image

from lmim_jax.data.augment.device import KERNELS, Augment, crop_resize, draw_crop, fit_crop

RESIZE = jax.jit(crop_resize, static_argnames=("size", "kernel"))
PILLOW = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
RNG = np.random.default_rng(0)


@functools.cache
def picture(height, width, channels=3):
    """A natural-looking picture with strong edges, in a canvas of 96."""
    rng = np.random.default_rng(height * width)
    rough = Image.fromarray(rng.integers(0, 256, (7, 9, channels), dtype=np.uint8).squeeze())
    pixels = np.asarray(rough.resize((width, height), Image.Resampling.NEAREST)).reshape(
        height, width, channels
    )
    pixels = np.clip(pixels + rng.normal(0, 9, pixels.shape), 0, 255).astype(np.uint8)
    # Garbage outside of the image must not leak in
    canvas = rng.integers(0, 256, (96, 96, channels), dtype=np.uint8)
    canvas[:height, :width] = pixels
    return canvas, Image.fromarray(pixels.squeeze())


def reference(image, box, size, kernel):
    """Crop first, then Pillow's one-axis resizes, horizontal then vertical."""
    top, left, height, width = (int(v) for v in box)
    crop = image.crop((left, top, left + width, top + height))
    resized = crop.resize((size[1], height), PILLOW[kernel]).resize(
        (size[1], size[0]), PILLOW[kernel]
    )
    return np.asarray(resized).astype(int)


@pytest.mark.parametrize("kernel", PILLOW)
@pytest.mark.parametrize("size", [(20, 20), (40, 56)])
def test_crops_equal_pillow_within_one_level(kernel, size):
    for height, width in ((96, 96), (40, 80), (91, 33), (9, 12)):
        canvas, image = picture(height, width)
        for _ in range(8):
            box_h, box_w = RNG.integers(2, height + 1), RNG.integers(2, width + 1)
            top, left = RNG.integers(0, height - box_h + 1), RNG.integers(0, width - box_w + 1)
            box = np.array([top, left, box_h, box_w], np.int32)
            ours = RESIZE(canvas, box, size=size, kernel=KERNELS[kernel])
            expected = reference(image, box, size, kernel)
            assert np.abs(np.asarray(ours).astype(int) - expected).max() <= 1


def make(**change):
    options = dict(
        scale=(0.2, 1.0),
        ratio=(0.75, 4 / 3),
        flip=True,
        interpolation="bicubic",
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        image_size=(40, 40),
        eval_resize=32,
        eval_size=(28, 28),
    )
    return Augment(**options | change)


@pytest.mark.parametrize(("height", "width"), [(96, 96), (41, 90), (95, 34), (32, 32), (20, 31)])
def test_evaluation_is_torchvisions_resize_and_center_crop(height, width):
    canvas, image = picture(height, width)
    short = min(height, width)
    resized_w, resized_h = 32 * width // short, 32 * height // short
    resized = image.resize((resized_w, height), PILLOW["bicubic"]).resize(
        (resized_w, resized_h), PILLOW["bicubic"]
    )
    top, left = round((resized_h - 28) / 2), round((resized_w - 28) / 2)
    expected = np.asarray(resized.crop((left, top, left + 28, top + 28))).astype(int)
    batch = {"image": canvas[None], "size": np.array([[height, width]], np.int32)}
    ours = jax.jit(make(mean=(0,) * 3, std=(1 / 255,) * 3).evaluation)(batch)
    assert np.abs(np.asarray(ours[0]) - expected).max() <= 1.01


def torchvision_box(rng, height, width, scale=(0.2, 1.0), ratio=(0.75, 4 / 3)):
    """An independent sampler, written from torchvision's description."""
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = np.exp(rng.uniform(*np.log(ratio)))
        w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return rng.integers(0, height - h + 1), rng.integers(0, width - w + 1), h, w
    if width / height < ratio[0]:
        h, w = round(width / ratio[0]), width
    elif width / height > ratio[1]:
        h, w = height, round(height * ratio[1])
    else:
        h, w = height, width
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize(("height", "width"), [(64, 64), (40, 90), (30, 300)])
def test_boxes_are_distributed_as_torchvisions(height, width):
    count, rng = 4000, np.random.default_rng(1)
    size = np.array([height, width], np.int32)
    ratio = (0.75, 4 / 3)

    def sample(key):
        return fit_crop(draw_crop(key, (0.2, 1.0), ratio), size, 300, ratio)

    ours = np.asarray(jax.vmap(sample)(jax.random.split(jax.random.key(0), count)), float)
    theirs = np.array([torchvision_box(rng, height, width) for _ in range(count)], float)
    assert (ours >= 0).all()
    assert (ours[:, :2] + ours[:, 2:] <= (height, width)).all()
    for a, b in zip(ours.T, theirs.T, strict=True):  # two-sample Kolmogorov-Smirnov, p = 0.001
        grid = np.unique(np.concatenate([a, b]))
        gap = np.abs(
            np.searchsorted(np.sort(a), grid, "right") - np.searchsorted(np.sort(b), grid, "right")
        ).max()
        assert gap / count < 1.95 * np.sqrt(2 / count)


def test_flip_mirrors_half_of_the_images():
    canvas, _ = picture(96, 96)
    batch = {"image": np.stack([canvas] * 64), "size": np.full((64, 2), 96, np.int32)}
    keys = jax.random.split(jax.random.key(0), 64)
    flipped, plain = (np.asarray(jax.jit(make(flip=flip))(keys, batch)) for flip in (True, False))
    mirrored = (flipped == plain[:, :, ::-1]).all((1, 2, 3))
    assert 16 < mirrored.sum() < 48
    assert ((flipped == plain).all((1, 2, 3)) | mirrored).all()


def test_gray_images_work():
    canvas, _ = picture(40, 40, 1)
    batch = {"image": canvas[None], "size": np.array([[40, 40]], np.int32)}
    out = make(mean=(0.5,), std=(0.5,))(jax.random.split(jax.random.key(0), 1), batch)
    assert out.shape == (1, 40, 40, 1)
