"""Several modalities: pairs of files, one image of all their channels, ranges of their own."""

import dataclasses
import functools
import pathlib
import shutil
import zipfile

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict
from PIL import Image

from lmim_jax.cli import image_files, pca
from lmim_jax.configs import interactive_mim_vit_s, small, vit_b
from lmim_jax.data import decode, inventory, modalities, pixel_range, records, sources
from lmim_jax.data.augment.device import Augment
from lmim_jax.data.image_options import MAX_PIXELS, BadImage, ImageOptions
from lmim_jax.data.loader import BatchDecoder
from lmim_jax.data.prepare import tfds_writer
from lmim_jax.evaluators.common.feature_extraction import Extractor, extract_from_files
from lmim_jax.methods import base
from lmim_jax.report import run_features
from lmim_jax.train import loop, modality_subset, runs, saved_classifier, workdir
from lmim_jax.utils.errors import UserError

REAL = pathlib.Path(conftest.ROOT).parent / "shared" / "data" / "roadscene_small.zip"
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


def check_identity_of_one(data):
    """A run restricted to a modality has the identity of its images alone."""
    identity = sources.from_config(data, "train").identity()
    sections = {"data": data, "augment": {}, "method": {"channels": 4}}
    config = ConfigDict({**sections, "training_images": identity})
    chosen = modalities.restrict(config, ["thermal"])
    assert chosen.training_images.to_dict() == sources.from_config(chosen.data, "train").identity()


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


def test_the_images_of_one_modality_are_those_of_its_folder(tmp_path):
    check_identity_of_one(data_config(write_pairs(tmp_path)))


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


def test_pairs_are_shrunk_together_or_not_at_all(tmp_path):
    folder = write_pairs(tmp_path / "pairs", size=(40, 30))  # thermal has 16 bits
    source = sources.open_pairs(folder, {"rgb": "rgb", "thermal": "thermal"}, "train", {})
    data, _, before = tfds_writer._read_image(source, 0, 20, MAX_PIXELS)
    assert len(data) == before
    for path in (folder / "thermal").iterdir():  # now of 8 bits
        pixels = np.asarray(Image.open(path)) >> 8
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    data, _, _ = tfds_writer._read_image(source, 0, 20, MAX_PIXELS)
    for file in records.unpack(data):
        assert decode.decode(file, 0, 3).shape[:2] == (20, 27)


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
    with pytest.raises(BadImage, match=r"a file of one modality, but .* has rgb, thermal"):
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
    folder = sources.open_pairs(config.path, {"rgb": "rgb", "thermal": "thermal"}, "train", {})
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
    check_identity_of_one(prepared)
    _, problems = prepare_data.verify(target, 5)
    assert not problems
    prepared.modalities.thermal.path = "infrared"
    with pytest.raises(UserError, match=r"no image 'infrared'.*it has: rgb, thermal"):
        sources.from_config(prepared, "train")
    prepared.modalities = ConfigDict()
    with pytest.raises(UserError, match="has the images rgb, thermal"):
        sources.from_config(prepared, "train")


@pytest.mark.skipif(not REAL.exists(), reason="needs shared/data/roadscene_small.zip")
def test_real_pairs(tmp_path):
    with zipfile.ZipFile(REAL) as file:
        file.extractall(tmp_path)
    config = data_config(tmp_path / "roadscene_small")
    config.modalities.thermal.path = "infrared"
    config.canvas = 64
    source = sources.from_config(config, "train")
    assert len(source) == 221 and not source.missing
    options = ImageOptions.from_config(config)
    for index in (0, 110, 220):
        assert decode.decode(source.record(index)[0], 64, 4, options).shape[-1] == 4


PAIR = (("rgb", 3, 4), ("thermal", 1, 2))  # name, channels, patch size


def build(name="interactive_mim", modalities=PAIR, **change):
    section = {**tiny.method(name), **change, "modalities": modalities}
    if modalities:
        section["channels"] = sum(channels for _, channels, _ in modalities)
    return base.from_config(section, total_steps=10, steps_per_epoch=5)


def images_of(method, count=2):
    shape = (count, *method.image_size, method.channels)
    return jax.random.normal(jax.random.key(1), shape)


def views_of(method, count=2):
    return jax.jit(method.sample)(jax.random.key(2), jax.random.split(jax.random.key(3), count))


@pytest.fixture(scope="module")
def interactive():
    method = build()
    return method, jax.jit(method.init)(jax.random.key(0))


def test_patches_of_all_modalities_are_on_one_grid():
    method = build()
    images = images_of(method)
    patches = method.patches_of(images, method.grid)
    assert patches.shape == (2, 2 * 16, 48)
    pixels = images[:, 4:8, 8:12]  # row 1, column 2
    np.testing.assert_array_equal(patches[:, 6], pixels[..., :3].reshape(2, -1))
    thermal = pixels[..., 3].reshape(2, 2, 2, 2, 2).mean((2, 4))  # averages of 2 x 2 pixels
    np.testing.assert_allclose(patches[:, 16 + 6, :4], thermal.reshape(2, -1), atol=1e-6)
    assert not patches[:, 16:, 4:].any()
    tokens = jnp.broadcast_to(jnp.arange(32), (2, 32))
    painted = method.paint(jnp.zeros_like(images), tokens, patches)
    np.testing.assert_array_equal(painted[..., :3], images[..., :3])
    np.testing.assert_allclose(
        painted[:, 4:6, 8:10, 3], thermal[:, :1, :1].repeat(2, 1).repeat(2, 2), atol=1e-6
    )


@pytest.mark.parametrize("masks", ["independent", "joint"])
def test_every_modality_has_as_many_masked_patches(masks):
    method = build(modality_masks=masks)
    views = views_of(method)
    for name, count in (("visible", 4), ("masked", 12)):
        tokens = np.asarray(views[name])
        assert tokens.shape == (2, 2 * count)
        assert (tokens[:, :count] < 16).all() and (tokens[:, count:] >= 16).all()
        same = (tokens[:, :count] == tokens[:, count:] - 16).all()
        assert same == (masks == "joint")


def test_what_is_visible_in_one_modality_influences_what_is_hidden_in_the_other(interactive):
    method, params = interactive
    images = images_of(method)
    order = jnp.arange(16)
    # Position 5 is hidden in RGB and visible in thermal
    rgb_visible = jnp.array([0, 1, 2, 3])
    thermal_visible = jnp.array([5, 8, 9, 10])
    hidden = [jnp.setdiff1d(order, rgb_visible), jnp.setdiff1d(order, thermal_visible)]
    views = {
        "visible": jnp.concatenate([rgb_visible, thermal_visible + 16])[None].repeat(2, 0),
        "masked": jnp.concatenate([hidden[0], hidden[1] + 16])[None].repeat(2, 0),
    }

    @jax.jit
    def predictions(pixels):
        return method.forward(params, {}, pixels, views)["predictions"]

    before = predictions(images)
    place = int(jnp.argwhere(hidden[0] == 5)[0, 0])
    row_and_column = (slice(None), slice(4, 8), slice(4, 8))
    thermal = images.at[(*row_and_column, 3)].add(1.0)
    assert jnp.abs(predictions(thermal) - before)[:, place, :48].max() > 1e-4
    # Its own pixels are hidden: no prediction sees them
    rgb = images.at[(*row_and_column, slice(0, 3))].add(1.0)
    np.testing.assert_array_equal(predictions(rgb), before)


def test_the_gradient_of_one_modality_reaches_the_patches_of_the_other(interactive):
    method, params = interactive
    images = images_of(method)
    views = views_of(method)

    @jax.jit
    @jax.grad
    def gradient(params):
        return method.loss_fn(params, {}, images, views, 0)[1]["rgb_loss"]

    encoder = gradient(params)["encoder"]
    assert jnp.abs(encoder["patch_embed_thermal"]["kernel"]).max() > 0
    assert jnp.abs(encoder["modality_embed_thermal"]).max() > 0


def test_with_one_modality_and_without_cross_attention_it_is_mae():
    mae = build("mae", modalities=())
    section = {key: value for key, value in tiny.method("mae").items() if key != "name"}
    method = build("interactive_mim", modalities=(), **section, decoder="self")
    params = jax.jit(mae.init)(jax.random.key(0))
    same = jax.jit(method.init)(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, params, same)
    images = images_of(mae)
    views = views_of(mae)
    jax.tree.map(np.testing.assert_array_equal, views, views_of(method))
    assert method.target_of(params) == {} and method.ema_rate(3) == 0
    found = []
    for one in (mae, method):
        gradient = jax.jit(jax.value_and_grad(one.loss_fn, has_aux=True))
        found.append(gradient(params, {}, images, views, 0))
    jax.tree.map(np.testing.assert_array_equal, *found)
    painted = [jax.jit(one.reconstruct)(params, images, views) for one in (mae, method)]
    np.testing.assert_array_equal(*painted)


@pytest.mark.parametrize("name", ["mae", "latent_mim"])
def test_other_methods_take_several_modalities(name):
    method = build(name)
    params = jax.jit(method.init)(jax.random.key(0))
    views = views_of(method)
    gradient = jax.jit(jax.grad(method.loss_fn, has_aux=True))
    grads, metrics = gradient(params, method.target_of(params), images_of(method), views, 0)
    assert jnp.isfinite(metrics["loss"])
    for tree in (grads["encoder"], grads["modalities"]):
        for path, leaf in jax.tree.leaves_with_path(tree):
            if "embed" in jax.tree_util.keystr(path):
                assert jnp.abs(leaf).max() > 0, path


def test_a_modality_is_painted_from_what_is_visible_in_the_other_alone(interactive):
    method, params = interactive
    method = dataclasses.replace(method, norm_pix=False)
    crops = np.random.default_rng(0).integers(0, 256, (2, *method.image_size, 4), np.uint8)

    def reconstruct(views, crops=crops):
        pixels = jax.jit(method.reconstruct)(params, jnp.float32(crops) / 256, views)
        return np.asarray(256 * pixels)

    found = run_features._translations(method, crops, reconstruct)
    assert [(one.given, one.predicted) for one in found] == [("rgb", "thermal"), ("thermal", "rgb")]
    other = crops.copy()
    other[..., 3] = 255 - other[::-1, ::-1, :, 3]  # the thermal image is another one
    changed = run_features._translations(method, other, functools.partial(reconstruct, crops=other))
    for scene, (given, predicted, true) in enumerate(found[0].images):
        np.testing.assert_array_equal(given, crops[scene, ..., :3])
        np.testing.assert_array_equal(true, crops[scene, ..., 3:])
        assert predicted.shape == true.shape
        # The prediction does not know it
        np.testing.assert_allclose(changed[0].images[scene][1], predicted, atol=1e-3)
    assert np.abs(changed[1].images[0][1] - found[1].images[0][1]).max() > 1e-2
    assert not run_features._translations(build("mae", modalities=()), crops, reconstruct)


def test_features_are_means_over_the_modalities_of_a_position(interactive):
    method, params = interactive
    images = images_of(method)
    patches = method.patches_of(images, method.grid)
    positions = method.positions_of(params, method.grid)
    tokens, _ = method._encoder.apply({"params": params["encoder"]}, patches, positions)
    features = jax.jit(method.features)(params, images)
    expected = (tokens[:, 1:17] + tokens[:, 17:]) / 2
    np.testing.assert_allclose(features["patches"], expected, atol=1e-6)
    weights = features["block00/attention"]
    assert weights.shape == (2, 2, 17, 17)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)


@pytest.mark.parametrize("canvas", [None, 16])
def test_features_of_pairs_of_files_are_the_methods_own(tmp_path, interactive, canvas):
    method, params = interactive
    folder = write_pairs(tmp_path, ("a", "deep/b", "alone"), (16, 16))
    (folder / "thermal" / "alone.tif").unlink()
    config = data_config(folder)
    config.modalities.thermal.range = "7000,9000"
    source, lines = image_files.open_images(folder, config)
    assert "1 images have no partner in thermal: alone.png" in "".join(lines)
    transform = augment_of(config)
    options = ImageOptions.from_config(config)
    extractor = Extractor(
        method,
        params,
        transform,
        size=16,
        kinds=("mean", "patches"),
        norm=True,
        image="patches",
        batch_size=2,
        canvas=canvas,
        options=options,
    )
    found = extract_from_files(extractor, source, lambda count: None)
    assert found.names == ["a.png", "deep/b.png"] and found.grids.tolist() == [[4, 4]] * 2
    for index in range(2):
        pixels = decode.decode(source.record(index)[0], 16, 4, options).astype(np.float32)
        expected = method.features(params, transform.normalize(pixels[None]))["patches"][0]
        np.testing.assert_allclose(found.features["patches"][index], expected, atol=1e-5)
    with pytest.raises(UserError, match=r"there is no folder rgb in it.*rgb/, thermal/"):
        image_files.open_images(folder / "rgb", config)


def augment_of(config):
    """Crops of 16 pixels, the whole image, with the statistics of all modalities."""
    section = vit_b.get_config().augment
    for key in ("mean", "std"):
        section[key] = sum((tuple(part[key]) for part in config.modalities.values()), ())
    section.eval_resize = 16
    return Augment.from_config(section, image_size=(16, 16), eval_size=(16, 16))


@pytest.mark.parametrize("name", ["rgb", "thermal"])
def test_one_modality_of_several_becomes_an_ordinary_encoder(interactive, name):
    method, params = interactive
    (modality,) = (part for part in method.modalities if part.name == name)
    images = images_of(method)
    channels = slice(0, 3) if name == "rgb" else slice(3, 4)
    alone = dataclasses.replace(method, modalities=(modality,), channels=modality.channels)
    folded = modality_subset.fold(params, modality, method.patch_size)
    plain = dataclasses.replace(method, modalities=(), channels=modality.channels)
    expected = jax.jit(alone.features)(params, images[..., channels])
    found = jax.jit(plain.features)(folded, images[..., channels])
    assert "patch_embed" in folded["encoder"] and "modalities" not in folded
    np.testing.assert_allclose(found["patches"], expected["patches"], atol=2e-5)


def test_pca_reads_pairs(tmp_path):
    folder = write_pairs(tmp_path / "pairs")
    config = small.get_config("interactive_mim,rgb_thermal")
    workdir.claim(tmp_path / "run", config.copy_and_resolve_references().to_dict(), None)
    run = runs.open_run(tmp_path / "run")
    canvases, _ = run_features.sample_canvases(pca.with_images(run, str(folder)).data, 5)
    assert canvases["image"].shape[0] == 5
    assert canvases["image"].shape[-1] == 4  # colors and temperature
    with pytest.raises(UserError, match=r"there is no folder rgb in it"):
        pca.with_images(run, str(folder / "thermal"))


def test_a_frozen_teacher_takes_the_modality_that_is_left(tmp_path):
    teacher = {**tiny.method("interactive_mim"), "channels": 4, "modalities": PAIR}
    change = dict(predict="latents", target="frozen:RUN", frozen=teacher, channels=4)
    config = ConfigDict({"data": data_config(tmp_path), "augment": {}, "method": teacher | change})
    method = base.from_config(config.method, total_steps=1, steps_per_epoch=1)
    params = jax.jit(method.init)(jax.random.key(0))
    weights = runs.Weights(params, jax.jit(method.target_of)(params), 0)
    run = runs.Run(tmp_path, config, method, loaded=weights)
    chosen = modality_subset.choose(run, ["thermal"])
    expected = jax.eval_shape(
        lambda: chosen.method.target_of(chosen.method.init(jax.random.key(0)))
    )
    assert chosen.method.frozen.channels == 1 and chosen.method.frozen.modalities == ()
    jax.tree.map(lambda x, y: np.testing.assert_equal(x.shape, y.shape), chosen.target, expected)


def test_mistakes_of_a_recipe_are_named():
    with pytest.raises(UserError, match="takes images of one modality; interactive_mim, latent_m"):
        build("ijepa")
    with pytest.raises(UserError, match=r"thermal\.patch_size=3 must divide"):
        build(modalities=(("rgb", 3, 4), ("thermal", 1, 3)))
    with pytest.raises(UserError, match="context_weight=1"):
        build("latent_mim", context_weight=1.0)
    config = interactive_mim_vit_s.get_config()
    config.data.modalities.thermal.channels = 2
    assert config.method.channels == 5
    with pytest.raises(UserError, match=r"thermal\.mean=\(0\.5,\) must have 2 numbers"):
        modalities.method_options(config)
    config.data.modalities.thermal.update(mean=(0.5, 0.5), std=(0.2, 0.2))
    assert len(config.augment.mean) == 5
    assert modalities.method_options(config)["modalities"] == (("rgb", 3, 16), ("thermal", 2, 16))
    config.data.channels = 3
    with pytest.raises(UserError, match=r"data\.channels=3 must be 5"):
        modalities.method_options(config)


@pytest.mark.slow
def test_a_run_on_pairs_trains_and_is_read_for_one_modality(tmp_path):
    folder = write_pairs(tmp_path / "pairs", [f"{i:02}" for i in range(16)], (16, 16))
    config = small.get_config("interactive_mim,rgb_thermal")
    config.method.update({k: v for k, v in tiny.SIZES.items() if k in config.method})
    for modality in config.data.modalities.values():
        modality.patch_size = 4
    config.update(total_steps=2, batch_size=8, micro_batches=1, gauge_images=8)
    config.data.update(path=str(folder), canvas=16, threads=1)
    config.augment.eval_resize = 16
    config.evaluators = ConfigDict(
        dict(strict=True, visualization=dict(config.evaluators.visualization, every=0.0, images=2))
    )
    loop.train(config, tmp_path / "run")
    run = runs.open_run(tmp_path / "run")
    assert run.config.data.modalities.thermal.range != "auto"
    assert [modality.name for modality in run.method.modalities] == ["rgb", "thermal"]
    chosen = modality_subset.choose(run, ["thermal"])
    assert chosen.method.channels == 1 and chosen.method.modalities == ()
    assert chosen.config.data.path == str(folder / "thermal")
    for names, owner in ((["thermal"], chosen), ([], run)):  # what a classifier was trained on
        origin = {"run": str(run.folder), "step": 2, "checkpoint": chosen.weights.checkpoint}
        origin |= {"weights": "online", "modalities": names}
        read = saved_classifier._encoder(run.folder / "evaluations" / "it", origin)
        jax.tree.map(np.testing.assert_array_equal, read, owner.encoder_params("online"))
    batch, _ = chosen.data.sample("train", 8)
    features = chosen.method.features(chosen.params, batch["images"])
    assert features["patches"].shape == (8, 16, 16)
    with pytest.raises(UserError, match=r"no modality .infrared"):
        modality_subset.choose(run, ["infrared"])
    loop.train(config, tmp_path / "run")  # resumed: the range of the run is kept
