"""Features of whole splits on disk, so that the next evaluator, or the next command, need not compute them.

A file is found by all that its features follow from: weights, method, images and how they are read, the feature, this
code and its libraries. Nothing else can be in it, so nothing in it is ever out of date.
"""

import hashlib
import io
import json
import logging
import pathlib
import zipfile

import jax
import numpy as np

from lmim_jax.distributed import multihost
from lmim_jax.utils import atomic_io

log = logging.getLogger(__name__)

SAMPLE = 64  # images whose bytes are looked at: sources know their images by name only


class FeatureCache:
    """Features in a folder, as .npz files with "x" [N, D] float32, "labels" [N] int32, and "key", JSON text.

    hits, misses: how many were asked for, and were or were not there.
    """

    def __init__(self, folder):
        self._folder, self._digests, self._images = pathlib.Path(folder), {}, {}
        self.hits = self.misses = 0

    def get(self, method, params, data, split, feature, compute):
        """Features (x, labels) of a split, read, or else computed by `compute()` and written, by process 0.

        Args:
          method, params, data, split, feature: see `evaluators.base.split_features`.
        """
        key = json.dumps(self._key(method, params, data, split, feature), sort_keys=True)
        path = self._folder / f"{split}-{hashlib.sha256(key.encode()).hexdigest()[:20]}.npz"
        found = _read(path, key)
        if all(
            multihost.gather_json(found is not None)
        ):  # the folder of process 0 need not be there on other hosts
            self.hits += 1
            log.info("%s of %s: from %s", feature, split, path)
            return found
        self.misses += 1
        x, labels = compute()
        if jax.process_index() == 0:
            _write(path, key, x, labels)
        return x, labels

    def _key(self, method, params, data, split, feature):
        """All that features follow from, as JSON knows it."""
        return {
            "weights": self._digest(params),
            "method": repr(method),
            "images": self._identity(data, split),
            "read": {name: data.config[name] for name in ("canvas", "channels")},
            "augment": repr(data.augment),
            "feature": feature,
            "version": multihost.versions(),
        }

    def _digest(self, params):
        """Checksum of weights: whatever they are called, they are these."""
        if id(params) not in self._digests:
            digest = hashlib.sha256()
            for path, leaf in jax.tree_util.tree_leaves_with_path(params):
                leaf = np.ascontiguousarray(jax.device_get(leaf))
                digest.update(
                    f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode()
                    + leaf.tobytes()
                )
            self._digests[id(params)] = (
                digest.hexdigest(),
                params,
            )  # which must live as long as its id is used
        return self._digests[id(params)][0]

    def _identity(self, data, split):
        """What tells these images and labels from others: their names, their classes, and the bytes of a few."""
        source = data.sources[split]
        if id(source) not in self._images:
            digest = hashlib.sha256("\n".join(data.classes).encode())
            for index in np.unique(np.linspace(0, len(source) - 1, SAMPLE).astype(int)):
                try:
                    record, label = source.record(index)
                except OSError:  # it will be named when it is read
                    record, label = b"", -1
                digest.update(hashlib.sha256(record).digest() + str(label).encode())
            self._images[id(source)] = {**source.identity(), "sample": digest.hexdigest()}, source
        return self._images[id(source)][0]


def _read(path, key):
    """(x, labels), or None where there is no such file, or a damaged one."""
    if not path.exists():
        return None
    try:
        with np.load(path) as stored:  # a zip archive: every member has a checksum
            known, x, labels = (stored[name] for name in ("key", "x", "labels"))
        if str(known) != key:
            raise ValueError("it holds something else")
        return x, labels
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        log.warning("%s is damaged (%s): computed again", path, error)
        return None


def _write(path, key, x, labels):
    """Write the file at once, or say why not."""
    stream = io.BytesIO()
    np.savez(stream, key=np.array(key), x=x, labels=labels)
    try:
        atomic_io.write(path, stream.getbuffer())
    except OSError as error:
        log.warning("features are not kept, %s cannot be written: %s", path, error)
