"""The memory that evaluations of large datasets take, in processes of their own."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parent / "large_datasets.py"

# Blocks and chunks as small as the features: 200 MB of features of 10 classes
SMALL = """
import sys
sys.path.insert(0, sys.argv[1])
import json, large_datasets
from lmim_jax.evaluators.common import classifiers, lbfgs_logistic
large_datasets.CLASSES = 10
classifiers.BANK_ROWS, classifiers.QUERIES, lbfgs_logistic.CHUNK = 4096, 64, 4096
found = [
    large_datasets.measure_evaluation(what, 400_000, 64, 128, 2) for what in ("knn", "regression")
]
print(json.dumps(found))
"""


def run(*arguments):
    """The JSON that a Python process prints."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_an_evaluation_takes_little_more_than_its_features():
    for found in run("-c", SMALL, str(SCRIPT.parent)):
        assert found["growth_gb"] < 0.5 * found["array_gb"], found


@pytest.mark.slow
@pytest.mark.parametrize("what", ["knn", "regression"])
def test_features_of_half_of_imagenet_take_at_most_a_third_more(what):
    found = run(str(SCRIPT), what, "--images=640000", "--queries=512", "--iterations=1")
    assert found["growth_gb"] < 0.3 * found["array_gb"], found
