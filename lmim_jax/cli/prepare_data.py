"""Prepares datasets that `--config.data.source=tfds` reads at full speed, without TensorFlow.

    lmim prepare --folder=IMAGES --out=DIR --name=NAME [--shrink=512] [--processes=8]
    lmim prepare --tfrecord=DIR/NAME/VERSION [--processes=8]
    lmim prepare --verify=DIR/NAME/VERSION
    lmim prepare --folder=IMAGES --statistics [--channels=13] [--range=auto]

--folder: a TFDS dataset of the files below IMAGES (as for `--config.data.path`), in the same order,
unchanged or with the short side shrunk. --tfrecord: ArrayRecord files beside the TFRecord files of
a prepared dataset. An interrupted conversion is resumed by the same command and writes the same
bytes. --verify: counts records, decodes a sample and compares checksums; exit code 1 if something
is wrong. --statistics: only prints the options of a run on these images: the range of pixel values
of other than 8 bits, and mean and std of each channel.
"""

import json
import multiprocessing
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any

import numpy as np
import tqdm
from absl import flags

from lmim_jax.cli import app
from lmim_jax.configs import vit_b
from lmim_jax.data import decode, inventory, pixel_range, samples, sources, tfds_source
from lmim_jax.data.prepare import tfds_writer, tfrecord
from lmim_jax.utils import atomic_io, buckets, commands, subprocess
from lmim_jax.utils.errors import UserError

RECIPES: dict[str, str | None] = {}
FLAGS_OF_OPTIONS = {"data.path": "--folder"}
VERSION = "1.0.0"
STATISTICS = 1024  # images that mean and std are measured on
LEAST_STD = 1e-3  # of a constant channel
SPLITS = ("train", "test", "val", "validation")


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
    pool = futures.ProcessPoolExecutor(
        count, mp_context=context, initializer=subprocess.exit_with_parent
    )
    bar = tqdm.tqdm(total=sum(sizes), unit=unit, unit_scale=True, mininterval=1.0)
    with pool, bar:
        size_of = {}
        for item, size in zip(items, sizes, strict=True):
            size_of[pool.submit(task, item)] = size
        try:
            for done in futures.as_completed(size_of):
                yield done.result()
                bar.update(size_of[done])
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def convert_folder(
    folder: str | pathlib.Path, out: str | pathlib.Path, name: str, shrink: int, count: int
) -> pathlib.Path:
    """Make the dataset OUT/NAME/1.0.0 of a folder of images.

    Args:
      folder: the images.
      out: where to make the dataset.
      name: of the dataset.
      shrink: images whose short side has more pixels than this are shrunk to it (JPEG, quality
        90); 0: files are copied unchanged.
      count: of processes.

    Returns:
      The folder of the dataset.

    Raises:
      UserError: no images, or the folder of the dataset holds another one.
    """
    if not name.isidentifier():
        raise UserError(f"--name={name!r} must be letters, digits and underscores")
    target = pathlib.Path(out).expanduser() / name / VERSION
    found = _open_splits(pathlib.Path(folder).expanduser())
    identities = {split: source.identity() for split, source in found.items()}
    _claim(target, {"shrink": shrink, "images": identities})
    if not (target / tfds_writer.MANIFEST).exists():
        (target / tfds_writer.UNFINISHED).mkdir(exist_ok=True)
        tasks: list[tfds_writer.ShardTask] = []
        for split, source in found.items():
            tasks += tfds_writer.plan_shards(target, name, split, source, shrink)
        sizes = [len(task.images) for task in tasks]
        for _ in _run_in_parallel(tfds_writer.write_shard, tasks, sizes, count, " images"):
            pass
        tfds_writer.finish_dataset(target, found["train"].classes, tasks)
    return target


def _open_splits(folder: pathlib.Path) -> dict[str, sources.FolderSource]:
    """The splits of a folder of images, its subfolders or all images as "train"; prints them."""
    splits: Sequence[str] = ("train",)
    if (folder / "train").is_dir():
        splits = SPLITS
    found: dict[str, sources.FolderSource] = {}
    listings: sources.Listings = {}
    for split in splits:
        source = sources.open_folder(folder, split, listings=listings)
        if source:
            found[split] = source
    places = inventory.Places(str(folder), "train", "", flag="", canvas=0)
    for line in inventory.describe(found, listings, places):
        print(line)
    return found


def _claim(target: pathlib.Path, plan: dict[str, Any]) -> None:
    """Note in a folder what is being written there.

    Raises:
      UserError: something else is.
    """
    path = target / "prepare.json"
    if target.exists() and (not path.exists() or json.loads(path.read_text()) != plan):
        raise UserError(
            f"{target} holds something else; remove it, or give another --name or --out"
        )
    atomic_io.write(path, json.dumps(plan, indent=2))


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


def verify(folder: str | pathlib.Path, sample: int) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Check a prepared dataset.

    Counts the records of every file, decodes random images of every split, and compares sizes and
    checksums with the manifest if there is one.

    Args:
      folder: of the dataset.
      sample: how many images of each split are decoded.

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
        problems += _undecodable(tfds_source.open_split(builder, split), sample)
    if (folder / tfds_writer.MANIFEST).exists():
        known = json.loads((folder / tfds_writer.MANIFEST).read_text())
        for name, facts in known.items():
            if facts != manifest.get(name):
                problems.append(f"{name}: not as in {tfds_writer.MANIFEST}")
    return manifest, problems


def _undecodable(source: sources.Source, sample: int) -> list[str]:
    """Problems with decoding a few random images."""
    problems = []
    for i in np.random.default_rng(0).permutation(len(source))[:sample]:
        try:
            decode.verify(source.record(i)[0])
        except (decode.BadImage, OSError) as error:
            problems.append(f"{source.name(i)}: {error}")
    return problems


def main(arguments: list[str]) -> None:
    """Convert or verify."""
    app.no_arguments(arguments, "--folder=IMAGES")
    given = flags.FLAGS
    if sum(map(bool, (given.folder, given.tfrecord, given.verify))) != 1:
        raise UserError("give one of --folder, --tfrecord, --verify")
    for name in ("folder", "tfrecord", "verify", "out"):
        if given[name].value:
            check_local(name, given[name].value)
    if given.verify:
        manifest, problems = verify(given.verify, given.sample)
        for name, facts in manifest.items():
            print(f"{facts['sha256']}  {facts['bytes']:>12}  {facts['records']:>8}  {name}")
        print("\n".join(problems) or "all good")
        sys.exit(bool(problems))
    if given.statistics:
        print(commands.line("train", "--config=own", *measure_statistics()))
        return
    if given.tfrecord:
        target = convert_tfrecords(given.tfrecord, given.processes)
    else:
        target = convert_folder(given.folder, given.out, given.name, given.shrink, given.processes)
        _report_bad_files(target / tfds_writer.BAD)
    options = {"source": "tfds", "name": target.parent.name, "dir": target.parent.parent}
    options_of_data = [f"--config.data.{key}={value}" for key, value in options.items()]
    print("ready:", commands.line("train", "--config=own", *options_of_data))


def check_local(flag: str, folder: str) -> None:
    """Raise a UserError if the folder of a flag is in a bucket."""
    if isinstance(buckets.path(folder), buckets.BucketPath):
        raise UserError(
            f"--{flag}={folder}: lmim prepare works on local folders; copy from and to buckets "
            "with: gcloud storage cp --recursive FROM TO"
        )


def measure_statistics() -> list[str]:
    """The options of a run on the images of --folder that depend on their pixels.

    Raises:
      UserError: there are no images, or none can be read.
    """
    given = flags.FLAGS
    if not given.folder:
        raise UserError("--statistics needs the images: --folder=IMAGES")
    source = _open_splits(pathlib.Path(given.folder).expanduser())["train"]
    config = vit_b.data()
    config.update(path=given.folder, range=given.range, channels=given.channels)
    if not given.channels:
        config.channels = _find_channels(source)
    for line in pixel_range.resolve(config, source):
        print(line)
    mean, std, count = pixel_range.statistics(source, config, STATISTICS)
    print(f"mean and std of {config.channels} channels of {count:,} images")
    options = {
        "data.path": given.folder,
        "data.channels": config.channels,
        "data.range": config.range,
        "augment.mean": _tuple_text(mean),
        "augment.std": _tuple_text(np.maximum(std, LEAST_STD)),
    }
    return [f"--config.{key}={value}" for key, value in options.items()]


def _find_channels(source: sources.Source) -> int:
    """The number of bands of the first image that can be read; 3 for gray and colors."""
    for index in range(min(len(source), pixel_range.SAMPLED)):
        try:
            found = samples.read(source.record(index)[0], 3, decode.DEFAULTS)
        except (OSError, ValueError):
            continue
        if found is not None and not found.colors:
            return found.bands
    return 3


def _tuple_text(values: np.ndarray) -> str:
    """Numbers as a tuple that flags accept."""
    numbers = ",".join(f"{value:.4f}" for value in values)
    return f"({numbers},)"


def _report_bad_files(path: pathlib.Path) -> None:
    """Print how many files were left out; their names are in the file `path`."""
    count = path.read_text().count("\n")
    if count:
        print(f"{count} files are not usable images and were left out: {path}")
    else:
        print("no bad files")


def define_flags() -> None:
    """Define the flags of the command."""
    flags.DEFINE_string(
        "folder", None, "A folder of images to make a dataset of. Example: --folder=photos"
    )
    flags.DEFINE_string(
        "out",
        ".",
        "With --folder: where to make the dataset, which will be OUT/NAME/1.0.0. "
        "Example: --out=datasets",
    )
    flags.DEFINE_string(
        "name", "images", "With --folder: the name of the dataset. Example: --name=photos"
    )
    flags.DEFINE_integer(
        "shrink",
        0,
        "With --folder: shrink images to this short side in pixels (JPEG, quality 90); 0 copies "
        "the files unchanged. Example: --shrink=512",
    )
    flags.DEFINE_bool(
        "statistics",
        False,
        "With --folder: only print the range, mean and std of the pixels, as options of a run. "
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
