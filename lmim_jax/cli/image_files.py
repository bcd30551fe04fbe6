"""The images that a user names on the command line: a folder, a file, or pairs of a run."""

import pathlib
from collections.abc import Mapping

from ml_collections import ConfigDict

from lmim_jax.data import folder_listing, inventory, paired_source
from lmim_jax.data.folder_source import FolderSource
from lmim_jax.data.paired_source import PairedSource
from lmim_jax.utils import buckets
from lmim_jax.utils.errors import UserError


def open_images(
    path: str | pathlib.Path, data: ConfigDict
) -> tuple[FolderSource | PairedSource, list[str]]:
    """Open the images in a folder at any depth, or one image.

    Args:
      path: of the folder or the image. For a run on several modalities, of a folder that holds a
        folder for each of them, with the names of `data.modalities.NAME.path`.
      data: `config.data` of the run.

    Returns:
      (the images, without labels, lines on what was found).

    Raises:
      UserError: there are no images, or no folder for a modality.
    """
    path = buckets.local_path(path)
    if data.modalities:
        return _open_pairs(path, _folder_names(data.modalities))
    if path.is_file():
        return _unlabeled(path.parent, folder_listing.share_names([path.name])), []
    return _open_folder(path)


def _open_pairs(path: pathlib.Path, names: Mapping[str, str]) -> tuple[PairedSource, list[str]]:
    missing = [name for name in names.values() if not (path / name).is_dir()]
    if missing:
        raise UserError(
            f"{path}: there is no folder {missing[0]} in it; the run has images of several "
            f"modalities, which are read from {', '.join(f'{name}/' for name in names.values())} "
            f"there; --modalities={next(iter(names))} is for images of one"
        )
    folders = paired_source.folders_of(str(path), names)
    first, lines = _open_folder(next(iter(folders.values())))
    pairs = paired_source.pair(first, folders, {})
    return pairs, [*lines, *paired_source.describe_missing(pairs)]


def _folder_names(modalities: ConfigDict) -> dict[str, str]:
    """{modality: its folder}: that of training, or its own name if training had a full path."""
    names = {}
    for name, options in modalities.items():
        is_name = options.path and not pathlib.Path(options.path).expanduser().is_absolute()
        names[name] = options.path if is_name else name
    return names


def _open_folder(path: pathlib.Path) -> tuple[FolderSource, list[str]]:
    """The images in a folder, and lines on what was found."""
    if not path.is_dir():
        raise UserError(f"{path}: no such folder")
    found = folder_listing.list_folder(path)
    if not found.images:
        raise UserError(f"{path}: no images in this folder, only {len(found.others)} other files")

    def read(name: str) -> bytes:
        return (path / name).read_bytes()

    return _unlabeled(path, found.images), inventory.describe_folder(found, read)


def _unlabeled(root: pathlib.Path, files: folder_listing.Names) -> FolderSource:
    return FolderSource(str(root), files, None, ())
