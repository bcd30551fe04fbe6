"""The notebooks run from top to bottom, on small runs."""

import os
import pathlib

import nbformat
import pytest
from nbclient import NotebookClient

from lmim_jax.configs import quickstart
from lmim_jax.train import loop

NOTEBOOKS = pathlib.Path(__file__).parent.parent / "notebooks"
SMALL = {
    "data.source": "folder",
    "batch_size": 8,
    "micro_batches": 1,
    "method.depth": 1,
    "method.decoder_depth": 1,
    "gauge_images": 8,
}


def execute(name, parameters):
    """Execute a notebook with other values in its cell of parameters; its text output."""
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    names = {line.partition(" = ")[0] for line in cell.source.splitlines()}
    assert names == parameters.keys(), "parameters that the test does not know"
    cell.source = "\n".join(f"{key} = {value!r}" for key, value in parameters.items())
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    texts = []
    pictures = 0
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            texts.append(output.get("text", ""))
            pictures += "image/png" in output.get("data", {})
    return "".join(texts), pictures


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Kernels import this checkout and have one device: less to compile."""
    root = str(NOTEBOOKS.parent)
    monkeypatch.setenv("PYTHONPATH", root)
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    monkeypatch.setenv("XLA_FLAGS", flags)


@pytest.mark.slow
def test_features_and_pca(images, tmp_path):
    config = quickstart.get_config()
    config.update_from_flattened_dict({**SMALL, "data.path": str(images)})
    config.total_steps = 2
    config.evaluators = {}
    loop.train(config, tmp_path / "run")
    parameters = {"RUN": str(tmp_path / "run"), "NUM_TRAIN": 48, "NUM_TEST": 16}
    text, pictures = execute("features_and_pca.ipynb", parameters)
    assert "patches (6, 64, 96) mean (6, 96)" in text
    assert "raw pixels" in text
    assert pictures == 2


@pytest.mark.slow
def test_collapse(images, tmp_path):
    changes = {**SMALL, "data.path": str(images)}
    folder = str(tmp_path / "collapse")
    parameters = {"STEPS": 2, "LOG_EVERY": 1, "FOLDER": folder, "CHANGES": changes}
    text, pictures = execute("collapse.ipynb", parameters)
    assert text.count("collapse index") >= 3
    assert pictures == 1
    assert len(list((tmp_path / "collapse").iterdir())) == 3
