"""Features of whole splits on disk, for the next evaluator or the next command.

A file is identified by everything that its features depend on: weights, method, images and how they
are read, the feature, this code and its libraries. So a file can never be out of date.
"""

import contextlib
import hashlib
import json
import logging
import pathlib
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

import jax
import numpy as np
from jaxtyping import Float

from lmim_jax.data.decode import BadImage
from lmim_jax.data.eval.eval_data import EvaluationData
from lmim_jax.data.folder_listing import ENCODING
from lmim_jax.data.image_options import ImageOptions
from lmim_jax.distributed import multihost
from lmim_jax.evaluators.base import EvaluatedMethod, Params, Scheduled
from lmim_jax.evaluators.common.image_features import Labeled
from lmim_jax.utils import array_memory, atomic_io, buckets

log = logging.getLogger(__name__)

READ_BYTES = 1 << 24  # of a file at a time
SAMPLE = 64  # images whose bytes are part of the identity; sources identify images by name only


class FeatureCache:
    """Features in a folder of .npz files.

    A file has "x", float32 [N, D], "labels" and "indices", int32 [N], and "key", JSON text.

    Attributes:
      hits: how many requested features were read from a file.
      misses: how many were computed.
    """

    def __init__(self, folder: buckets.Pathname) -> None:
        """Set the folder, which is created with the first file."""
        self.hits = 0
        self.misses = 0
        self._folder = buckets.path(folder)
        # By id; the objects are kept as well, as an id is only unique while its object exists
        self._weights: dict[Any, tuple[str, Params]] = {}
        self._identities: dict[int, tuple[dict[str, Any], Any]] = {}

    def get(
        self,
        method: EvaluatedMethod,
        params: Params,
        data: EvaluationData,
        split: str,
        feature: str,
        compute: Callable[[], Labeled],
    ) -> Labeled:
        """Features of a split: read from a file, or else computed and written by process 0.

        Args:
          method: see `image_features.split_features`, also for `params`, `data`, `split` and
            `feature`.
          compute: computes the features.
        """
        key = json.dumps(self._key(method, params, data, split, feature), sort_keys=True)
        path = self._folder / f"{split}-{hashlib.sha256(key.encode()).hexdigest()[:20]}.npz"
        found = _read(path, key)
        # Other hosts may not see the folder of process 0
        if all(multihost.gather_json(found is not None)) and found is not None:
            self.hits += 1
            self._log_hit(feature, split, path)
            return found
        self.misses += 1
        computed = compute()
        if jax.process_index() == 0:
            _write(path, key, computed)
        return computed

    def _log_hit(self, feature: str, split: str, path: buckets.Path) -> None:
        log.info("%s of %s: from %s", feature, split, path)

    def _key(
        self,
        method: EvaluatedMethod,
        params: Params,
        data: EvaluationData,
        split: str,
        feature: str,
    ) -> dict[str, Any]:
        """Everything that features depend on, as JSON values."""
        return {
            "weights": self._weights_identity(params),
            "method": repr(method),
            "images": self._identity(data, split),
            "read": {
                "canvas": data.config.canvas,
                "channels": data.config.channels,
                "options": repr(ImageOptions.from_config(data.config)),
            },
            "augment": repr(data.augment),
            "feature": feature,
            "version": multihost.versions(),
        }

    def _weights_identity(self, params: Params) -> str:
        """SHA-256 of all names and values of a parameter tree."""
        if id(params) not in self._weights:
            digest = hashlib.sha256()
            for path, leaf in jax.tree_util.tree_leaves_with_path(params):
                leaf = np.ascontiguousarray(jax.device_get(leaf))
                name = jax.tree_util.keystr(path)
                digest.update(f"{name} {leaf.dtype} {leaf.shape}".encode())
                digest.update(leaf.tobytes())
            self._weights[id(params)] = (digest.hexdigest(), params)
        return self._weights[id(params)][0]

    def _identity(self, data: EvaluationData, split: str) -> dict[str, Any]:
        """What distinguishes images and labels: names, classes, and the bytes of a sample."""
        source = data.sources[split]
        if id(source) not in self._identities:
            digest = hashlib.sha256("\n".join(data.classes).encode(*ENCODING))
            for index in np.unique(np.linspace(0, len(source) - 1, SAMPLE).astype(int)):
                try:
                    record, label = source.record(index)
                except (BadImage, OSError):  # reported when the image is read for its features
                    record = b""
                    label = -1
                digest.update(hashlib.sha256(record).digest())
                digest.update(str(label).encode())
            identity = {**source.identity(), "sample": digest.hexdigest()}
            self._identities[id(source)] = (identity, source)
        return self._identities[id(source)][0]


class _StepCache(FeatureCache):
    """Of the weights of one optimizer step, which may be divided over processes."""

    def _weights_identity(self, params: Params) -> str:
        """Which of the parameter trees so far has the same arrays: the same on all processes."""
        arrays = tuple(id(leaf) for leaf in jax.tree.leaves(params))
        return self._weights.setdefault(arrays, (f"tree {len(self._weights)}", params))[0]

    def _log_hit(self, feature: str, split: str, path: buckets.Path) -> None:
        log.debug("%s of %s: from %s", feature, split, path)  # which is about to be deleted


@contextlib.contextmanager
def compute_once(
    data: EvaluationData, due: Sequence[Scheduled], folder: buckets.Pathname
) -> Iterator[None]:
    """Within the context, evaluators of one optimizer step compute a feature once.

    In a bucket, each evaluator computes it anew.

    Args:
      data: whose `cache` is set, if several evaluators have the same feature.
      due: the evaluators.
      folder: of the features, which exists only as long as the context: what a process that was
        killed left in it is removed first.
    """
    wanted: list[tuple[str, str]] = []
    for one in due:
        evaluator: Any = one.evaluator
        if evaluator.supports_pixel_baselines and evaluator.takes == "image":
            wanted.append((one.weights, evaluator.feature))
    path = buckets.path(folder)
    if isinstance(path, buckets.BucketPath) or len(set(wanted)) == len(wanted):
        yield
        return
    if jax.process_index() == 0:
        buckets.remove_tree(path)
    data.cache = _StepCache(path)
    try:
        yield
    finally:
        data.cache = None
        if jax.process_index() == 0:
            buckets.remove_tree(path)


def _read(path: buckets.Path, key: str) -> Labeled | None:
    """The features of a file; None if it does not exist or is damaged."""
    if not path.is_file():
        return None
    try:
        # A zip archive: every member has a checksum
        with buckets.local_file(path) as file, np.load(file) as stored:
            if str(stored["key"]) != key:
                raise ValueError("it has another key")
            with stored.zip.open("x.npy") as file:
                features = _read_array(file)
            return Labeled(features, stored["labels"], stored["indices"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        log.warning("%s is damaged (%s): computed again", path, error)
        return None


def _read_array(file: IO[bytes]) -> Float[np.ndarray, "N D"]:
    """An array of a .npy file, in memory that JAX need not copy on CPUs."""
    np.lib.format.read_magic(file)
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    features = array_memory.empty(shape, dtype)
    flat = features.reshape(-1).view(np.uint8)
    place = 0
    while part := file.read(READ_BYTES):
        flat[place : place + len(part)] = np.frombuffer(part, np.uint8)
        place += len(part)
    if place != flat.size:
        raise ValueError(f"{place} bytes instead of {flat.size}")
    return features


def _write(path: buckets.Path, key: str, found: Labeled) -> None:
    """Write a file atomically, or log why it cannot be written."""
    if isinstance(path, pathlib.Path):
        atomic_io.remove_leftovers(path.parent)
    try:
        with atomic_io.open_new(path) as file:
            np.savez(
                file,
                key=np.array(key),
                x=found.features,
                labels=found.labels,
                indices=found.places,
            )
    except OSError as error:
        log.warning("features are not cached, %s cannot be written: %s", path, error)
