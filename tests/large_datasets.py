"""What large datasets cost: listing a folder, and evaluating features of its images.

    python tests/large_datasets.py listing DIR
    python tests/large_datasets.py files DIR --images=1300000     # makes an empty file per image
    python tests/large_datasets.py knn --images=1281167 --queries=2048
    python tests/large_datasets.py regression --images=1281167 --queries=50000 --iterations=1

listing: CPU seconds and memory to open both splits of DIR, until the training could begin.
knn, regression: the evaluation of random features of 1,000 classes. `array` is the memory of the
training features, and `growth` what the evaluation takes on top of it. On CPUs, arrays on the
devices are in the same memory.
"""

import argparse
import json
import pathlib
import pickle
import resource
import sys
import time

import numpy as np
from ml_collections import ConfigDict

CLASSES = 1000
PER_CLASS = 1300  # training images of ImageNet
TEST_PER_CLASS = 50
FOLDERS = {"path": "", "classes": "", "train_split": "train", "test_split": "test"}
FOLDERS |= {"source": "folder", "train_per_class": 0, "test_per_class": 0}
FOLDERS |= {"held_out": 0.0, "labels": ""}


def peak_bytes() -> int:
    """The largest memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def cpu_seconds() -> float:
    """CPU time of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def make_files(folder: str, images: int) -> None:
    """Empty files in the layout of ImageNet."""
    for split, count in (("train", PER_CLASS), ("test", TEST_PER_CLASS)):
        for number in range(images // PER_CLASS):
            path = pathlib.Path(folder, split, f"n{number:08d}")
            path.mkdir(parents=True)
            for image in range(count):
                (path / f"n{number:08d}_{image:05d}.JPEG").touch()


def measure_listing(folder: str) -> dict[str, float]:
    """Open both splits of a folder."""
    from lmim_jax.data import sources

    before = peak_bytes()
    cpu = cpu_seconds()
    start = time.perf_counter()
    splits = sources.open_splits(ConfigDict({**FOLDERS, "path": folder}))
    opened = {"seconds": time.perf_counter() - start, "cpu_seconds": cpu_seconds() - cpu}
    images = sum(len(source) for source in splits.values())
    for source in splits.values():
        source.identity()  # reads all names: from here on, shared memory counts
    names = sum(len(name.encode()) for source in splits.values() for name in source.files)
    return {
        "images": images,
        **opened,
        "cpu_seconds_with_checksum": cpu_seconds() - cpu,
        "peak_bytes_an_image": (peak_bytes() - before) / images,
        "own_bytes_of_a_name": names / images,
        "bytes_sent_to_a_worker": len(pickle.dumps(splits)),
    }


def random_features(images: int, width: int, seed: int):
    """Features around a center for each class, made in place; see `Labeled`."""
    from lmim_jax.evaluators.common.image_features import Labeled
    from lmim_jax.utils import array_memory

    centers = np.random.default_rng(0).standard_normal((CLASSES, width), np.float32)
    rng = np.random.default_rng(seed)
    features = array_memory.empty((images, width), np.float32)
    labels = rng.integers(0, CLASSES, images).astype(np.int32)
    for start in range(0, images, 4096):
        rows = features[start : start + 4096]
        rng.standard_normal(dtype=np.float32, out=rows)
        rows += 0.3 * centers[labels[start : start + 4096]]
    return Labeled(features, labels)


def evaluate(what: str, train, test, iterations: int) -> dict[str, float]:
    """k-NN or logistic regression; the training features are overwritten."""
    from lmim_jax.distributed import sharding
    from lmim_jax.evaluators import knn
    from lmim_jax.evaluators.common import classifiers

    mesh = sharding.make_mesh()
    if what == "knn":
        return knn.accuracies(
            train, test, ks=(10, 20, 200), temperature=0.07, num_classes=CLASSES, mesh=mesh
        )
    found = classifiers.predict_by_regression(
        train.features,
        train.labels,
        test.features,
        num_classes=CLASSES,
        l2=(1e-3,),
        iterations=iterations,
        mesh=mesh,
        overwrite=True,
    )
    return {"accuracy": 100 * float(np.mean(found.classes == test.labels))}


def measure_evaluation(
    what: str, images: int, queries: int, width: int, iterations: int
) -> dict[str, float]:
    """Evaluate made-up features; memory is that of the whole process."""
    evaluate(what, random_features(500, width, 1), random_features(50, width, 2), 1)
    before = peak_bytes()
    train = random_features(images, width, 3)
    test = random_features(queries, width, 4)
    start = time.perf_counter()
    metrics = evaluate(what, train, test, iterations)
    array = train.features.nbytes
    return {
        "images": images,
        "queries": queries,
        "seconds": time.perf_counter() - start,
        "array_gb": array / 1e9,
        "growth_gb": (peak_bytes() - before - array) / 1e9,
        "peak_gb": peak_bytes() / 1e9,
        **metrics,
    }


def main():
    """Run a measurement: JSON on stdout."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("listing", "files", "knn", "regression"))
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--iterations", type=int, default=1)
    given = parser.parse_args()
    if given.what == "files":
        make_files(given.folder, given.images)
        return
    if given.what == "listing":
        found = measure_listing(given.folder)
    else:
        found = measure_evaluation(
            given.what, given.images, given.queries, given.width, given.iterations
        )
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
