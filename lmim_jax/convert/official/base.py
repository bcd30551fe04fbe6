"""State dicts of the authors' PyTorch code: what each of our arrays is called there, and how it lies in memory.

A file of this folder describes one method, the module in methods/ of that name: `describe(method) -> Official`.
Our trees are {"params": ..., "target": ...}; paths into them are written "params/encoder/block00/attn/qkv/kernel".
"""

import dataclasses
import importlib
import pkgutil
import re
from collections.abc import Callable

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from lmim_jax.utils.errors import UserError

TOLERANCE = 1e-5  # of constants such as positions, which every code computes for itself


@dataclasses.dataclass(frozen=True)
class Layout:
    """Two functions of numpy arrays, each the inverse of the other: our array to theirs, and theirs to ours."""

    theirs: Callable
    ours: Callable


SAME = Layout(lambda x: x, lambda x: x)
LINEAR = Layout(np.transpose, np.transpose)  # kernel [in, out] <-> weight [out, in]


def convolution(patch_size):
    """Kernel [p p C, D] of a patch embedding, pixels in order (row, column, channel) <-> weight [D, C, p, p]."""
    return Layout(
        lambda x: x.reshape(patch_size, patch_size, -1, x.shape[1]).transpose(3, 2, 0, 1),
        lambda x: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]),
    )


def with_cls(positions):
    """Positions [N, D] with that of CLS in front, which is zero: [1 + N, D]."""
    return np.pad(positions, ((1, 0), (0, 0)))


@dataclasses.dataclass(frozen=True)
class Official:
    """Where a method's official names and layouts differ from those of `torch_name` and LINEAR.

    renamed: (regex, replacement), applied one after the other. layouts: (regex on our path, Layout), first full match.
    fixed: {their name: array}, what their state dicts hold and is a constant here.
    """

    renamed: tuple[tuple[str, str], ...]
    layouts: tuple[tuple[str, Layout], ...]
    fixed: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One of our arrays: its path, the layouts, and its shape in theirs."""

    path: str
    layout: Layout
    shape: tuple[int, ...]


def names():
    """The methods whose official names are known."""
    import lmim_jax.convert.official as package

    return sorted(
        module.name for module in pkgutil.iter_modules(package.__path__) if module.name != "base"
    )


def describe(method):
    """The Official of a method.

    Raises:
      UserError: there is none, or the official code has no such variant.
    """
    modules = [kind.__module__ for kind in type(method).__mro__]
    name = next(name for name in modules if name.startswith("lmim_jax.methods.")).rpartition(".")[2]
    if name not in names():
        raise UserError(
            f"the names in {name}'s official code are not known here (of: {', '.join(names())})"
        )
    return importlib.import_module(f"lmim_jax.convert.official.{name}").describe(method)


def torch_name(path):
    """Our path as PyTorch names things: params/encoder/block00/norm1/scale -> encoder.blocks.0.norm1.weight."""
    name = path.removeprefix("params/").replace("/", ".")
    name = re.sub(r"\bblock(\d+)\.", lambda match: f"blocks.{int(match[1])}.", name)
    return re.sub(r"\.(kernel|scale)$", ".weight", name)


def layout_of(path, layouts=()):
    """The first Layout that fits, else LINEAR for kernels and SAME for all other arrays."""
    found = next((layout for pattern, layout in layouts if re.fullmatch(pattern, path)), None)
    return found or (LINEAR if path.endswith("/kernel") else SAME)


def entries(method):
    """{official name: Entry} of all that the method trains and tracks."""
    official = describe(method)
    params = jax.eval_shape(method.init, jax.random.key(0))
    tree = flatten_dict({"params": params, "target": method.target_of(params)}, sep="/")
    found = {}
    for path, leaf in tree.items():
        name, layout = torch_name(path), layout_of(path, official.layouts)
        for pattern, replacement in official.renamed:
            name = re.sub(pattern, replacement, name)
        found[name] = Entry(path, layout, layout.theirs(np.empty(leaf.shape, np.float32)).shape)
    return found


def to_official(method, params, target):
    """{official name: array} of a whole model, constants included."""
    ours = flatten_dict({"params": params, "target": target}, sep="/")
    theirs = {
        name: entry.layout.theirs(np.asarray(ours[entry.path]))
        for name, entry in entries(method).items()
    }
    return {
        name: np.ascontiguousarray(value)
        for name, value in (theirs | describe(method).fixed).items()
    }


def from_official(method, arrays):
    """Our tree of those arrays that have a counterpart in it: {"params": ..., "target": ...}, or less; see `check`."""
    known = entries(method)
    ours = {
        known[name].path: known[name].layout.ours(value)
        for name, value in arrays.items()
        if name in known
    }
    return unflatten_dict(ours, sep="/")


def check(method, arrays, missing_ok=lambda name: False):
    """Compare names and shapes of a state dict, and its constants, with what the method needs.

    Args:
      arrays: {official name: array}. missing_ok: of which names it is fine that the file lacks them.

    Raises:
      UserError: listing what is missing, unexpected or different.
    """
    known, fixed = entries(method), describe(method).fixed
    shapes = {name: entry.shape for name, entry in known.items()} | {
        name: x.shape for name, x in fixed.items()
    }
    problems = []
    for what, listed in (
        ("missing", [name for name in shapes if name not in arrays and not missing_ok(name)]),
        ("unexpected", [name for name in arrays if name not in shapes]),
        (
            "of another shape",
            [
                f"{name} {tuple(arrays[name].shape)} instead of {shape}"
                for name, shape in shapes.items()
                if name in arrays and arrays[name].shape != shape
            ],
        ),
        (
            "other constants than this method's",
            [
                f"{name} (difference {np.abs(arrays[name] - value).max():.2g})"
                for name, value in fixed.items()
                if name in arrays
                and arrays[name].shape == value.shape
                and not np.allclose(arrays[name], value, rtol=0, atol=TOLERANCE)
            ],
        ),
    ):
        if listed:
            problems.append(f"{len(listed)} {what}: {', '.join(listed)}")
    if problems:
        raise UserError("; ".join(problems))
