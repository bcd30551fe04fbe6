"""Files of named arrays: safetensors, npz, and what PyTorch pickles (.pth), of which only tensors are read."""

import pathlib
import re

import numpy as np

from lmim_jax.utils.errors import UserError

PICKLED = (".pth", ".pt", ".tar", ".bin")
FULL = ("model", "state_dict")  # under which training scripts keep the state dict


def read(path, roots=()):
    """Read a file of weights.

    Args:
      path: *.safetensors, *.npz, or PyTorch's *.pth, *.pt, *.pth.tar, *.bin.
      roots: what the first parts of names are, to tell a model from the training state beside it in a nested file.

    Returns:
      ({name: array}, names of what else the file holds). Arrays of fewer bits than 32 become float32; nested names are
      joined by dots, and the `module.` of parallel training is left out.

    Raises:
      UserError: no such file, another suffix, damage, or anything in it that is no array.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.suffix == ".npz":
        arrays, rest = _npz(path), []
    elif path.suffix == ".safetensors":
        arrays, rest = _safetensors(path), []
    elif path.suffix in PICKLED:
        arrays, rest = _pickled(path, roots)
    else:
        raise UserError(
            f"{path}: weights come as .safetensors, .npz, {', '.join(PICKLED)}, not as {path.suffix!r}"
        )
    short = lambda x: x.dtype.kind in "fV" and x.dtype.itemsize < 4
    return {
        _plain(name): x.astype(np.float32) if short(x) else x for name, x in arrays.items()
    }, rest


def write(path, arrays, metadata=None):
    """Write {name: array} as safetensors; metadata: {str: str}, which PyTorch's libraries want as {"format": "pt"}."""
    from safetensors.numpy import save_file

    save_file({name: np.ascontiguousarray(x) for name, x in arrays.items()}, path, metadata)
    pathlib.Path(path).chmod(0o644)  # the library lets nobody else read it


def _npz(path):
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except Exception as error:  # a zip file's damage shows in many ways
        raise UserError(f"{path} cannot be read: {error}") from error


def _safetensors(path):
    import ml_dtypes  # noqa: F401  (numpy's bfloat16, which safetensors asks for)
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _pickled(path, roots):
    torch = _torch(path)
    import argparse
    import pickle

    try:
        with torch.serialization.safe_globals(
            [argparse.Namespace]
        ):  # MAE keeps its command line in the file
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds other Python objects than tensors, which are not loaded, as that may run any code. "
            "If you trust it, save its tensors alone: torch.save(torch.load(FILE, weights_only=False)['model'], NEW)"
        ) from error
    except Exception as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    rest = []
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no state dict, but a {type(content).__name__}")
    if inner := next((key for key in FULL if isinstance(content.get(key), dict)), None):
        rest, content = [key for key in content if key != inner], content[inner]
    elif any(isinstance(value, dict) for value in content.values()):
        rest = [
            key for key, value in content.items() if key not in roots and not torch.is_tensor(value)
        ]
        content = {key: value for key, value in content.items() if key not in rest}
    arrays = {}
    for name, value in _flat(content):
        if not torch.is_tensor(value):
            rest.append(name)
        else:
            arrays[name] = (value.float() if value.is_floating_point() else value).numpy()
    return arrays, rest


def _torch(path):
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path} is a PyTorch file, and PyTorch is not installed: pip install 'torch>=2.6', or save its state dict "
            "as .safetensors where there is one"
        ) from error
    if tuple(int(x) for x in torch.__version__.split(".")[:2]) < (2, 6):
        raise UserError(
            f"torch {torch.__version__} is too old to open files of others; pip install 'torch>=2.6'"
        )
    return torch


def _flat(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _plain(name):
    return re.sub(r"(^|\.)module\.", r"\1", name)
