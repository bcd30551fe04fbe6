"""Each operation of RandAugment against Pillow's, by timm's levels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from lmim_jax.data.augment import randaugment

FILL = (124, 116, 104)
APPLY = jax.jit(randaugment.apply_operation)


def picture(seed, size=(40, 33)):
    """Smooth shades, edges and noise, in a narrow range: there is something to stretch."""
    rng = np.random.default_rng(seed)
    rough = Image.fromarray(rng.integers(30, 220, (5, 6, 3), dtype=np.uint8)).resize(
        size[::-1], seed % 4
    )
    return np.clip(np.asarray(rough) + rng.normal(0, 4, (*size, 3)), 20, 230).astype(np.uint8)


def solarize_add(image, add):
    return image.point([min(255, i + add) if i < 128 else i for i in range(256)] * 3)


def pillow(name, image, level, sign):
    """The operation by Pillow, as timm calls it, at a level 0 .. 10."""
    bicubic = dict(resample=Image.Resampling.BICUBIC, fillcolor=FILL)
    shear = 0.03 * level * sign
    shift = 0.045 * level * sign

    def move(*matrix):
        return image.transform(image.size, Image.Transform.AFFINE, matrix, **bicubic)

    def enhance(kind):
        return kind(image).enhance(max(0.1, 1 + 0.09 * level * sign))

    return {
        "AutoContrast": lambda: ImageOps.autocontrast(image),
        "Equalize": lambda: ImageOps.equalize(image),
        "Invert": lambda: ImageOps.invert(image),
        "Posterize": lambda: ImageOps.posterize(image, 4 - int(level / 10 * 4)),
        "Solarize": lambda: ImageOps.solarize(image, 256 - int(level / 10 * 256)),
        "SolarizeAdd": lambda: solarize_add(image, int(level / 10 * 110)),
        "Color": lambda: enhance(ImageEnhance.Color),
        "Contrast": lambda: enhance(ImageEnhance.Contrast),
        "Brightness": lambda: enhance(ImageEnhance.Brightness),
        "Sharpness": lambda: enhance(ImageEnhance.Sharpness),
        "Rotate": lambda: image.rotate(3 * level * sign, **bicubic),
        "ShearX": lambda: move(1, shear, 0, 0, 1, 0),
        "ShearY": lambda: move(1, 0, 0, shear, 1, 0),
        "TranslateX": lambda: move(1, 0, shift * image.size[0], 0, 1, 0),
        "TranslateY": lambda: move(1, 0, 0, 0, 1, shift * image.size[1]),
    }[name]()


@pytest.mark.parametrize("name", randaugment.OPERATIONS)
def test_operations_equal_pillows_within_one_level(name):
    number = randaugment.OPERATIONS.index(name)
    for seed, level in enumerate((9.0, 9.37, 6.2, 0.7, 0.0)):
        for sign in (1, -1):
            pixels = picture(seed)
            expected = np.asarray(pillow(name, Image.fromarray(pixels), level, sign)).astype(int)
            x = jnp.asarray(pixels, jnp.float32)
            ours = np.asarray(APPLY(number, x, level, float(sign), jnp.asarray(FILL, jnp.float32)))
            assert (ours == np.floor(ours)).all()
            off = np.abs(ours - expected)
            if name in randaugment.MAPS:
                # Two pixels on the very border may be in or out by float32's rounding
                off = np.sort(off.max(axis=-1).ravel())[:-2]
            assert off.max() <= 1, (level, sign)


def test_flat_and_gray_images_work():
    flat = np.full((9, 8, 1), 77, np.float32)
    for number, name in enumerate(randaugment.OPERATIONS[:2]):  # nothing to stretch
        np.testing.assert_array_equal(
            APPLY(number, flat, 9.0, 1.0, jnp.ones(1)), flat, err_msg=name
        )


def test_every_second_image_is_changed_in_many_ways():
    x = jnp.asarray(picture(0), jnp.float32)

    def draw(key):
        fill = jnp.asarray(FILL, jnp.float32)
        return randaugment.randaugment(key, x, fill, layers=1, magnitude=9.0, deviation=0.5)

    drawn = np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 200)))
    same = (drawn == np.asarray(x)[None]).all(axis=(1, 2, 3))
    assert 70 < same.sum() < 130  # about half are left as they are
    assert drawn.min() >= 0
    assert drawn.max() <= 255
    assert len({image.tobytes() for image in drawn}) > 60
