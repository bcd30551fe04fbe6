"""`lmim supervised-baseline`: an encoder that learns colors from labels, and the file it writes."""

import json
import types

import numpy as np
import pytest
import tiny
from PIL import Image

from lmim_jax.cli import supervised_baseline
from lmim_jax.utils.errors import UserError

EPOCHS = 6


def write_colors(root, labels=("red", "blue")):
    """Noisy red and blue images, 16 of each for training and 3 and 6 for testing."""
    rng = np.random.default_rng(0)
    for split, counts in {"train": (16, 16), "test": (3, 6)}.items():
        for label, channel, count in zip(labels, (0, 2), counts, strict=False):
            folder = root / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 100, (20, 20, 3), dtype=np.uint8)
                pixels[..., channel] += 150
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def config_of(root):
    config = tiny.get_config()
    config.data.update(source="folder", path=str(root))
    return config


def test_colors_are_learned_and_the_file_says_so(tmp_path, monkeypatch, caplog):
    out = tmp_path / "found" / "baseline.json"
    given = types.SimpleNamespace(
        config=config_of(write_colors(tmp_path / "images")),
        epochs=EPOCHS,
        learning_rate=1e-2,
        out=str(out),
    )
    monkeypatch.setattr(supervised_baseline, "flags", types.SimpleNamespace(FLAGS=given))
    monkeypatch.setattr(supervised_baseline.app, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(supervised_baseline, "log_to_console", lambda: caplog.set_level("INFO"))
    supervised_baseline.main([])
    record = json.loads(out.read_text())
    assert record["accuracy"] == 100
    assert record["frequent_class"] == pytest.approx(100 * 6 / 9)
    assert len(record["losses"]) == EPOCHS
    assert record["losses"][-1] < record["losses"][0]
    assert (record["epochs"], record["learning_rate"], record["seed"]) == (EPOCHS, 1e-2, 0)
    assert "100.0 % of the test images are classified correctly (66.7 %" in caplog.text


def test_one_class_is_an_error(tmp_path):
    root = write_colors(tmp_path / "images", labels=("red",))
    with pytest.raises(UserError, match="nothing can be measured"):
        supervised_baseline.train(config_of(root), epochs=1, learning_rate=1e-3)
