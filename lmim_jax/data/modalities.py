"""`config.data.modalities`: what methods need to know of it, and the choice of some modalities.

An image of several modalities has the channels of all of them side by side, in the order of the
config. Recipes derive `data.channels`, `augment.mean` and `augment.std` from the modalities.
"""

import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from lmim_jax.data import sources
from lmim_jax.utils.errors import UserError, did_you_mean

TRAINING_IMAGES = "training_images"  # of the config of a run, see train/workdir.py
Entry = tuple[str, int, int]  # name, channels, patch size


def entries(config: ConfigDict) -> tuple[Entry, ...]:
    """What methods take as `modalities`, of `config.data`; (): one, without a name."""
    found = []
    for name, options in config.modalities.items():
        found.append((name, options.channels, options.patch_size))
    return tuple(found)


def method_options(config: ConfigDict) -> dict[str, Any]:
    """`config.method` of a recipe with the modalities of its images, for `methods.from_config`.

    Raises:
      UserError: options that follow from the modalities were set to something else.
    """
    modalities = config.data.modalities
    if modalities:
        _check_sums(config)
    return {**config.method, "modalities": entries(config.data)}


def _check_sums(config: ConfigDict) -> None:
    """Raise a UserError unless channels, mean and std are those of all modalities together."""
    modalities = config.data.modalities
    for name, options in modalities.items():
        for key in ("mean", "std"):
            if len(options[key]) != options.channels:
                raise UserError(
                    f"config.data.modalities.{name}.{key}={tuple(options[key])} must have "
                    f"{options.channels} numbers, one for each of its channels; lmim prepare "
                    "FOLDER --modalities=... --statistics measures them"
                )
    channels = sum(options.channels for options in modalities.values())
    if config.data.channels != channels:
        raise UserError(
            f"config.data.channels={config.data.channels} must be {channels}, the sum of those of "
            f"config.data.modalities ({', '.join(modalities)}): set those alone"
        )
    for key in ("mean", "std"):
        joined = sum((tuple(options[key]) for options in modalities.values()), ())
        if tuple(config.augment[key]) != joined:
            raise UserError(
                f"config.augment.{key}={tuple(config.augment[key])} must be {joined}, those of "
                "config.data.modalities: set those alone"
            )


def restrict(config: ConfigDict, names: Sequence[str]) -> ConfigDict:
    """The config of a run for images of some of its modalities.

    A single one that is left in a folder becomes an ordinary folder of images.

    Args:
      config: of the run.
      names: of modalities.

    Raises:
      UserError: the run has no such modalities.
    """
    known = list(config.data.modalities)
    if not known:
        raise UserError("--modalities: this run was trained on images of one modality")
    for name in names:
        if name not in known:
            raise UserError(
                f"--modalities: this run has no modality {name!r}{did_you_mean(name, known)}"
            )
    if not names:
        raise UserError(f"--modalities: give at least one of: {', '.join(known)}")
    chosen = ConfigDict(config.to_dict())
    kept = {name: chosen.data.modalities[name] for name in known if name in names}
    chosen.data.modalities = ConfigDict(kept)
    chosen.data.channels = sum(options.channels for options in kept.values())
    for key in ("mean", "std"):
        chosen.augment[key] = sum((tuple(options[key]) for options in kept.values()), ())
    parts = entries(chosen.data) if len(kept) > 1 else ()
    method = chosen.method
    while method:  # a frozen teacher takes the same images, and so does the one it had itself
        method.channels = chosen.data.channels
        method.modalities = parts
        method = method.get("frozen")
    if len(kept) == 1:
        (options,) = kept.values()
        if sources.kind(config.data) == "folder":
            chosen.data.path = str(pathlib.Path(chosen.data.path, options.path))
            chosen.data.range = options.range
            chosen.data.modalities = ConfigDict()
    if TRAINING_IMAGES in chosen:  # where weights were imported, images may not be known
        dropped = set(known) - set(kept)
        chosen[TRAINING_IMAGES] = _identity(chosen[TRAINING_IMAGES], dropped, kept)
    return chosen


def _identity(
    images: ConfigDict, dropped: Collection[str], kept: Mapping[str, ConfigDict]
) -> ConfigDict:
    """What identifies images without some of their modalities: the `identity` of their source."""
    found = {key: value for key, value in images.items() if key not in dropped}
    if "modalities" in found:  # a prepared dataset
        found["modalities"] = ",".join(options.path for options in kept.values())
    elif len(kept) == 1:  # an ordinary folder
        (name,) = kept
        found["names"] = found.pop(name)
        found["source"] = "folder"
    return ConfigDict(found)
