"""Classifiers that evaluations leave: files, predictions on other images; more test images."""

import csv
import dataclasses
import json
import logging
import shutil
import types

import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict
from test_evaluate import opened, saved  # noqa: F401  (a fixture)
from test_inventory import draw

from lmim_jax.cli import evaluate, predict
from lmim_jax.configs import vit_b
from lmim_jax.data import folder_listing, image_options
from lmim_jax.data.eval import extra_tests
from lmim_jax.data.eval.file_names import find_listed
from lmim_jax.data.sources import FolderSource, open_folder
from lmim_jax.data.tfds_source import TfdsSource
from lmim_jax.evaluators import base
from lmim_jax.evaluators.common import kept_classifier
from lmim_jax.evaluators.common.outcome import Answers, Outcome
from lmim_jax.report import classifier_section
from lmim_jax.train import saved_classifier
from lmim_jax.utils import buckets
from lmim_jax.utils.errors import UserError


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def kept(run_folder, name, out):
    """Evaluate a run by one evaluator that leaves its classifier in a folder; the metrics."""
    run, weights, data = opened(run_folder)
    sections = ConfigDict({name: tiny.evaluator(name)})
    base.fill_in(sections, {"weights": "online", "image": "patches_prenorm", "patches": "patches"})
    scheduled = base.from_config(sections, steps_per_epoch=1, has_target=True)
    origin = {"run": str(run_folder), "step": weights.step, "checkpoint": weights.checkpoint}
    origin["weights"] = "online"

    def keep(one, outcome):
        config = run.config.to_dict()
        kept_classifier.write(out, outcome, data.sources["test"], config, origin)

    steps = evaluate.measure(run, scheduled, data, {evaluate.TRAINED: weights}, keep=keep)
    *_, measured = steps
    return measured.metrics


@pytest.mark.parametrize(
    "name", ["logistic_regression", pytest.param("finetune", marks=pytest.mark.slow)]
)
def test_a_classifier_is_kept_and_answers_the_same(saved, images, tmp_path, name):  # noqa: F811
    folder = tmp_path / "evaluations" / name
    metrics = kept(saved[0], name, folder)
    accuracy = metrics.get("finetune/top1", metrics.get("logistic_regression/accuracy"))["trained"]
    answers = rows(folder / "predictions.csv")
    assert len(answers) == 16
    correct = [row["label"] == row["prediction"] for row in answers]
    assert 100 * np.mean(correct) == pytest.approx(accuracy)
    per_class = rows(folder / "per_class.csv")
    assert sum(int(row["correct"]) for row in per_class) == sum(correct)
    table = rows(folder / "confusion.csv")
    assert int(table[0]["cat"]) == int(per_class[0]["correct"])
    assert (folder / "confusion.png").stat().st_size > 1000
    classifier = saved_classifier.load(folder)
    source = open_folder(images, "test")
    found = predict.table(classifier, source, 16)
    assert found[0] == ["image", "prediction", "probability"]
    by_name = {row["image"]: row for row in answers}
    for image, predicted, probability in found[1:]:
        assert by_name[image]["prediction"] == predicted
        assert float(by_name[image]["probability"]) == pytest.approx(float(probability), abs=2e-3)
    section = classifier_section.section(folder.parent.parent).content
    assert f"{name}, step 3" in section
    assert "accuracy of each class" in section


def test_a_classifier_of_which_a_part_is_written_is_none(tmp_path, monkeypatch):
    (tmp_path / "classifier.json").write_text("of an earlier evaluation")

    def interrupt(path, arrays):
        raise KeyboardInterrupt

    monkeypatch.setattr(kept_classifier.array_io, "write", interrupt)
    outcome = types.SimpleNamespace(
        evaluator=Kept(k=7), kind="classes", names=(), statistics={}, weights={}
    )
    with pytest.raises(KeyboardInterrupt):
        kept_classifier.write(tmp_path, outcome, None, {}, {})
    assert not (tmp_path / "classifier.json").exists()


def test_predictions_skip_bad_images_and_are_a_csv_file(
    saved,  # noqa: F811
    images,
    tmp_path,
    monkeypatch,
    capsysbinary,
    caplog,
):
    folder = tmp_path / "head"
    kept(saved[0], "logistic_regression", folder)
    description = json.loads((folder / "classifier.json").read_text())
    description["names"][0] = "cat, Felis catus"
    (folder / "classifier.json").write_text(json.dumps(description))
    photos = tmp_path / "photos"
    shutil.copytree(images / "test", photos)
    (photos / "cat" / "broken.png").write_bytes(b"broken")
    out = tmp_path / "found.csv"
    given = {"out": str(out), "batch_size": 8}
    monkeypatch.setattr(
        predict, "flags", types.SimpleNamespace(FLAGS=types.SimpleNamespace(**given))
    )
    monkeypatch.setattr(predict, "log_to_console", lambda: None)
    predict.main([str(folder), str(photos)])
    assert len(rows(out)) == 16
    assert {row["prediction"] for row in rows(out)} <= {"cat, Felis catus", "dog"}
    assert "1 of 17 images cannot be read" in caplog.text
    printed = capsysbinary.readouterr().out.decode()
    for line in out.read_text().splitlines()[:5]:
        assert line in printed


def test_options_of_pixels_are_kept_with_a_classifier():
    config = vit_b.get_config()
    data = vit_b.data()
    data.update(canvas=64, range="0,4095", exif_orientation=True, transparency="white", path="x")
    found = image_options.as_read(config.to_dict(), data)
    assert found["data"]["range"] == "0,4095" and found["data"]["canvas"] == 64
    assert found["data"]["exif_orientation"] and found["data"]["transparency"] == "white"
    assert found["data"]["path"] == config.data.path


def test_a_head_needs_the_checkpoint_it_was_trained_on(saved, tmp_path):  # noqa: F811
    folder = tmp_path / "head"
    kept(saved[0], "logistic_regression", folder)
    description = json.loads((folder / "classifier.json").read_text())
    description["origin"]["step"] = 2
    (folder / "classifier.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match=r"features of step 2 of .* is gone"):
        saved_classifier.load(folder)
    with pytest.raises(UserError, match="not the folder of a classifier"):
        saved_classifier.load(tmp_path)


def test_a_classifier_in_a_bucket(bucket, images):
    """Files of an earlier evaluation go, and others stay."""
    pytest.importorskip("gcsfs", reason="buckets need gcsfs: pip install 'lmim_jax[gcs]'")
    truth = np.array([0, 1, 1])
    answers = Answers(np.arange(3), truth, truth[:, None], np.ones(3, np.float32))
    outcome = Outcome(Kept(7), "classes", ("cat", "dog"), answers, {"a/b": np.ones(2)}, {})
    source = open_folder(images, "test")
    folder = buckets.path("gs://bkt/run/evaluations/it")
    (folder / "per_label.csv").write_text("old")
    (folder / "mine.txt").write_text("kept")
    kept_classifier.write(folder, outcome, source, {"seed": 0}, {"step": 5})
    assert not (folder / "per_label.csv").exists()
    assert (folder / "mine.txt").read_text() == "kept"
    assert (folder / "confusion.csv").read_text() == "class,cat,dog\ncat,1,0\ndog,0,2\n"
    description = kept_classifier.read_description(folder)
    assert description["options"] == {"k": 7}
    assert kept_classifier.read_weights(folder)["a/b"].tolist() == [1, 1]
    section = classifier_section.section("gs://bkt/run").content
    assert "it, step 5" in section


@dataclasses.dataclass(frozen=True)
class Kept:
    """An evaluator, as far as its options are asked for."""

    k: int


def test_confusion_counts():
    found = kept_classifier.confusion(np.array([0, 0, 2]), np.array([1, 1, 2]), 3)
    assert found.tolist() == [[0, 2, 0], [0, 0, 0], [0, 0, 1]]


CLASSES = tuple(f"n{i:02d}" for i in range(12))


def test_imagenet_v2_counts_folders_as_numbers(tmp_path):
    for number in (0, 2, 10, 11):  # as text, 10 comes before 2
        draw(tmp_path / str(number) / "a.jpeg", number)
    found = extra_tests.open_v2(str(tmp_path), CLASSES)
    names = {found.source.files[i]: found.source.record(i)[1] for i in range(4)}
    assert names == {"0/a.jpeg": 0, "2/a.jpeg": 2, "10/a.jpeg": 10, "11/a.jpeg": 11}
    indices = np.arange(4)
    order = np.array([int(name.split("/")[0]) for name in found.source.files])
    assert found.accepted.accuracy(indices, order) == 100
    assert found.accepted.accuracy(indices, order + 1) == 0
    with pytest.raises(UserError, match=r"numbers up to 11, which count all classes .* have 3"):
        extra_tests.open_v2(str(tmp_path), CLASSES[:3])
    for name in ("n03", "n05"):
        draw(tmp_path / "named" / name / "a.png")
    named = extra_tests.open_v2(str(tmp_path / "named"), CLASSES).source
    assert [named.record(i)[1] for i in range(2)] == [3, 5]
    with pytest.raises(UserError, match=r"no classes of these images: n03, n05 \(2 of 2"):
        extra_tests.open_v2(str(tmp_path / "named"), ("a", "b"))


def test_real_accepts_any_of_its_labels(tmp_path):
    for number in (1, 2, 3, 4):
        draw(tmp_path / "test" / "x" / f"ILSVRC2012_val_{number:08d}.JPEG", number)
    names = folder_listing.list_folder(tmp_path / "test").images
    source = FolderSource(str(tmp_path / "test"), names, None, ())
    path = tmp_path / "real.json"
    path.write_text(json.dumps([[1, 2], [], [0], [11]]))
    found = extra_tests.open_real(str(path), source, CLASSES)
    assert found.source.indices == (0, 2, 3)
    indices = np.arange(3)
    assert found.accepted.accuracy(indices, np.array([2, 0, 11])) == 100
    assert found.accepted.accuracy(indices, np.array([0, 0, 10])) == pytest.approx(100 / 3)
    path.write_text(json.dumps([[1], [12]]))
    with pytest.raises(UserError, match=r"image 2 has the label 12, but .* 12 classes"):
        extra_tests.open_real(str(path), source, CLASSES)
    path.write_text(json.dumps([[1]]))
    with pytest.raises(UserError, match=r"00000002.JPEG is not one of .* 00000001"):
        extra_tests.open_real(str(path), source, CLASSES)


def test_more_test_images_are_measured(saved, images, tmp_path, caplog):  # noqa: F811
    """ImageNet-V2 by another name: the test images again, in numbered folders."""
    run, weights, data = opened(saved[0])
    for number, name in enumerate(("cat", "dog")):
        (tmp_path / str(number)).symlink_to(images / "test" / name)
    extra = extra_tests.open_v2(str(tmp_path), data.classes)
    data.sources["v2"] = extra.source
    data.accepted["v2"] = extra.accepted
    section = {**tiny.evaluator("knn"), "params": "online", "feature": "patches_prenorm"}
    (one,) = base.from_config({"knn": section}, steps_per_epoch=1, has_target=True)
    found, _ = one.run(run.method, weights, data)
    assert found["knn/nn1_v2"] == found["knn/nn1"]
    assert found["knn/knn5_v2"] == found["knn/knn5"]
    listed = tmp_path / "half.txt"
    listed.write_text("cat/00.png\ncat/02.png\ndog/00.png\nnone.JPEG\n")
    section = {**tiny.evaluator("fewshot"), "lists": (str(listed),), "shots": (), "percent": ()}
    section |= {"params": "online", "feature": "patches_prenorm"}
    (one,) = base.from_config({"fewshot": section}, steps_per_epoch=1, has_target=True)
    with caplog.at_level(logging.INFO, logger="lmim_jax"):
        found, _ = one.run(run.method, weights, data)
    assert found.keys() == {"fewshot/list_half", "fewshot/majority"}
    assert "half.txt: 1 of its names are not among the training images: none.JPEG" in caplog.text
    assert "half.txt: 3 labeled images" in caplog.text


def test_lists_name_files_or_their_last_parts(tmp_path):
    for name in ("a/1.png", "a/2.png", "b/2.png", "b/n_3.JPEG"):
        draw(tmp_path / "train" / name)
    source = open_folder(tmp_path, "train")
    path = tmp_path / "list.txt"
    path.write_text("n_3.JPEG\n\n1.png\nb/2.png\nx\n")
    found = find_listed(str(path), source)
    assert found.indices.tolist() == [0, 2, 3]
    assert found.missing == ("x",)
    path.write_text("1.png\n2.png\n")
    with pytest.raises(UserError, match=r"line 2: 2 images are called '2.png'"):
        find_listed(str(path), source)
    path.write_text("y\n")
    with pytest.raises(UserError, match=r"names none of the 4 images, such as 'a/1.png'; .* 'y'"):
        find_listed(str(path), source)
    records = TfdsSource((), "d/train", (), "image", None, None)
    with pytest.raises(UserError, match="do not store the names"):
        find_listed(str(path), records)
