"""State dicts of the authors' PyTorch code: the name and the memory layout of each array there.

A file of this folder describes one method, the module in methods/ with the same name, by a function
`describe(method) -> StateDictSpec`. Parameter trees of this project are {"params": ..., "target":
...}; paths into them are written "params/encoder/block00/attn/qkv/kernel".
"""

import collections
import dataclasses
import functools
import importlib
import pkgutil
import re
from collections.abc import Callable, Collection, Hashable, Mapping
from typing import Any, cast

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float

import lmim_jax.convert.official
from lmim_jax.methods.base import Method, Params
from lmim_jax.methods.common.targets import TargetMethod
from lmim_jax.utils.errors import UserError

TOLERANCE = 1e-5  # of constants such as positions, which every code computes for itself

Arrays = dict[str, np.ndarray]
Convert = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Conversions of one array between this project and the official code, inverse to each other.

    Attributes:
      to_official: converts an array of this project.
      to_ours: converts an official array.
    """

    to_official: Convert
    to_ours: Convert


def _identity(x: np.ndarray) -> np.ndarray:
    return x


SAME = Layout(_identity, _identity)
LINEAR = Layout(np.transpose, np.transpose)  # kernel [in, out] <-> weight [out, in]


def convolution(patch_size: int) -> Layout:
    """Layout of a patch embedding: kernel [p p C, D] <-> weight [D, C, p, p].

    The rows of the kernel are pixels in the order (row, column, channel).

    Args:
      patch_size: p.
    """

    def to_official(kernel: np.ndarray) -> np.ndarray:
        pixels = kernel.reshape(patch_size, patch_size, -1, kernel.shape[1])
        return pixels.transpose(3, 2, 0, 1)

    def to_ours(weight: np.ndarray) -> np.ndarray:
        return weight.transpose(2, 3, 1, 0).reshape(-1, weight.shape[0])

    return Layout(to_official, to_ours)


def with_cls(positions: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "1+N D"]:
    """Put the position of CLS, which is zero, in front of those of patches."""
    return np.pad(positions, ((1, 0), (0, 0)))


@dataclasses.dataclass(frozen=True)
class StateDictSpec:
    """How the state dict of a method's official code differs from `torch_name` and LINEAR.

    Attributes:
      renames: (regex, replacement) pairs, applied one after the other to a `torch_name`.
      layouts: (regex, Layout) pairs; the first regex that matches a whole path of ours counts.
      constants: {official name: array}, arrays of the state dict that are not parameters here.
      splits: (regex, replacements) pairs: an array whose official name would match is several
        arrays there, equal parts along the first axis, one for each replacement.
      relative_tolerance: of the constants, beside TOLERANCE.
      aliases: (regex, replacement) pairs for other names that files have, see `rename`.
      beside: (key, first part of names) pairs: further state dicts that a file of PyTorch holds
        beside the model.
      unused: regexes on whole names of arrays that files hold and the method does not need.
    """

    renames: tuple[tuple[str, str], ...]
    layouts: tuple[tuple[str, Layout], ...]
    constants: Arrays
    splits: tuple[tuple[str, tuple[str, ...]], ...] = ()
    relative_tolerance: float = 0.0
    aliases: tuple[tuple[str, str], ...] = ()
    beside: tuple[tuple[str, str], ...] = ()
    unused: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Entry:
    """One official array: one of ours, or a part of it.

    Attributes:
      path: where ours is in the tree.
      layout: its conversions.
      shape: of the official array.
      part: which part it is, counted from 0.
      parts: of ours, along the first axis of the official layout.
    """

    path: str
    layout: Layout
    shape: tuple[int, ...]
    part: int = 0
    parts: int = 1


def names() -> list[str]:
    """List the methods whose official state dicts are described here."""
    modules = pkgutil.iter_modules(lmim_jax.convert.official.__path__)
    return sorted(module.name for module in modules if module.name != "base")


def describe(method: Method) -> StateDictSpec:
    """Describe the official state dict of a method.

    Raises:
      UserError: it is not known, or the official code has no such variant of the method.
    """
    name = _method_name(method)
    if name not in names():
        raise UserError(
            f"the names in {name}'s official code are not known (known: {', '.join(names())})"
        )
    if getattr(method, "modalities", ()):
        raise UserError(
            f"{name}'s official code has no images of several modalities; give --format=flax, or "
            "--modalities=NAME and the format of another library"
        )
    if isinstance(method, TargetMethod):
        check_supported("target", method.target, ("ema", "random"))
        check_supported("target_layers", method.target_layers, ((),))
    module = importlib.import_module(f"lmim_jax.convert.official.{name}")
    return module.describe(method)


def check_supported(key: str, value: object, supported: Collection[object]) -> None:
    """Raise a UserError unless the official code has this value of an option of the method."""
    if value not in supported:
        raise UserError(
            f"config.method.{key}={value} is not in the official code, which has "
            f"{' | '.join(map(str, supported))}"
        )


def _method_name(method: Method) -> str:
    """Name of the module in methods/ that a method, or the class it is derived from, belongs to."""
    for ancestor in type(method).__mro__:
        package, _, name = ancestor.__module__.rpartition(".")
        if package == "lmim_jax.methods":
            return name
    raise TypeError(f"{type(method)} is not derived from a class of lmim_jax.methods")


def torch_name(path: str) -> str:
    """Translate one of our paths to PyTorch's conventions.

    Example: params/encoder/block00/norm1/scale -> encoder.blocks.0.norm1.weight.
    """
    name = path.removeprefix("params/").replace("/", ".")
    name = re.sub(r"\bblock(\d+)\.", _torch_block_name, name)
    return re.sub(r"\.(kernel|scale)$", ".weight", name)


def _torch_block_name(match: re.Match[str]) -> str:
    return f"blocks.{int(match[1])}."


def layout_of(path: str, layouts: Collection[tuple[str, Layout]] = ()) -> Layout:
    """Find the layout of an array.

    Args:
      path: one of our paths.
      layouts: (regex, Layout) pairs; the first regex that matches the whole path counts.

    Returns:
      If no regex matches, LINEAR for kernels and SAME for all other arrays.
    """
    for pattern, layout in layouts:
        if re.fullmatch(pattern, path):
            return layout
    if path.endswith("/kernel"):
        return LINEAR
    return SAME


def entries(method: Method) -> dict[str, Entry]:
    """List all parameters of a method and of its teacher as {official name: Entry}.

    Raises:
      UserError: see `describe`.
    """
    spec = describe(method)
    found = {}
    for path, leaf in _abstract_tree(cast(Hashable, method)).items():
        name = torch_name(path)
        for pattern, replacement in spec.renames:
            name = re.sub(pattern, replacement, name)
        layout = layout_of(path, spec.layouts)
        length, *others = layout.to_official(np.empty(leaf.shape, np.float32)).shape
        part_names = _part_names(name, spec.splits)
        parts = len(part_names)
        for part, part_name in enumerate(part_names):
            shape = (length // parts, *others)
            found[part_name] = Entry(path, layout, shape, part, parts)
    return found


@functools.cache
def _abstract_tree(method: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of all parameters of a method and of its teacher, by path."""
    params = jax.eval_shape(method.init, jax.random.key(0))
    return flatten_dict({"params": params, "target": method.target_of(params)}, sep="/")


def _part_names(name: str, splits: Collection[tuple[str, tuple[str, ...]]]) -> list[str]:
    """The official names of the parts of an array; its own if it is not split."""
    for pattern, replacements in splits:
        if re.search(pattern, name):
            return [re.sub(pattern, replacement, name) for replacement in replacements]
    return [name]


def rename(method: Method, arrays: Mapping[str, np.ndarray]) -> Arrays:
    """Give arrays their names in the official state dict, where a file has others.

    Raises:
      UserError: see `describe`.
    """
    aliases = describe(method).aliases
    renamed = {}
    for name, array in arrays.items():
        for pattern, replacement in aliases:
            name = re.sub(pattern, replacement, name)
        renamed[name] = array
    return renamed


def to_official(method: Method, params: Params, target: Params) -> Arrays:
    """Convert a whole model to the official state dict, constants included.

    Args:
      method: the method.
      params: as returned by `method.init`.
      target: as returned by `method.target_of`.

    Returns:
      {official name: contiguous array}.

    Raises:
      UserError: see `describe`.
    """
    ours = flatten_dict({"params": params, "target": target}, sep="/")
    arrays = {}
    for name, entry in entries(method).items():
        array = entry.layout.to_official(np.asarray(ours[entry.path]))
        arrays[name] = np.split(array, entry.parts)[entry.part]
    arrays |= describe(method).constants
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def from_official(method: Method, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Convert official arrays to our tree.

    Args:
      method: the method.
      arrays: {official name: array}; those without a counterpart are left out, see `check`.

    Returns:
      {"params": ..., "target": ...}, without what the arrays lack.

    Raises:
      UserError: see `describe`.
    """
    parts = collections.defaultdict(list)
    for name, entry in entries(method).items():
        if name in arrays:
            parts[entry.path].append((entry, arrays[name]))
    ours = {}
    for path, found in parts.items():
        entry = found[0][0]
        if len(found) == entry.parts:
            ours[path] = entry.layout.to_ours(np.concatenate([array for _, array in found]))
    return unflatten_dict(ours, sep="/")


def check(
    method: Method, arrays: Mapping[str, np.ndarray], missing_ok: Collection[str] = ()
) -> None:
    """Compare the names, shapes and constants of a state dict with what a method needs.

    Args:
      method: the method.
      arrays: {official name: array}.
      missing_ok: official names that may be missing.

    Raises:
      UserError: listing what is missing, unexpected or different.
    """
    spec = describe(method)
    constants = spec.constants
    shapes = {name: entry.shape for name, entry in entries(method).items()}
    for name, constant in constants.items():
        shapes[name] = constant.shape
    required = shapes.keys() - set(missing_ok)
    problems = {
        "missing": [name for name in shapes if name in required and name not in arrays],
        "unexpected": [name for name in arrays if name not in shapes],
        "of another shape": _different_shapes(shapes, arrays),
        "other constants than this method's": _different_constants(spec, arrays),
    }
    messages = []
    for problem, listed in problems.items():
        if listed:
            messages.append(f"{len(listed)} {problem}: {', '.join(listed)}")
    if messages:
        raise UserError("; ".join(messages))


def _different_shapes(
    shapes: Mapping[str, tuple[int, ...]], arrays: Mapping[str, np.ndarray]
) -> list[str]:
    """List the arrays that have another shape than expected."""
    different = []
    for name, shape in shapes.items():
        if name in arrays and arrays[name].shape != shape:
            different.append(f"{name} {tuple(arrays[name].shape)} instead of {shape}")
    return different


def _different_constants(spec: StateDictSpec, arrays: Mapping[str, np.ndarray]) -> list[str]:
    """List the constants that have the expected shape but other values."""
    different = []
    for name, constant in spec.constants.items():
        if name not in arrays or arrays[name].shape != constant.shape:
            continue
        difference = np.abs(arrays[name] - constant)
        allowed = TOLERANCE + spec.relative_tolerance * np.abs(constant)
        if not np.all(difference <= allowed):
            different.append(f"{name} (difference {difference.max():.2g})")
    return different
