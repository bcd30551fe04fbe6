"""Where encoded images come from: random access by index, labels where there are any.

A source has `len`, `read(i) -> bytes`, `label(i) -> int` (-1: none), `mask(i) -> bytes or None`, `name(i) -> str`,
`classes`, a tuple of names (empty: unlabelled), `identity() -> dict`, and `ignored`, files that are no images. Sources
are picklable: loader workers get a copy.
"""

import dataclasses
import difflib
import hashlib
import logging
import os
import pathlib

from lmim_jax.data.decode import SUFFIXES
from lmim_jax.errors import UserError

log = logging.getLogger(__name__)


SOURCES = ("shapes", "folder")


def from_config(config, split):
    """The source of a split of `config.data`.

    Args:
      config: `config.data`: source, path, train_per_class, test_per_class. split: "train" or "test".

    Returns:
      A source, or None for a test split that is not there.
    """
    if config.source == "shapes":
        return shapes(config.path, split)
    if config.source == "folder":
        return folder(config.path, split, config[f"{split}_per_class"])
    near = difflib.get_close_matches(config.source, SOURCES, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UserError(f"config.data.source={config.source!r} is none of: {' | '.join(SOURCES)}{hint}")


@dataclasses.dataclass(frozen=True)
class Tfds:
    """A split of a prepared TFDS dataset in ArrayRecord files; images stay encoded, nothing imports TensorFlow."""

    records: object
    title: str
    classes: tuple[str, ...]
    ignored: tuple[str, ...] = ()

    def __len__(self):
        return len(self.records)

    def read(self, index):
        """The encoded bytes of image `index`."""
        return self.records[index]["image"]

    def label(self, index):
        """The class of image `index`."""
        return self.records[index]["label"]

    def identity(self):
        """What tells these images from others, for config.json."""
        return {"source": self.title, "images": len(self)}

    def mask(self, index):
        """The encoded object mask of image `index`, or None where the dataset has none."""
        return self.records[index].get("mask")

    def name(self, index):
        """Dataset, split and index."""
        return f"{self.title}[{index}]"


def shapes(path, split):
    """The embedded dataset, in `path` or else the user's cache folder."""
    import tensorflow_datasets as tfds  # slow to import, and not needed for folders

    from lmim_jax.data import shapes as dataset

    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lmim_jax"
    builder = dataset.prepare(path or cache)
    encoded = {"image": tfds.decode.SkipDecoding(), "mask": tfds.decode.SkipDecoding()}
    records = builder.as_data_source(split=split, decoders=encoded)
    return Tfds(records, f"{builder.info.full_name}/{split}", dataset.CLASSES)


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

    def read(self, index):
        """The encoded bytes of image `index`; OSError where the file cannot be read."""
        return pathlib.Path(self.root, self.files[index]).read_bytes()

    def label(self, index):
        """The class of image `index`, -1 without classes."""
        return self.labels[index]

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


def folder(path, split, max_per_class=0):
    """The images of a folder of any depth.

    With a sub-folder `train` (and `test`), a split is that sub-folder, and the folders in it are the classes.
    Without, all below `path` is the training set, unlabelled. Files are sorted by path; hidden ones are left out.

    Args:
      path: the folder. split: "train" or "test". max_per_class: keep the first so many images of a class; 0: all.

    Returns:
      A Folder, or None for a split that is not there.

    Raises:
      UserError: the folder is missing or holds no images.
    """
    root = pathlib.Path(path).expanduser()
    if not path or not root.is_dir():
        raise UserError(f"config.data.path={path!r} is no folder; give the folder that holds your images")
    divided = (root / "train").is_dir()
    if split != "train" and not (divided and (root / split).is_dir()):
        return None
    top = root / split if divided else root
    files, ignored = _walk(top)
    if not files:
        raise UserError(f"{top}: no images in this folder (looked for {', '.join(SUFFIXES)}, at any depth)")
    if ignored:
        log.warning("%s: %d files are no images: %s", top, len(ignored), _some(ignored))
    folders = [name.split("/")[0] if "/" in name else None for name in files]
    classes = _classes(root / "train") if divided and None not in folders else ()
    if unknown := sorted(set(folders) - set(classes)) if classes else []:
        raise UserError(f"{top}: classes that are not in {root / 'train'}: {_some(unknown)}")
    labels = [classes.index(name) if classes else -1 for name in folders]
    if max_per_class and classes:
        seen = dict.fromkeys(classes, 0)
        keep = []
        for i, name in enumerate(folders):
            seen[name] += 1
            keep += [i] if seen[name] <= max_per_class else []
        files, labels = [files[i] for i in keep], [labels[i] for i in keep]
    return Folder(str(top), tuple(files), tuple(labels), classes, tuple(ignored))


def _walk(top):
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
    return tuple(sorted({name.split("/")[0] for name in _walk(top)[0] if "/" in name}))


def _some(names):
    """The first few of a list, for a message."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
