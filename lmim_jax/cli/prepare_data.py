"""Prepares datasets that are read at full speed, without TensorFlow.

    lmim prepare SOURCE --out=DIR --name=NAME [--shrink=512] [--processes=8]
    lmim prepare 'shards/train-{0000..0127}.tar' --label=json.category --out=DIR --name=NAME
    lmim prepare --tfrecord=DIR/NAME/VERSION [--processes=8]
    lmim prepare --verify=DIR/NAME/VERSION
    lmim prepare SOURCE --statistics [--channels=13] [--range=auto]
    lmim prepare FOLDER --modalities=rgb,thermal=infrared --out=DIR --name=NAME

SOURCE: a folder of images, WebDataset shards (.tar, .tar.gz), Hugging Face parquet files, a zip
file, or a list of images (.csv, .txt); a folder of shards or parquet files, or several of them. It
becomes a TFDS dataset of the same images in the same order, unchanged or with the short side
shrunk. --tfrecord: ArrayRecord files beside the TFRecord files of a prepared dataset. An
interrupted conversion is resumed by the same command and writes the same bytes. --verify: counts
records, decodes a sample and compares checksums; exit code 1 if something is wrong. --statistics:
only prints the options of a run on these images: the range of pixel values of other than 8 bits,
and mean and std of each channel. --modalities: FOLDER holds a folder for each modality of the same
scenes; files of the same name belong together, and an example has all of them.
"""

import functools
import json
import logging
import multiprocessing
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any

import numpy as np
import tqdm
from absl import flags

from lmim_jax.configs import vit_b
from lmim_jax.data import (
    decode,
    inventory,
    paired_source,
    pixel_range,
    records,
    samples,
    sources,
    tfds_source,
)
from lmim_jax.data.image_options import MAX_PIXELS, ImageOptions
from lmim_jax.data.prepare import inputs, packed, tfds_writer, tfrecord
from lmim_jax.utils import atomic_io, buckets, commands, subprocess
from lmim_jax.utils.errors import UserError

log = logging.getLogger(__name__)

RECIPES: dict[str, str | None] = {}
FLAGS_OF_OPTIONS = {"data.path": "--folder", "data.max_pixels": "--max_pixels"}
VERSION = "1.0.0"
CLAIM = "prepare.json"  # in the folder of a dataset: what is being written there
STATISTICS = 1024  # images that mean and std are measured on
LEAST_STD = 1e-3  # of a constant channel
GRAY_MODES = ("L", "LA", "1", "I;16", "I", "F")  # of Pillow
SPLITS = ("train", "test", "val", "validation")
SHARD_MB = tfds_writer.SHARD_BYTES >> 20  # a shard, by default
REPORT_SECONDS = 10.0  # between two states of the progress bar in a log


def _run_in_parallel(
    task: Callable[[Any], Any], items: Sequence[Any], sizes: Sequence[int], count: int, unit: str
) -> Iterator[Any]:
    """Yield results of task(item) in the order in which they are finished, with a progress bar.

    Args:
      task: a function that can be pickled.
      items: its arguments.
      sizes: how far the progress bar moves for each item.
      count: of processes.
      unit: of the sizes.
    """
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    pool = futures.ProcessPoolExecutor(
        count, mp_context=context, initializer=_start_process, initargs=(counter,)
    )
    interval = 1.0 if sys.stderr.isatty() else REPORT_SECONDS
    bar = tqdm.tqdm(total=sum(sizes), unit=unit, unit_scale=True, mininterval=interval)
    with pool, bar:
        size_of = {}
        for item, size in zip(items, sizes, strict=True):
            size_of[pool.submit(task, item)] = size
        try:
            waiting = set(size_of)
            finished = 0
            while waiting:
                done, waiting = futures.wait(waiting, interval, futures.FIRST_COMPLETED)
                for future in done:
                    yield future.result()
                    finished += size_of[future]
                bar.update(max(finished, counter.value) - bar.n)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _start_process(counter: Any) -> None:
    """In a process of a pool."""
    subprocess.exit_with_parent()
    tfds_writer.count_images_in(counter)


def _look_through(count: int, task: Callable[[str], Any], files: Sequence[str]) -> Iterable[Any]:
    """task(file) of files, in order, by `count` processes, with a progress bar."""
    interval = 1.0 if sys.stderr.isatty() else REPORT_SECONDS
    if min(count, len(files)) < 2:
        yield from tqdm.tqdm(map(task, files), "index", len(files), unit=" files", disable=None)
        return
    context = multiprocessing.get_context("spawn")
    with futures.ProcessPoolExecutor(
        count, mp_context=context, initializer=subprocess.exit_with_parent
    ) as pool:
        found = pool.map(task, files)
        try:
            yield from tqdm.tqdm(
                found, "index", len(files), unit=" files", disable=None, mininterval=interval
            )
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def convert(
    found: Mapping[str, tfds_writer.Images],
    out: str | pathlib.Path,
    name: str,
    shrink: int,
    count: int,
    shard_mb: int = SHARD_MB,
    max_pixels: int = MAX_PIXELS,
) -> pathlib.Path:
    """Make the dataset OUT/NAME/1.0.0 of images.

    Args:
      found: {split: images}, with "train".
      out: where to make the dataset.
      name: of the dataset.
      shrink: images whose short side has more pixels than this are shrunk to it (JPEG, quality
        90); 0: files are copied unchanged.
      count: of processes.
      shard_mb: a file of the dataset has at most so many MiB, by estimate.
      max_pixels: images of more are left out.

    Returns:
      The folder of the dataset.

    Raises:
      UserError: the folder of the dataset holds another one, or its disk has too little space.
    """
    if not name.isidentifier():
        raise UserError(f"--name={name!r} must be letters, digits and underscores")
    target = pathlib.Path(out).expanduser() / name / VERSION
    identities = {split: source.identity() for split, source in found.items()}
    plan = {"shrink": shrink, "images": identities}
    if shard_mb != SHARD_MB:
        plan["shard_mb"] = shard_mb
    if max_pixels != MAX_PIXELS:
        plan["max_pixels"] = max_pixels
    _check_claim(target, plan)
    if (target / tfds_writer.MANIFEST).exists():
        log.warning(
            "%s was made before, and stays as it is; to read the images again, remove it", target
        )
    else:
        tasks: list[tfds_writer.ShardTask] = []
        shard_bytes = None if shard_mb == SHARD_MB else shard_mb << 20
        for split, source in found.items():
            tasks += tfds_writer.plan_shards(
                target, name, split, source, shrink, shard_bytes, max_pixels
            )
        _check_space(target, tasks)
        atomic_io.write(target / CLAIM, json.dumps(plan, indent=2))
        (target / tfds_writer.UNFINISHED).mkdir(exist_ok=True)
        sizes = [len(task.images) for task in tasks]
        for _ in _run_in_parallel(tfds_writer.write_shard, tasks, sizes, count, " images"):
            pass
        tfds_writer.finish_dataset(target, found["train"].classes, tasks)
    return target


def open_splits(
    folder: pathlib.Path, modalities: Mapping[str, str] | None = None, *, labeled: bool = True
) -> dict[str, tfds_writer.Images]:
    """The splits of a folder of images, its subfolders or all images as "train"; prints them.

    Args:
      folder: of the images, or of a folder for each modality.
      modalities: {name: its folder}; None: there is one.
      labeled: whether folders are classes.
    """
    splits: Sequence[str] = ("train",)
    first = next(iter(modalities.values())) if modalities else ""
    if (folder / first / "train").is_dir():
        splits = SPLITS
    found: dict[str, tfds_writer.Images] = {}
    listings: sources.Listings = {}
    for split in splits:
        source: tfds_writer.Images | None
        if modalities:
            source = sources.open_pairs(folder, modalities, split, listings)
        else:
            source = sources.open_folder(folder, split, listings=listings)
        if source:
            found[split] = source if labeled else source.without_labels()
    places = inventory.Places(str(folder), "train", "", flag="", canvas=0)
    for line in inventory.describe(found, listings, places):
        print(line)
    return found


def _check_claim(target: pathlib.Path, plan: dict[str, Any]) -> None:
    """Raise a UserError if something else is being written into a folder, or has been."""
    path = target / CLAIM
    is_other = False
    if path.exists():
        is_other = json.loads(path.read_text()) != plan
    elif target.exists():  # killed before the claim was written, it is empty
        is_other = any(entry.suffix != ".tmp" for entry in target.iterdir())
    if is_other:
        raise UserError(
            f"{target} holds something else; remove it, or give another --name or --out"
        )


def _check_space(target: pathlib.Path, tasks: Sequence[tfds_writer.ShardTask]) -> None:
    """Raise a UserError if a disk has too little space for the shards that are not there yet."""
    needed = sum(task.num_bytes for task in tasks if not task.note_path.exists())
    disk = next(folder for folder in target.absolute().parents if folder.exists())
    free = shutil.disk_usage(disk).free
    if needed > free:
        raise UserError(
            f"the dataset needs about {needed / 1e9:,.1f} GB, and {disk} has {free / 1e9:,.1f} GB "
            "left; give another --out, or --shrink images"
        )


def convert_tfrecords(folder: str | pathlib.Path, count: int) -> pathlib.Path:
    """Write ArrayRecord files beside the TFRecord files of a prepared dataset.

    Args:
      folder: of the dataset.
      count: of processes.

    Returns:
      The folder of the dataset.

    Raises:
      UserError: there is no such dataset, or a file is damaged or lacks records.
    """
    folder = pathlib.Path(folder).expanduser()
    originals = tfrecord.list_shards(folder)
    expected = {tfrecord.array_record_path(path): length for path, length in originals.items()}
    paths = list(originals)
    sizes = [path.stat().st_size for path in paths]
    for path, found in _run_in_parallel(tfrecord.convert_file, paths, sizes, count, "B"):
        if found != expected[path]:
            raise UserError(f"{path} has {found} records instead of {expected[path]}")
    tfrecord.register_array_records(folder)
    return folder


def verify(
    folder: str | pathlib.Path, sample: int, max_pixels: int = MAX_PIXELS
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Check a prepared dataset.

    Counts the records of every file, decodes random images of every split, and compares sizes and
    checksums with the manifest if there is one.

    Args:
      folder: of the dataset.
      sample: how many images of each split are decoded.
      max_pixels: images of more are problems.

    Returns:
      ({name of a file: facts about it}, problems for people to read).

    Raises:
      UserError: there is no prepared dataset.
    """
    import tensorflow_datasets as tfds

    folder = pathlib.Path(folder).expanduser()
    try:
        builder = tfds.builder_from_directory(str(folder))
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"{folder} is not a prepared dataset: {error}") from error
    manifest: dict[str, dict[str, Any]] = {}
    problems: list[str] = []
    for split, info in builder.info.splits.items():
        for path, length in zip(info.filepaths, info.shard_lengths, strict=True):
            record_path = tfrecord.array_record_path(pathlib.Path(path))
            try:
                found = tfrecord.count_records(record_path)
            except UserError as error:
                problems.append(str(error))
                continue
            manifest[record_path.name] = {**tfds_writer.file_facts(record_path), "records": found}
            if found != length:
                problems.append(f"{record_path.name}: {found} records instead of {length}")
        source = tfds_source.open_split(builder, split, _modalities_of(builder))
        problems += _undecodable(source, sample, ImageOptions(max_pixels=max_pixels))
    if (folder / tfds_writer.MANIFEST).exists():
        known = json.loads((folder / tfds_writer.MANIFEST).read_text())
        for name, facts in known.items():
            if facts != manifest.get(name):
                problems.append(f"{name}: not as in {tfds_writer.MANIFEST}")
    return manifest, problems


def _modalities_of(builder: Any) -> tuple[str, ...]:
    """The images of an example of a dataset, if there are several and none is called image."""
    import tensorflow_datasets as tfds

    names = []
    for name, feature in builder.info.features.items():
        if isinstance(feature, tfds.features.Image) and name != "mask":
            names.append(name)
    if len(names) < 2 or "image" in names:
        return ()
    return tuple(sorted(names))


def _undecodable(source: sources.Source, sample: int, options: ImageOptions) -> list[str]:
    """Problems with decoding a few random images."""
    problems = []
    for i in np.random.default_rng(0).permutation(len(source))[:sample]:
        try:
            for file in records.unpack(source.record(i)[0]):
                decode.verify(file, options)
        except (decode.BadImage, OSError) as error:
            problems.append(f"{source.name(i)}: {error}")
    return problems


def main(arguments: list[str]) -> None:
    """Convert or verify."""
    given = flags.FLAGS
    if sum(map(bool, (arguments, given.folder, given.tfrecord, given.verify))) != 1:
        raise UserError(
            "give one of SOURCE, --folder, --tfrecord, --verify; see lmim prepare --help"
        )
    for name in ("folder", "tfrecord", "verify", "out"):
        if given[name].value:
            check_local(name, given[name].value)
    if given.verify:
        manifest, problems = verify(given.verify, given.sample, given.max_pixels)
        for name, facts in manifest.items():
            print(f"{facts['sha256']}  {facts['bytes']:>12}  {facts['records']:>8}  {name}")
        print("\n".join(problems) or "all good")
        sys.exit(bool(problems))
    if given.tfrecord:
        target = convert_tfrecords(given.tfrecord, given.processes)
    else:
        source, found = open_source(arguments)
        if given.statistics:
            recipe = "interactive_mim_vit_s" if given.modalities else "own"
            options = measure_statistics(source, found)
            print(commands.line("train", f"--config={recipe}", *options))
            return
        target = convert(
            found,
            given.out,
            given.name,
            given.shrink,
            given.processes,
            given.shard_mb,
            given.max_pixels,
        )
        _report_bad_files(target / tfds_writer.BAD)
    arguments = [str(target.parent)]
    if given.modalities:
        arguments.append("--config=interactive_mim_vit_s")
    if given.max_pixels != MAX_PIXELS:
        arguments.append(f"--config.data.max_pixels={given.max_pixels}")
    print("ready:", commands.line("train", *arguments))


def open_source(arguments: Sequence[str]) -> tuple[inputs.Given, dict[str, tfds_writer.Images]]:
    """What is to be prepared, and its splits; prints what was found.

    Args:
      arguments: the positional ones, SOURCE; none: --folder is given.

    Raises:
      UserError: it is not there, unclear or damaged, or holds no images.
    """
    given = flags.FLAGS
    if given.folder:
        source = inputs.Given(inputs.FOLDER, (given.folder,), (given.folder,))
    else:
        source = inputs.recognize(arguments, given.kind or "")
    inputs.check_options(source.kind, given.image, given.label, given.root)
    modalities: dict[str, str] = {}
    if given.modalities:
        modalities = paired_source.parse(given.modalities)
    if source.kind == inputs.FOLDER:
        folder = pathlib.Path(source.paths[0]).expanduser()
        found = open_splits(folder, modalities, labeled=given.label != packed.NO_LABEL)
        return source, found
    if modalities:
        raise UserError(
            f"--modalities: {source.paths[0]} is not a folder that holds a folder of images for "
            "each of them"
        )
    look = functools.partial(_look_through, given.processes)
    opened = inputs.open_splits(source, given.image, given.label, given.root, look)
    places = inventory.Places(source.describe(), "train", "", flag="", canvas=0)
    left_out = [f"{count:,} {what}" for what, count in opened.left_out.items()]
    others = [("left out", ", ".join(left_out))] if left_out else []
    for line in inventory.describe(opened.splits, {}, places, others):
        print(line)
    return source, dict(opened.splits)


def check_local(flag: str, folder: str) -> None:
    """Raise a UserError if the folder of a flag is in a bucket."""
    if isinstance(buckets.path(folder), buckets.BucketPath):
        raise UserError(
            f"--{flag}={folder}: lmim prepare works on local folders; copy from and to buckets "
            "with: gcloud storage cp --recursive FROM TO"
        )


def measure_statistics(source: inputs.Given, found: Mapping[str, tfds_writer.Images]) -> list[str]:
    """The options of a run on images that depend on their pixels.

    Args:
      source: where they come from; other than of a folder, the run is on the prepared dataset.
      found: {split: images}.

    Raises:
      UserError: no image can be read.
    """
    given = flags.FLAGS
    images = found["train"]
    path = source.paths[0]
    if source.kind != inputs.FOLDER:
        path = str(pathlib.Path(given.out) / given.name)
    names = getattr(images, "modalities", ())
    options = {"data.path": path}
    if given.max_pixels != MAX_PIXELS:
        options["data.max_pixels"] = given.max_pixels
    for place, name in enumerate(names or ("",)):
        part: Any = pixel_range.OneModality(images, place)
        config = vit_b.data()
        config.update(path=path, range=given.range, channels=given.channels)
        config.max_pixels = given.max_pixels
        if not given.channels:
            config.channels = _find_channels(part, gray=bool(name))
        for line in pixel_range.resolve(config, part):
            print(line)
        mean, std, count = pixel_range.statistics(part, config, STATISTICS)
        print(f"mean and std of {config.channels} channels of {count:,} images {name}".rstrip())
        data = f"data.modalities.{name}" if name else "data"
        augment = data if name else "augment"
        if name and source.kind == inputs.FOLDER:
            options[f"{data}.path"] = paired_source.parse(given.modalities)[name]
        options |= {
            f"{data}.channels": config.channels,
            f"{data}.range": config.range,
            f"{augment}.mean": _tuple_text(mean),
            f"{augment}.std": _tuple_text(np.maximum(std, LEAST_STD)),
        }
    return [f"--config.{key}={value}" for key, value in options.items()]


def _find_channels(source: sources.Source, *, gray: bool = False) -> int:
    """The number of bands of the first image that can be read; 3 for gray and colors.

    Args:
      source: the images.
      gray: images in gray have 1 band.
    """
    for index in range(min(len(source), pixel_range.SAMPLED)):
        try:
            data = source.record(index)[0]
            found = samples.read(data, 3, decode.DEFAULTS)
            mode = samples.read_header(data).mode
        except (OSError, ValueError):
            continue
        if gray and (mode in GRAY_MODES or (found is not None and found.bands == 1)):
            return 1
        if found is not None and not found.colors:
            return found.bands
    return 3


def _tuple_text(values: np.ndarray) -> str:
    """Numbers as a tuple that flags accept."""
    numbers = ",".join(f"{value:.4f}" for value in values)
    return f"({numbers},)"


def _report_bad_files(path: pathlib.Path) -> None:
    """Print how many files were left out; their names are in the file `path`."""
    count = path.read_bytes().count(b"\n")
    if count:
        print(f"{count} files are not usable images and were left out: {path}")
    else:
        print("no bad files")


def define_flags() -> None:
    """Define the flags of the command."""
    flags.DEFINE_string(
        "folder",
        None,
        "A folder of images: the same as SOURCE --kind=folder. Example: --folder=photos",
    )
    flags.DEFINE_enum(
        "kind",
        None,
        inputs.KINDS,
        "With SOURCE: what it is, where its files do not tell. Example: --kind=webdataset",
    )
    flags.DEFINE_string(
        "image",
        "",
        "With SOURCE: where the images are, a suffix in WebDataset shards or a column in parquet "
        "files; by default the only ones. Examples: --image=jpg, --image=photo",
    )
    flags.DEFINE_string(
        "label",
        "",
        "With SOURCE: where the classes are, a suffix or a field of a .json in WebDataset shards, "
        "or a column in parquet files; by default .cls, and the ClassLabel or the column label; "
        "none: no classes. Examples: --label=txt, --label=json.category, --label=fine_label",
    )
    flags.DEFINE_list(
        "modalities",
        [],
        "With a folder as SOURCE: the folders in it that hold one modality each, NAME or "
        "NAME=FOLDER. Examples: --modalities=rgb,thermal, --modalities=rgb,thermal=infrared",
    )
    flags.DEFINE_string(
        "root",
        "",
        "With a list as SOURCE: the folder that its paths start from, by default that of the list. "
        "Example: --root=photos",
    )
    flags.DEFINE_integer(
        "shard_mb",
        SHARD_MB,
        "With SOURCE: the largest size of a file of the dataset in MiB, by estimate; where there "
        "are several, they have more than half of it. Example: --shard_mb=512",
        lower_bound=1,
    )
    flags.DEFINE_string(
        "out",
        ".",
        "With SOURCE: where to make the dataset, which will be OUT/NAME/1.0.0. "
        "Example: --out=datasets",
    )
    flags.DEFINE_string(
        "name", "images", "With SOURCE: the name of the dataset. Example: --name=photos"
    )
    flags.DEFINE_integer(
        "shrink",
        0,
        "With SOURCE: shrink images to this short side in pixels (JPEG, quality 90); 0 copies the "
        "files unchanged. Example: --shrink=512",
    )
    flags.DEFINE_integer(
        "max_pixels",
        MAX_PIXELS,
        "Leave out images of more pixels, as --config.data.max_pixels of lmim train. "
        "Example: --max_pixels=200000000",
        lower_bound=1,
    )
    flags.DEFINE_bool(
        "statistics",
        False,
        "With SOURCE: only print the range, mean and std of the pixels, as options of a run. "
        "Example: --statistics",
    )
    flags.DEFINE_integer(
        "channels",
        0,
        "With --statistics: the bands of an image; 0: as the first one that is neither gray nor "
        "RGB, or 3. Example: --channels=13",
        lower_bound=0,
    )
    flags.DEFINE_string(
        "range",
        "auto",
        "With --statistics: as --config.data.range of lmim train. Example: --range=1%,99%",
    )
    flags.DEFINE_string(
        "tfrecord",
        None,
        "A prepared dataset to make ArrayRecord files for. "
        "Example: --tfrecord=datasets/imagenet2012/5.1.0",
    )
    flags.DEFINE_string(
        "verify", None, "A prepared dataset to check. Example: --verify=datasets/photos/1.0.0"
    )
    flags.DEFINE_integer(
        "sample",
        64,
        "With --verify: how many images of each split to decode. Example: --sample=1000",
    )
    flags.DEFINE_integer(
        "processes", 2, "How many processes convert. Example: --processes=8", lower_bound=1
    )
