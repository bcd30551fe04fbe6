"""Files of named arrays: safetensors, npz, and the tensors in PyTorch's pickled files (.pth)."""

import os
import pathlib
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Shaped

from lmim_jax.utils import buckets
from lmim_jax.utils.errors import UserError

Arrays = dict[str, Shaped[np.ndarray, "..."]]

PICKLED = (".pth", ".pt", ".tar", ".bin")
STATE_DICT_KEYS = ("model", "state_dict")  # under which training scripts save the state dict


def read(
    path: str | os.PathLike[str],
    roots: Collection[str] = (),
    beside: Collection[tuple[str, str]] = (),
) -> tuple[Arrays, list[str]]:
    """Read a file of weights.

    Args:
      path: *.safetensors, *.npz, or PyTorch's *.pth, *.pt, *.pth.tar, *.bin.
      roots: first parts of the names of weights, which distinguish a model from the training
        state beside it in a nested file.
      beside: (key, first part of names) pairs: state dicts of a nested file to be read with that
        of the model, if it has them.

    Returns:
      ({name: array}, names of what else the file holds). Floating-point arrays with fewer than 32
      bits become float32; nested names are joined by dots, and the `module.` of parallel training
      is removed.

    Raises:
      UserError: the file is missing, damaged, of another type, or holds objects that are not
        tensors.
    """
    path = buckets.local_path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    other: list[str] = []
    if path.suffix == ".npz":
        arrays = _read_npz(path)
    elif path.suffix == ".safetensors":
        arrays = _read_safetensors(path)
    elif path.suffix in PICKLED:
        arrays, other = _read_pickled(path, roots, beside)
    else:
        raise UserError(
            f"{path}: weights must be .safetensors, .npz, {', '.join(PICKLED)}, not {path.suffix!r}"
        )
    renamed = {}
    for name, array in arrays.items():
        renamed[_remove_module(name)] = _widen(array)
    return renamed, other


def write(
    path: str | os.PathLike[str], arrays: Arrays, metadata: dict[str, str] | None = None
) -> None:
    """Write arrays as safetensors.

    Args:
      path: of the file.
      arrays: by name.
      metadata: PyTorch's libraries require {"format": "pt"}.
    """
    from safetensors.numpy import save_file

    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    save_file(contiguous, path, metadata)
    pathlib.Path(path).chmod(0o644)  # the library makes it readable to the owner only


def write_torch(path: str | os.PathLike[str], arrays: Arrays) -> None:
    """Write arrays as a state dict in PyTorch's format; it needs the package torch.

    Args:
      path: of the file.
      arrays: by name.
    """
    import torch

    tensors = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    torch.save(tensors, path)


def _widen(array: np.ndarray) -> np.ndarray:
    """Convert float16, bfloat16 (kind V) and smaller floats to float32."""
    if array.dtype.kind in "fV" and array.dtype.itemsize < 4:
        return array.astype(np.float32)
    return array


def _remove_module(name: str) -> str:
    return re.sub(r"(^|\.)module\.", r"\1", name)


def _read_npz(path: pathlib.Path) -> Arrays:
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except Exception as error:  # a damaged zip file causes many kinds of errors
        raise UserError(f"{path} cannot be read: {error}") from error


def _read_safetensors(path: pathlib.Path) -> Arrays:
    import ml_dtypes  # noqa: F401  (registers numpy's bfloat16 for safetensors)
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _read_pickled(
    path: pathlib.Path, roots: Collection[str], beside: Collection[tuple[str, str]]
) -> tuple[Arrays, list[str]]:
    """Read the tensors of a PyTorch file: ({name: array}, names of everything else)."""
    torch = _import_torch(path)
    content = _load_pickled(path, torch)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no state dict, but a {type(content).__name__}")
    state_dict, other = _split_state_dict(content, roots, beside, torch)
    arrays = {}
    for name, value in _flatten(state_dict):
        if not torch.is_tensor(value):
            other.append(name)
            continue
        if value.is_floating_point():
            value = value.float()
        arrays[name] = value.numpy()
    return arrays, other


def _import_torch(path: pathlib.Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path} is a PyTorch file, and PyTorch is not installed: pip install 'torch>=2.6', or "
            "save its state dict as .safetensors where PyTorch is installed"
        ) from error
    major, minor = torch.__version__.split(".")[:2]
    if (int(major), int(minor)) < (2, 6):
        raise UserError(
            f"torch {torch.__version__} is too old to open files of others safely; "
            "pip install 'torch>=2.6'"
        )
    return torch


def _load_pickled(path: pathlib.Path, torch: Any) -> Any:
    """Load a PyTorch file without running code from it."""
    import argparse
    import pickle

    try:
        # MAE saves its command line, a Namespace, in the file.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds other Python objects than tensors, which are not loaded, as that may "
            "run any code. If you trust it, save its tensors alone: "
            "torch.save(torch.load(FILE, weights_only=False)['model'], NEW)"
        ) from error
    except Exception as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _split_state_dict(
    content: dict[str, Any],
    roots: Collection[str],
    beside: Collection[tuple[str, str]],
    torch: Any,
) -> tuple[dict[str, Any], list[str]]:
    """Separate the weights in a file from what is saved beside them: (weights, other keys)."""
    for key in STATE_DICT_KEYS:
        if isinstance(content.get(key), dict):
            read = {key}
            state_dict = dict(content[key])
            for further, root in beside:
                if isinstance(content.get(further), dict):
                    read.add(further)
                    state_dict[root] = content[further]
            return state_dict, [other for other in content if other not in read]
    if not any(isinstance(value, dict) for value in content.values()):
        return content, []
    weights = {}
    other = []
    for key, value in content.items():
        if key in roots or torch.is_tensor(value):
            weights[key] = value
        else:
            other.append(key)
    return weights, other


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
