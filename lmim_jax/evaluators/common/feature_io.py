"""Features of images in one file: .npz, .safetensors or .parquet; see cli/extract_features.py.

Letters: I images, P patches of all images, D width.
"""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float32, Int

from lmim_jax.utils import array_io, buckets
from lmim_jax.utils.errors import UserError

# By kind of feature, an array per image: [D], and for "patches" [patches of the image, D]
Features = dict[str, list[Float32[np.ndarray, "..."]]]
Grids = Int[np.ndarray, "I 2"]
Write = Callable[[list[str], Grids, Features], None]


def make_writer(path: buckets.Pathname) -> Write:
    """A function that writes a file of features.

    Args:
      path: the file; its suffix is a key of WRITERS.

    Returns:
      A function of the names of the images, their grids (rows and columns of patches), and their
      features, which writes the file atomically.

    Raises:
      UserError: unknown suffix, no such folder, or a missing package.
    """
    path = buckets.path(path)
    if path.suffix not in WRITERS:
        raise UserError(f"--out={path}: the file must end in {', '.join(WRITERS)}")
    if isinstance(path, pathlib.Path) and not path.parent.is_dir():
        raise UserError(f"--out={path}: no folder {path.parent}")
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise UserError(
                f"--out={path} needs pyarrow: pip install pyarrow; or write .npz"
            ) from error

    def write(names: list[str], grids: Grids, features: Features) -> None:
        with buckets.local_folder(path.parent) as folder:
            draft = folder / f"{path.name}.part"
            WRITERS[path.suffix](draft, names, grids, features)
            draft.replace(folder / path.name)

    return write


def _concatenate(grids: Grids, features: Features) -> dict[str, np.ndarray]:
    """Arrays of all images: "grid", a row per image, and the patches of one image after the other.

    "first" gives the row at which the patches of each image begin, and their total number.
    """
    arrays = {"grid": grids}
    for kind, values in features.items():
        if kind == "patches":
            arrays[kind] = np.concatenate(values)
        else:
            arrays[kind] = np.stack(values)
    if "patches" in features:
        ends = np.cumsum(grids.prod(axis=1, dtype=np.int64))
        arrays["first"] = np.concatenate([[0], ends])
    return arrays


def _write_npz(path: pathlib.Path, names: list[str], grids: Grids, features: Features) -> None:
    arrays: dict[str, Any] = _concatenate(grids, features)
    with path.open("wb") as file:
        np.savez(file, name=np.array(names), **arrays)


def _write_safetensors(
    path: pathlib.Path, names: list[str], grids: Grids, features: Features
) -> None:
    array_io.write(path, _concatenate(grids, features), {"name": json.dumps(names)})


def _write_parquet(path: pathlib.Path, names: list[str], grids: Grids, features: Features) -> None:
    import pyarrow
    from pyarrow import parquet

    text = [name.encode("utf-8", "surrogateescape").decode("utf-8", "replace") for name in names]
    columns = {"name": pyarrow.array(text), "rows": grids[:, 0], "columns": grids[:, 1]}
    number_list = pyarrow.list_(pyarrow.float32())
    for kind, values in features.items():
        rows = [value.reshape(-1) for value in values]
        columns[kind] = pyarrow.array(rows, number_list)
    parquet.write_table(pyarrow.table(columns), path)


WRITERS = {".npz": _write_npz, ".safetensors": _write_safetensors, ".parquet": _write_parquet}
