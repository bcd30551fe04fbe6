"""Every test runs on 8 fake CPU devices, and silent rank promotion is an error.

LMIM_TEST_PLATFORM=cuda (or tpu): on the devices of this machine instead, with float32 products at
highest precision, for which the tolerances are meant. Tests that need 8 devices fail on fewer.
"""

import atexit
import os
import pathlib
import shutil
import signal
import sys
import tempfile

ROOT = pathlib.Path(__file__).parent.parent
PLATFORM = os.environ.get("LMIM_TEST_PLATFORM", "cpu")
# Most programs run once or twice: compile them quickly, and each only once over all processes.
FAST = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_cpu_use_fusion_emitters=false"
)
if PLATFORM == "cpu":
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {FAST}"
    )
else:
    os.environ["JAX_PLATFORMS"] = f"{PLATFORM},cpu"
    os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # for several workers
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # else a worker, or a process that a test started
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="lmim_jax_programs_")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
sys.path[:0] = [str(ROOT)]
# Shells ignore it in background jobs, and so would the processes that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from PIL import Image  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder of 48 training and 16 test images, two classes, 20 to 40 pixels, JPEG and PNG."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 8)):
        for label, name in enumerate(("cat", "dog")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                height, width = rng.integers(20, 41, 2)
                noise = rng.integers(0, 120, (height, width, 3)) + np.array(
                    [100 * label, 60, 100 * (1 - label)]
                )
                Image.fromarray(noise.astype(np.uint8)).save(
                    folder / f"{i:02d}.{'jpg' if i % 2 else 'png'}"
                )
    return root


def pytest_addoption(parser):
    parser.addoption(
        "--faults", action="store_true", help="the whole fault suite, and nothing else (40 minutes)"
    )
    parser.addoption(
        "--interop",
        action="store_true",
        help="comparisons with timm and transformers, and nothing else",
    )
    parser.addoption("--slow", action="store_true", help="also the tests marked as slow")


def pytest_collection_modifyitems(config, items):
    interop = [item for item in items if item.get_closest_marker("interop")]
    if config.getoption("--faults"):
        wanted = [item for item in items if "faults" in item.path.parts]
    elif config.getoption("--interop"):
        wanted = interop
    else:
        wanted = [item for item in items if item not in interop]
        if not config.getoption("--slow"):
            wanted = [item for item in wanted if not item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=[item for item in items if item not in wanted])
    items[:] = wanted


@pytest.fixture
def bucket():
    """An emulator of Google Cloud Storage with the bucket `bkt`."""
    pytest.importorskip("gcsfs", reason="buckets need gcsfs: pip install 'lmim_jax[gcs]'")
    import gcs_emulator

    with gcs_emulator.Emulator("bkt") as emulator:
        yield emulator


@pytest.fixture(scope="session")
def full(request):
    """Whether the whole fault suite was asked for."""
    return request.config.getoption("--faults")
