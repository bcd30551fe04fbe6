"""Encoders and images on which this project and PyTorch's libraries must agree.

    python -m pip install -r requirements-interop.txt
    PYTHONPATH=.:tests python tests/interop.py        # writes tests/interop.npz

The stored file contains, for every method and library, the tokens that the library computed and a
checksum of the exported tensors, and the versions of the libraries. So the default test suite
checks exported weights without those libraries.
"""

import hashlib
import io
import pathlib

import jax
import numpy as np
import tiny
from PIL import Image

from lmim_jax.convert import hf, timm, torch_encoder
from lmim_jax.methods import base

STORED = pathlib.Path(__file__).parent / "interop.npz"
WITHOUT_EQUAL = ("capi", "data2vec2")  # no other library has their encoders
METHODS = [name for name in base.names() if name not in WITHOUT_EQUAL]
LIBRARIES = {"timm": timm, "hf": hf}
AS_IN_TRAINING = dict(
    mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), interpolation="bicubic", resize=18
)


def case(name):
    """(method, params) of a tiny encoder; all weights are random, and the same on any machine."""
    section = tiny.method(name)
    section.depth = 2
    method = base.from_config(section, total_steps=1, steps_per_epoch=1)
    rng = np.random.default_rng(0)

    def draw(leaf):
        return (0.2 * rng.standard_normal(leaf.shape)).astype(np.float32)

    return method, jax.tree.map(draw, jax.eval_shape(method.init, jax.random.key(0)))


def images():
    """Normalized images [2, 16, 16, 3] for `case`, made by numpy alone."""
    return np.random.default_rng(1).standard_normal((2, 16, 16, 3)).astype(np.float32)


def jpeg(height, width, seed=0):
    """The bytes of a JPEG: discs on a gradient."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 255 / width, y * 255 / height, (x + y) % 256], axis=-1)
    for _ in range(6):
        row, column, radius = rng.integers((0, 0, 4), (height, width, max(height, width) // 3 + 5))
        pixels[(y - row) ** 2 + (x - column) ** 2 < radius**2] = rng.integers(0, 256, 3)
    out = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


def checksum(tensors):
    """SHA-256 of names, shapes and values."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(
            f"{name} {value.dtype} {value.shape}".encode() + np.ascontiguousarray(value).tobytes()
        )
    return digest.hexdigest()


def contents(library, name):
    """(tensors, texts) of the exported folder of a case."""
    return LIBRARIES[library].contents(torch_encoder.from_method(*case(name)), AS_IN_TRAINING)


def main():
    """Write STORED."""
    import json
    import tempfile

    import timm as timm_library
    import torch
    import transformers

    from lmim_jax.convert import parity_check
    from lmim_jax.utils import array_io

    found = {
        "versions": np.array(
            [f"{x.__name__} {x.__version__}" for x in (torch, timm_library, transformers)]
        )
    }
    for name in METHODS:
        for library in LIBRARIES:
            arrays, texts = contents(library, name)
            with tempfile.TemporaryDirectory() as folder:
                for file, content in texts.items():
                    pathlib.Path(folder, file).write_text(json.dumps(content))
                array_io.write(pathlib.Path(folder, "model.safetensors"), arrays, {"format": "pt"})
                foreign = parity_check.OPENERS[library](folder)
                channels_first = images().transpose(0, 3, 1, 2)
                found[f"{name}/{library}/tokens"] = foreign.encode(channels_first)
            found[f"{name}/{library}/checksum"] = np.array(checksum(arrays))
    np.savez_compressed(STORED, **found)
    print(STORED, *found["versions"])


if __name__ == "__main__":
    main()
