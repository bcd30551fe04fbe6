"""Label propagation, J and F, folders laid out as DAVIS, and the embedded clips."""

import annotated
import numpy as np
import pytest
from PIL import Image

from lmim_jax.data import tfds_source
from lmim_jax.data.eval import video_clips
from lmim_jax.data.synthetic import scenes, shapes
from lmim_jax.evaluators import video_segmentation
from lmim_jax.evaluators.common.davis_metrics import (
    contour_accuracy,
    contour_pixels,
    object_scores,
    region_similarity,
)
from lmim_jax.utils.errors import UserError

RNG = np.random.default_rng(0)


def square(top, left, size=6, side=3):
    mask = np.zeros((size, size), bool)
    mask[top : top + side, left : left + side] = True
    return mask


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two sequences of 5 frames of 16 x 32 and 16 x 16 pixels; levels give the object, 1 or 2."""
    root = tmp_path_factory.mktemp("davis")
    for name, width in (("wide", 32), ("small", 16)):
        for time in range(5):
            mask = np.zeros((16, width), int)
            mask[2:8, 2 * time : 2 * time + 6] = 1
            mask[10:14, width - 6 - 2 * time : width - 2 * time] = 2
            frame = root / "JPEGImages" / "480p" / name / f"{time:05d}.png"
            annotated.save(frame, mask, annotated.STEP)
            path = root / "Annotations" / "480p" / name / f"{time:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(mask.astype(np.uint8)).convert("P")
            image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
            image.save(path)
    (root / "ImageSets").mkdir()
    (root / "ImageSets" / "val.txt").write_text("wide\n")
    return root


def run(method=None, patch_size=1, **change):
    options = {"side": 16, "batch_size": 8, "radius": 6, "past": 2, **change}
    evaluator = annotated.evaluator("video_segmentation", **options)
    method = method or annotated.Sees()
    method.patch_size = patch_size
    return evaluator.run(method, {}, annotated.evaluation())


def test_region_and_contour_by_hand():
    """3 x 3 squares in 6 x 6 pixels, moved to the right by one and by two columns.

    The tolerance of 0.008 x the diagonal is up to 1 pixel.

        square     its contour: pixels that differ from the one to the right, below or below right
        . . . . . .    x x x x . .
        . s s s . .    x . . x . .     12 pixels
        . s s s . .    x . . x . .
        . s s s . .    x x x x . .
        . . . . . .    . . . . . .

    One column: 6 of 12 pixels in both. Each contour pixel lies beside one of the other.
    Two columns: 3 of 15 in both. The moved contour is cut by the border, which is not a contour:
    4 + 1 + 1 + 4 = 10 pixels. Of the first contour, rows 0 and 3 have 3 of 4 pixels near one of
    it, rows 1 and 2 have 1 of 2 (column 3): recall 8 / 12. Of its own pixels, rows 0 and 3 have 3
    of 4 near the first contour, rows 1 and 2 have 1 of 1: precision 8 / 10.
    F = 2 x 2/3 x 4/5 / (2/3 + 4/5) = 8 / 11.
    """
    first = square(1, 1)
    second = square(1, 2)
    third = square(1, 3)
    contour = [
        [1, 1, 1, 1, 0, 0],
        [1, 0, 0, 1, 0, 0],
        [1, 0, 0, 1, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [0] * 6,
        [0] * 6,
    ]
    assert (contour_pixels(first) * 1).tolist() == contour
    assert region_similarity(first, second) == 1 / 2
    assert contour_accuracy(first, second) == 1
    assert region_similarity(first, third) == 3 / 15
    assert contour_accuracy(first, third) == pytest.approx(8 / 11)


def test_empty_masks():
    empty = np.zeros((6, 6), bool)
    some = square(1, 1)
    for measure in (region_similarity, contour_accuracy):
        assert measure(empty, empty) == 1
        assert measure(some, empty) == 0
        assert measure(empty, some) == 0


def test_contours_equal_the_official_way():
    """A plain computation: official loops of shifted masks, and dilation by a disk."""
    from scipy import ndimage

    for _ in range(5):
        masks = [ndimage.gaussian_filter(RNG.normal(size=(90, 120)), 5) > 0.02 for _ in range(2)]
        edges = []
        for mask in masks:
            right = np.zeros_like(mask)
            right[:, :-1] = mask[:, 1:]
            below = np.zeros_like(mask)
            below[:-1] = mask[1:]
            diagonal = np.zeros_like(mask)
            diagonal[:-1, :-1] = mask[1:, 1:]
            edge = (mask ^ right) | (mask ^ below) | (mask ^ diagonal)
            edge[-1] = mask[-1] ^ right[-1]
            edge[:, -1] = mask[:, -1] ^ below[:, -1]
            edge[-1, -1] = 0
            edges.append(edge)
        y, x = np.mgrid[-2:3, -2:3]  # ceil(0.008 x 150) = 2
        wide = [ndimage.binary_dilation(edge, x * x + y * y <= 4) for edge in edges]
        precision = (edges[1] & wide[0]).sum() / edges[1].sum()
        recall = (edges[0] & wide[1]).sum() / edges[0].sum()
        expected = 2 * precision * recall / (precision + recall)
        assert contour_accuracy(masks[0], masks[1]) == pytest.approx(expected)


def test_first_and_last_frame_are_not_scored():
    truth = np.stack([square(1, 1) * 1] * 4)
    found = truth.copy()
    found[0] = found[-1] = 0
    assert object_scores(truth, found).tolist() == [[1, 1]]
    found[1] = 0
    assert object_scores(truth, found).tolist() == [[0.5, 0.5]]
    truth[2] = 2  # an object that the first frame does not show is not scored
    assert len(object_scores(truth, found)) == 1


def test_perfect_features_score_100_and_shuffled_ones_do_not(folder):
    found = run(path=str(folder))
    assert found["J"] == found["F"] == found["JF"] == pytest.approx(100)
    assert found["still_JF"] < 60
    shuffled = run(annotated.Sees(shuffled=True), path=str(folder), patch_size=1)
    assert shuffled["JF"] < 40
    assert run(path=str(folder), patch_size=2)["J"] > 80  # whole patches, but for enlarging


def test_padding_changes_no_metric(folder):
    assert run(path=str(folder), patch_size=4, batch_size=8) == run(
        path=str(folder), patch_size=4, batch_size=24
    )


def test_a_list_names_the_sequences(folder):
    assert [clip.name for clip in video_clips.open_folder(folder)] == ["small", "wide"]
    assert [clip.name for clip in video_clips.open_folder(folder, "ImageSets/val.txt")] == ["wide"]


def test_low_temperatures_follow_the_most_similar_patch():
    tokens = RNG.normal(size=(1, 12, 5)).astype(np.float32)
    tokens /= np.linalg.norm(tokens, axis=-1, keepdims=True)
    labels = RNG.uniform(size=(1, 12, 2)).astype(np.float32)
    propagate = video_segmentation.jit_propagate(
        grid=(3, 4), topk=3, radius=1, temperature=1e-3, context=1
    )
    found = propagate(tokens[0], tokens, labels, np.array([True]))
    np.testing.assert_allclose(found, labels[0], rtol=1e-3)


def test_propagation_equals_a_plain_computation():
    h, w = 3, 4
    frames = 3
    width = 5
    tokens = RNG.normal(size=(frames, h * w, width)).astype(np.float32)
    labels = RNG.uniform(size=(frames, h * w, 2)).astype(np.float32)
    frame = RNG.normal(size=(h * w, width)).astype(np.float32)
    valid = np.array([True, True, False])
    expected = np.zeros((h * w, 2))
    for n in range(h * w):
        weights = []
        for f in range(2):
            for m in range(h * w):
                if max(abs(n // w - m // w), abs(n % w - m % w)) <= 1:
                    weights.append((np.exp(frame[n] @ tokens[f, m] / 0.7), f, m))
        best = sorted(weights, reverse=True)[:3]
        total = sum(weight for weight, _, _ in best)
        expected[n] = sum(weight * labels[f, m] for weight, f, m in best) / total
    propagate = video_segmentation.jit_propagate(
        grid=(h, w), topk=3, radius=1, temperature=0.7, context=frames
    )
    found = propagate(frame, tokens, labels, valid)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_frames_are_resized_to_whole_patches():
    frames = np.zeros((1, 48, 85, 3), np.uint8)
    upright = frames.transpose(0, 2, 1, 3)
    square_frames = frames[:, :, :48]
    # As DINO resizes the 480 x 854 pixels of DAVIS
    assert video_segmentation.resize_frames(frames, 480, 64).shape == (1, 480, 832, 3)
    assert video_segmentation.resize_frames(upright, 480, 64).shape == (1, 832, 480, 3)
    assert video_segmentation.resize_frames(square_frames, 480, 64).shape == (1, 480, 480, 3)


def test_bad_input_is_named(folder, tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("no clip")
    for change, message in (
        ({"path": str(tmp_path / "none")}, "there is no .*JPEGImages.*a folder of clips contains"),
        ({"path": str(tmp_path / "text")}, "there is no .*JPEGImages.*a folder of clips contains"),
        ({"path": str(folder), "listed": "no.txt"}, "listed='no.txt' cannot be read"),
        (
            {"path": str(folder), "side": 30, "patch_size": 4},
            "side=30 is not a multiple of the patch size, 4",
        ),
        ({"path": str(folder), "feature": "cls"}, "feature='cls' has no vector per patch"),
    ):
        with pytest.raises(UserError, match=message):
            run(**change)
    data = annotated.evaluation(channels=4)  # the fourth one of frames would be opacity
    with pytest.raises(UserError, match="frames are gray or in colors, and this run has 4"):
        annotated.evaluator("video_segmentation", path=str(folder)).run(annotated.Sees(), {}, data)
    for kind, suffix in (("JPEGImages", "jpg"), ("Annotations", "png")):
        for time in range(3):
            annotated.save(
                tmp_path / kind / "480p" / "a" / f"{time}.{suffix}", np.zeros((32, 32), int)
            )
    with pytest.raises(UserError, match="clip a: the mask of its first frame shows no object"):
        run(path=str(tmp_path))
    (tmp_path / "Annotations" / "480p" / "a" / "1.png").unlink()
    with pytest.raises(UserError, match=r"1\.png is missing"):
        run(path=str(tmp_path))


def test_embedded_clips_are_drawn_once_and_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds_source, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(shapes, "CLIPS", {"test": 3})
    found = video_clips.embedded()
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.array_record*")}
    again = video_clips.embedded()
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert again == found
    assert len(found) == 3
    for clip in found:
        assert (len(clip), clip.frame(0, 3).shape) == (scenes.FRAMES, (64, 64, 3))
        first = clip.mask(0)
        last = clip.mask(len(clip) - 1)
        assert 1 <= first.max() <= 3
        assert (first != last).any()
    result = run(feature="pixels", side=64, patch_size=8, radius=3)
    assert all(0 <= value <= 100 for value in result.values())
