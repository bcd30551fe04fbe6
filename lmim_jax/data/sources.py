"""Where encoded images come from: random access by index, labels where there are any.

A source has `len`, `record(i) -> (bytes, class)` (-1: none), `mask(i) -> bytes or None`, `name(i) -> str`, `classes`, a
tuple of names (empty: unlabelled), `identity() -> dict`, and `ignored`, files that are no images. Sources can be
pickled: loader workers get a copy.
"""

import collections
import dataclasses
import difflib
import hashlib
import logging
import os
import pathlib

from lmim_jax.data import tfds_source
from lmim_jax.data.decode import SUFFIXES
from lmim_jax.utils.errors import UserError

log = logging.getLogger(__name__)


SOURCES = ("shapes", "folder", "tfds")


def from_config(config, split):
    """The source of a split of `config.data`.

    Args:
      config: `config.data`, see configs/vit_b.py. split: "train" or "test", whatever the dataset calls them.

    Returns:
      A source, or None for a test split that is not there.

    Raises:
      UserError: no such source, dataset, split or class; see the sources.
    """
    name = config[f"{split}_split"]
    classes = _names(config.classes)
    if config.source == "shapes":
        return shapes(config.path, split)
    if config.source == "folder":
        if split != "train" and not (
            name and pathlib.Path(config.path, name).expanduser().is_dir()
        ):
            return None
        return folder(config.path, name, config[f"{split}_per_class"], config.train_split, classes)
    if config.source == "tfds":
        source = tfds_source.open_tfds(config.name, config.dir, name) if name else None
        return tfds_source.only(source, classes) if source and classes else source
    near = difflib.get_close_matches(config.source, SOURCES, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UserError(f"config.data.source={config.source!r} is none of: {' | '.join(SOURCES)}{hint}")


def _names(path):
    """The lines of a file of class names; () for no file."""
    if not path:
        return ()
    try:
        names = tuple(pathlib.Path(path).expanduser().read_text().split())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config.data.classes={path!r} cannot be read ({error})") from error
    if not names or len(set(names)) < len(names):
        raise UserError(
            f"config.data.classes={path!r} must be a list of different class names, one a line"
        )
    return names


def shapes(path, split, kind=None):
    """The embedded dataset, in `path` or else the user's cache folder; or its config "several"."""
    from lmim_jax.data.synthetic import (
        shapes as dataset,  # TFDS is slow to import, and not needed for folders
    )

    return tfds_source.split_of(dataset.prepare(path or tfds_source.cache(), kind), split)


@dataclasses.dataclass(frozen=True)
class Folder:
    """Image files below a folder.

    root: the folder; files: paths relative to it; labels: one int per file; classes: their names;
    ignored: files with no image suffix, which count as bad.
    """

    root: str
    files: tuple[str, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]
    ignored: tuple[str, ...]

    def __len__(self):
        return len(self.files)

    def record(self, index):
        """(encoded bytes, class) of image `index`, -1 without classes; OSError where the file cannot be read."""
        return pathlib.Path(self.root, self.files[index]).read_bytes(), self.labels[index]

    def identity(self):
        """What tells these images from others, for config.json: their number and a checksum of their names."""
        names = hashlib.sha256("\n".join(self.files).encode("utf-8", "surrogateescape")).hexdigest()
        return {"source": "folder", "images": len(self), "names": names}

    def mask(self, index):
        """None: folders have no masks."""
        return None

    def name(self, index):
        """The full path of image `index`."""
        return str(pathlib.Path(self.root, self.files[index]))


def folder(path, split, max_per_class=0, train="train", only=()):
    """The images of a folder of any depth.

    With a sub-folder `train` (and others), a split is that sub-folder, and the folders in it are the classes.
    Without, all below `path` is the training set, unlabelled. Files are sorted by path; hidden ones are left out.

    Args:
      path: the folder. split: name of the split. max_per_class: keep the first so many images of a class; 0: all.
      train: name of the training split. only: names of the classes to keep, in order of their numbers; (): all.

    Returns:
      A Folder, or None for a split that is not there.

    Raises:
      UserError: the folder is missing or holds no images, or there is no such class.
    """
    root = pathlib.Path(path).expanduser()
    if not path or not root.is_dir():
        raise UserError(
            f"config.data.path={path!r} is no folder; give the folder that holds your images"
        )
    divided = (root / train).is_dir()
    if split != train and not (divided and (root / split).is_dir()):
        return None
    top = root / split if divided else root
    files, ignored = walk(top)
    if not files:
        raise UserError(
            f"{top}: no images in this folder (looked for {', '.join(SUFFIXES)}, at any depth)"
        )
    if ignored:
        log.warning("%s: %d files are no images: %s", top, len(ignored), _some(ignored))
    folders = [name.split("/")[0] if "/" in name else None for name in files]
    classes = _classes(root / train) if divided and None not in folders else ()
    if unknown := sorted(set(folders) - set(classes)) if classes else []:
        raise UserError(f"{top}: classes that are not in {root / train}: {_some(unknown)}")
    if unknown := sorted(set(only) - set(classes)):
        raise UserError(f"{top}: no folder for these of config.data.classes: {_some(unknown)}")
    number = {name: i for i, name in enumerate(only or classes)}
    seen, kept = collections.Counter(), []
    for name, of_class in zip(files, folders, strict=True):
        seen[of_class] += 1
        if not classes or (of_class in number and not 0 < max_per_class < seen[of_class]):
            kept.append((name, number.get(of_class, -1)))
    if not kept:
        raise UserError(f"{top}: no images of the classes in config.data.classes")
    files, labels = zip(*kept, strict=True)
    return Folder(str(top), files, labels, tuple(number), tuple(ignored))


def walk(top):
    """(image files, other files) below a folder, sorted relative paths with "/"."""
    files, ignored = [], []
    for parent, folders, names in os.walk(top, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith("."):
                relative = (pathlib.Path(parent) / name).relative_to(top).as_posix()
                (files if name.lower().endswith(SUFFIXES) else ignored).append(relative)
    return sorted(files), sorted(ignored)


def _classes(top):
    """Names of the class folders, sorted: those with at least one image below."""
    return tuple(sorted({name.split("/")[0] for name in walk(top)[0] if "/" in name}))


def _some(names):
    """The first few of a list, for a message."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
