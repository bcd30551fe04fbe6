"""Sources, bad files, and the stream: the same at any worker count and after any restart."""

import io
import logging
import multiprocessing
import shutil

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from lmim_jax.configs import vit_b
from lmim_jax.data import decode, kept_workers, loader, sources
from lmim_jax.data.eval.eval_data import EvaluationData
from lmim_jax.distributed import sharding
from lmim_jax.utils.errors import DataLoaderTimeout, UserError

OPTIONS = vit_b.data().to_dict() | dict(
    canvas=40, channels=3, workers=0, threads=1, timeout=60.0, max_bad_fraction=0.2
)


def options(**change):
    return ConfigDict({**OPTIONS, **change})


def encoded(pixels, **how):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, **how)
    return stream.getvalue()


def test_folder_with_classes(images):
    train, test = (sources.open_folder(images, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (48, 16)
    assert train.classes == test.classes == ("cat", "dog")
    assert [train.record(i)[1] for i in (0, 23, 24, 47)] == [0, 0, 1, 1]
    few = sources.open_folder(images, "train", max_per_class=3)
    assert tuple(few.files) == tuple(
        f"{name}/{i:02d}.{'jpg' if i % 2 else 'png'}" for name in ("cat", "dog") for i in range(3)
    )


def test_folder_without_classes(images, tmp_path):
    shutil.copytree(images / "train", tmp_path / "any" / "deep")
    flat = sources.open_folder(tmp_path, "train")
    assert (len(flat), flat.classes, flat.record(0)[1]) == (48, (), -1)
    assert sources.open_folder(tmp_path, "test") is None


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", r"^there is no folder of images; give --config\.data\.path="),  # of an exported model
        ("/no/such/folder", r"config\.data\.path='/no/such/folder' is not a folder"),
    ],
)
def test_a_missing_folder_is_named(path, message):
    with pytest.raises(UserError, match=message):
        sources.open_folder(path, "train")


def test_an_empty_folder_is_named(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(UserError, match="no images in this folder"):
        sources.open_folder(tmp_path, "train")


@pytest.fixture
def partly_bad(images, tmp_path):
    shutil.copytree(images, tmp_path, dirs_exist_ok=True)
    (tmp_path / "train" / "cat" / "03.jpg").write_bytes(b"broken")
    (tmp_path / "train" / "dog" / "readme.txt").write_text("no image")
    return tmp_path


def batches(folder, *, steps=12, start=0, seed=0, batch_size=8, **change):
    mesh = sharding.make_mesh()
    source = sources.open_folder(folder, "train")
    return loader.training_batches(
        source,
        options(**change),
        seed=seed,
        batch_size=batch_size,
        steps=steps,
        start=start,
        mesh=mesh,
    )


def hashes(stream):
    return [hash(np.asarray(batch["image"]).tobytes()) for batch in stream]


def test_a_bad_file_is_named_counted_and_replaced(partly_bad, caplog):
    with caplog.at_level(logging.WARNING, logger="lmim_jax"):
        stream = list(batches(partly_bad))
    assert len(stream) == 12
    assert caplog.text.count("bad image 1: ") == 1
    assert "03.jpg" in caplog.text
    assert all(np.asarray(batch["image"]).any((1, 2, 3)).all() for batch in stream)


def test_too_many_bad_files_stop_the_run_with_the_list(partly_bad):
    with pytest.raises(
        UserError, match=r"1 of 48 images are damaged.*max_bad_fraction=0.02.*03.jpg"
    ):
        list(batches(partly_bad, max_bad_fraction=0.02))


def order(images, seed=0, steps=18, first=0, rows=8, parts=1):
    decoded = loader.BatchDecoder(sources.open_folder(images, "train"), 40, 3, 1, replace=True)
    return loader.TrainingOrder(decoded, seed, 8, steps, first, rows, parts)


def test_every_image_once_an_epoch_in_another_order(images):
    steps = [order(images).indices(step).tolist() for step in range(18)]
    epochs = [np.concatenate(steps[i : i + 6]).tolist() for i in (0, 6, 12)]
    assert all(sorted(epoch) == list(range(48)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert order(images, seed=1).indices(0).tolist() != steps[0]


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_processes_and_workers_share_each_global_batch(images, processes, parts):
    rows = 8 // processes
    shares = [
        order(images, first=i * rows, rows=rows, parts=min(parts, rows)) for i in range(processes)
    ]
    for step in range(6):
        made = [share[step * share.parts + part] for share in shares for part in range(share.parts)]
        assert (
            np.concatenate([part["index"] for part in made]).tolist()
            == order(images).indices(step).tolist()
        )


def test_the_stream_is_the_same_after_a_restart_and_with_workers(images):
    whole = hashes(batches(images))
    assert hashes(batches(images, start=7)) == whole[7:]
    assert hashes(batches(images, threads=3)) == whole
    assert hashes(batches(images, start=5, workers=2)) == whole[5:]
    assert hashes(batches(images, seed=1)) != whole


class Plain:
    """An augmentation that leaves canvases as they are."""

    @staticmethod
    def evaluation(batch):
        return batch["image"]


def test_evaluation_covers_every_image_once_and_marks_padding(partly_bad, caplog):
    source = {split: sources.open_folder(partly_bad, split) for split in ("train", "test")}
    data = EvaluationData(source, options(), Plain, sharding.make_mesh())
    index = np.concatenate([np.asarray(batch["index"]) for batch in data.batches("train", 20)])
    assert len(index) == 48  # 20 is rounded up to 24, a multiple of the devices
    assert sorted(index) == [-1, *(i for i in range(48) if i != 3)]  # the broken image is left out
    list(data.batches("train", 20))
    assert caplog.text.count("03.jpg") == 1, "named once, not at every evaluation"


@pytest.fixture(scope="module")
def evaluated_by_workers(images):
    source = {split: sources.open_folder(images, split) for split in ("train", "test")}
    yield EvaluationData(source, options(workers=2), Plain, sharding.make_mesh())
    kept_workers.end_all()


def places(stream):
    return [np.asarray(batch["index"]).tolist() for batch in stream]


def test_workers_are_kept_over_evaluations(evaluated_by_workers, images):
    data = evaluated_by_workers
    alone = EvaluationData(data.sources, options(), Plain, data.mesh)
    given_up = data.batches("train", 8)
    next(given_up)
    given_up.close()
    pids = set()
    for split in ("train", "test", "train"):
        assert places(data.batches(split, 8)) == places(alone.batches(split, 8))
        pids.update(child.pid for child in multiprocessing.active_children())
    assert len(pids) == 2
    pixels = [hash(np.asarray(batch["images"]).tobytes()) for batch in data.batches("test", 8)]
    assert pixels == [
        hash(np.asarray(batch["images"]).tobytes()) for batch in alone.batches("test", 8)
    ]


def test_a_kept_worker_that_dies_is_named_and_replaced(evaluated_by_workers):
    data = evaluated_by_workers
    before = places(data.batches("train", 8))
    for child in multiprocessing.active_children():
        child.kill()
        child.join()
    with pytest.raises(DataLoaderTimeout, match=r"data worker 0 of 2 .* died \(exit code -9"):
        list(data.batches("train", 8))
    assert places(data.batches("train", 8)) == before


def test_a_sample_is_random_but_the_same_at_every_call(images):
    source = {split: sources.open_folder(images, split) for split in ("train", "test")}
    data = EvaluationData(source, options(), Plain, sharding.make_mesh())
    (batch, indices), (again, _) = data.sample("train", 10), data.sample("train", 10)
    np.testing.assert_array_equal(batch["image"], again["image"])
    assert len(set(indices)) == 10
    assert {source["train"].record(i)[1] for i in indices} == {
        0,
        1,
    }  # files are sorted by class: a slice would not do
    assert (
        batch["label"].tolist() == [source["train"].record(i)[1] for i in indices] + [-1] * 6
    )  # 8 devices
    assert batch["index"].tolist() == [*range(10)] + [-1] * 6
    assert data.object_masks("train", indices) is None


def test_shapes_is_drawn_deterministically():
    from lmim_jax.data.synthetic import shapes

    first, again, other = shapes.draw("train", 5), shapes.draw("train", 5), shapes.draw("test", 5)
    np.testing.assert_array_equal(first[0], again[0])
    assert (first[0] != other[0]).any()
    assert first[0].shape == (64, 64, 3)
    assert set(np.unique(first[2])) == {0, 255}
    assert {shapes.draw("train", i)[1] for i in range(80)} == set(range(10))


def test_shapes_is_prepared_once_and_read_encoded(tmp_path, monkeypatch):
    from lmim_jax.data.synthetic import shapes

    monkeypatch.setattr(shapes, "SPLITS", {"train": 12, "test": 5})
    killed = tmp_path / "shapes" / "incomplete.ABCDEF_2.0.0"  # left by a process that was killed
    killed.mkdir(parents=True)
    train, test = (sources.open_shapes(tmp_path, split) for split in ("train", "test"))
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.array_record*")}
    assert (len(train), len(test), len(written)) == (12, 5, 2)
    assert {path.name for path in tmp_path.rglob("*") if path.is_dir()} == {"shapes", "2.0.0"}
    again = sources.open_shapes(tmp_path, "train")
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert [again.record(i) for i in range(12)] == [train.record(i) for i in range(12)]
    assert decode.decode(train.record(0)[0], 64, 3).shape == (64, 64, 3)
    assert {train.record(i)[1] for i in range(12)} <= set(range(10))
    assert test.name(3) == "shapes/2.0.0/test[3]"
    assert train.identity() == {"source": "shapes/2.0.0/train", "images": 12}
    assert decode.decode(test.mask(3), 64, 3).max() == 255


def test_batches_lie_on_all_devices(images):
    batch = next(iter(batches(images)))
    assert len(batch["image"].sharding.device_set) == len(jax.devices()) == 8
