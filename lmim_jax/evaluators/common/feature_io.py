"""Features of images in one file, by name of the image: .npz, .safetensors or .parquet; see tools/features.py."""

import json
import pathlib

import numpy as np

from lmim_jax.utils import array_io
from lmim_jax.utils.errors import UserError


def writer(path):
    """The function that writes such a file: called with (names, grids [n, 2], {kind: list of an array per image}).

    Raises:
      UserError: another suffix, no such folder, or a package that is missing for it.
    """
    path = pathlib.Path(path).expanduser()
    if path.suffix not in WRITERS:
        raise UserError(f"--out={path}: the file must end in {', '.join(WRITERS)}")
    if not path.parent.is_dir():
        raise UserError(f"--out={path}: no folder {path.parent}")
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise UserError(
                f"--out={path} needs pyarrow: pip install pyarrow; or give .npz"
            ) from error

    def write(names, grids, features):
        draft = path.with_name(f"{path.name}.part")
        WRITERS[path.suffix](draft, names, grids, features)
        draft.replace(path)

    return write


def _joined(grids, features):
    """Arrays of all images: rows of patches one image after the other, with `first`, where each begins."""
    out = {"grid": grids}
    for name, values in features.items():
        out[name] = np.concatenate(values) if name == "patches" else np.stack(values)
    if "patches" in features:
        out["first"] = np.concatenate([[0], np.cumsum(grids.prod(axis=1, dtype=np.int64))])
    return out


def _npz(path, names, grids, features):
    with path.open("wb") as file:
        np.savez(file, name=np.array(names), **_joined(grids, features))


def _safetensors(path, names, grids, features):
    array_io.write(path, _joined(grids, features), {"name": json.dumps(names)})


def _parquet(path, names, grids, features):
    import pyarrow
    from pyarrow import parquet

    text = [name.encode("utf-8", "surrogateescape").decode("utf-8", "replace") for name in names]
    columns = {"name": pyarrow.array(text), "rows": grids[:, 0], "columns": grids[:, 1]}
    for name, values in features.items():
        columns[name] = pyarrow.array(
            [x.reshape(-1) for x in values], pyarrow.list_(pyarrow.float32())
        )
    parquet.write_table(pyarrow.table(columns), path)


WRITERS = {".npz": _npz, ".safetensors": _safetensors, ".parquet": _parquet}
