"""lmim_jax.load: from image files, PIL images and arrays to features."""

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

import lmim_jax
from lmim_jax.cli import export
from lmim_jax.data.image_options import ImageOptions
from lmim_jax.train import inference, runs
from lmim_jax.utils.errors import UserError


@pytest.fixture(scope="module")
def folder(images, tmp_path_factory):
    """A run of the tiny recipe that has not trained."""
    config = tiny.get_config()
    config.data.path = str(images)
    return tiny.run(config, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def model(folder):
    return lmim_jax.load(folder)


@pytest.fixture(scope="module")
def paths(images):
    """PNG and JPEG files, of several sizes."""
    return sorted((images / "test").rglob("*.*g"))


def test_images_are_prepared_as_the_evaluators_do(folder, model, paths):
    data = runs.open_run(folder).data
    (batch,) = data.batches("test", 16)
    prepared = model.preprocess(paths)
    assert prepared.shape == (16, 16, 16, 3)
    assert prepared.dtype == np.float32
    np.testing.assert_allclose(prepared, batch["images"], atol=1e-5)


def test_features_are_those_of_the_method(model, paths):
    images = model.preprocess(paths)
    found = model.encode(images, batch_size=5)  # 16 images in four batches, the last one padded
    expected = model.method.features(model.params, images)
    assert found.cls.shape == (16, 16)
    assert found.patches.shape == (16, 16, 16)
    np.testing.assert_allclose(found.cls, expected["cls"], atol=1e-5)
    np.testing.assert_allclose(found.patches, expected["patches"], atol=1e-5)
    np.testing.assert_allclose(found.mean, expected["patches"].mean(axis=1), atol=1e-5)
    # The choice of the recipe, whatever `norm` is
    np.testing.assert_allclose(found.image, expected["patches_prenorm"].mean(axis=1), atol=1e-5)
    before = model.encode(images, norm=False)
    np.testing.assert_allclose(before.image, found.image, atol=1e-5)
    np.testing.assert_allclose(before.patches, expected["patches_prenorm"], atol=1e-5)
    assert not np.allclose(before.mean, found.mean)


def test_other_sizes_can_be_encoded(model):
    larger = np.zeros((2, 24, 32, 3), np.float32)
    assert model.encode(larger).patches.shape == (2, 6 * 8, 16)


def test_every_kind_of_image_gives_the_same_pixels(model, paths):
    path = next(path for path in paths if path.suffix == ".png")
    pixels = np.asarray(Image.open(path))
    expected = model.preprocess(path)
    assert expected.shape == (1, 16, 16, 3)
    kinds = [str(path), Image.open(path), pixels, pixels / 255, jax.numpy.asarray(pixels)]
    for image in kinds:
        np.testing.assert_array_equal(model.preprocess(image), expected)
    mixed = model.preprocess([path, Image.open(path), pixels], batch_size=2)
    np.testing.assert_array_equal(mixed, np.repeat(expected, 3, axis=0))
    for batch in (pixels[None], np.float32(pixels[None] / 255), (path for _ in range(1))):
        np.testing.assert_array_equal(model.preprocess(batch), expected)


def test_the_fourth_band_of_an_array_is_not_taken_for_opacity():
    pixels = np.full((128, 128, 4), 200, np.uint8)
    pixels[..., 3] = 0  # thermal
    options = ImageOptions(transparency="white")
    for array in (pixels, pixels / 255):
        found = inference._pixels(array, 64, 4, options, "the image")
        np.testing.assert_array_equal(found[5, 5], [200, 200, 200, 0])


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_an_open_image_is_turned_upright_like_its_file(format, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "image"
    Image.fromarray(np.arange(200, dtype=np.uint8).reshape(10, 20)).save(path, format, exif=exif)
    options = ImageOptions(exif_orientation=True)
    of_file = inference._pixels(path, 0, 3, options, "it")
    assert of_file.shape == (20, 10, 3)
    np.testing.assert_array_equal(inference._pixels(Image.open(path), 0, 3, options, "it"), of_file)


def test_images_of_one_channel_and_large_images_are_converted(model):
    gray = np.arange(30 * 20, dtype=np.uint8).reshape(30, 20)
    colored = np.repeat(gray[..., None], 3, axis=-1)
    expected = model.preprocess(colored)
    np.testing.assert_array_equal(model.preprocess(gray), expected)
    np.testing.assert_array_equal(model.preprocess(gray[..., None]), expected)
    large = Image.fromarray(colored).resize((100, 150))
    assert model.preprocess(large).shape == (1, 16, 16, 3)  # the canvas has 40 pixels


def test_the_description_names_method_weights_and_step(model):
    assert repr(model) == "Model(latent_mim, 1 layers, width 16, online weights of step 0)"
    assert (model.weights, model.step) == ("online", 0)


@pytest.mark.parametrize("weights", ["online", "target"])
def test_an_exported_model_gives_the_same_features(folder, paths, tmp_path, weights):
    model = lmim_jax.load(folder, weights=weights)
    export.export(runs.open_run(folder), "flax", weights, tmp_path / "out")
    exported = lmim_jax.load(tmp_path / "out")
    assert exported.weights == weights
    assert runs.open_run(folder).has_target
    assert not runs.open_run(tmp_path / "out").has_target
    for one, other in zip(
        model.encode(model.preprocess(paths)),
        exported.encode(exported.preprocess(paths)),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


INVALID_IMAGES = {
    "no images: give at least one": [],
    r"/nowhere\.jpg cannot be read: No such file": "/nowhere.jpg",
    "image 1 is a dict: give paths, PIL images, or arrays": [np.zeros((8, 8, 3), np.uint8), {}],
    "int is not an image": 3,
    r"image 0 has the shape \(8, 8, 2\)": np.zeros((8, 8, 2), np.uint8),
    r"image 0 has the shape \(8,\)": np.zeros(8, np.uint8),
    "image 0 has the dtype int64.*uint8": np.zeros((8, 8, 3), np.int64),
    r"image 0 has values from 0 to 255; .* must be in 0 \.\. 1": np.linspace(0, 255, 48).reshape(
        4, 4, 3
    ),
    "image 0 has values from nan": np.full((4, 4, 3), np.nan),
    "image 0: float32 samples from 300": Image.new("F", (8, 8), 300),
}


@pytest.mark.parametrize("message", INVALID_IMAGES)
def test_an_invalid_image_is_named(model, message):
    with pytest.raises(UserError, match=message):
        model.preprocess(INVALID_IMAGES[message])


def test_a_file_that_is_not_an_image_is_named(model, tmp_path):
    path = tmp_path / "text.png"
    path.write_text("not an image")
    with pytest.raises(UserError, match=r"text\.png cannot be read"):
        model.preprocess([path])


UNPREPARED = {
    r"a batch \[B, H, W, C\]": np.zeros((16, 16, 3), np.float32),
    "floating-point numbers, not uint8": np.zeros((1, 16, 16, 3), np.uint8),
    "3 channels, not 1": np.zeros((1, 16, 16, 1), np.float32),
    "multiples of the patch size 4, not 16 x 15": np.zeros((1, 16, 15, 3), np.float32),
}


@pytest.mark.parametrize("message", UNPREPARED)
def test_images_that_are_not_prepared_are_rejected(model, message):
    with pytest.raises(UserError, match=message):
        model.encode(UNPREPARED[message])


def test_weights_that_do_not_exist_are_rejected(folder):
    with pytest.raises(UserError, match=r"'both' must be one of: online \| target"):
        lmim_jax.load(folder, weights="both")
