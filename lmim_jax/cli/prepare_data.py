"""Turn images into datasets that `--config.data.source=tfds` reads at full speed; TensorFlow is not needed.

    lmim prepare --folder=IMAGES --out=DIR --name=NAME [--shrink=512] [--processes=8]
    lmim prepare --tfrecord=DIR/NAME/VERSION [--processes=8]
    lmim prepare --verify=DIR/NAME/VERSION

folder: a TFDS dataset of the files below IMAGES (as for `--config.data.path`), in the same order, as they are or with
the short side shrunk. tfrecord: ArrayRecord files beside the TFRecord files of a prepared dataset. Both go on where
they were when they are stopped, and make the same bytes as if they had not been. verify: counts, decodes a sample and
compares checksums; exit code 1 where something is wrong.
"""

import json
import multiprocessing
import pathlib
import sys
from concurrent import futures

import numpy as np
import tqdm
from absl import flags

from lmim_jax.data import decode, sources, tfds_source
from lmim_jax.data.prepare import tfds_writer, tfrecord
from lmim_jax.utils import atomic_io, subprocess
from lmim_jax.utils.errors import UserError

VERSION = "1.0.0"
SPLITS = ("train", "test", "val", "validation")

RECIPES: dict[str, str | None] = {}


def _in_parallel(task, items, count, sizes, unit):
    """Yield results of task(item) as they come, from `count` processes, with a progress bar in steps of `sizes`."""
    context = multiprocessing.get_context("spawn")
    with (
        futures.ProcessPoolExecutor(
            count, mp_context=context, initializer=subprocess.exit_with_parent
        ) as pool,
        tqdm.tqdm(total=sum(sizes), unit=unit, unit_scale=True, mininterval=1.0) as bar,
    ):
        waiting = {pool.submit(task, item): size for item, size in zip(items, sizes, strict=True)}
        try:
            for done in futures.as_completed(waiting):
                yield done.result()
                bar.update(waiting[done])
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def convert_folder(folder, out, name, shrink, count):
    """Make the dataset out/name/1.0.0 of an image folder; returns its path.

    Args:
      shrink: short side, in pixels, above which images are shrunk to it (JPEG, quality 90); 0: files as they are.
      count: of processes.

    Raises:
      UserError: no images; or the folder of the dataset holds another one.
    """
    if not name.isidentifier():
        raise UserError(f"--name={name!r} must be letters, digits and underscores")
    target = pathlib.Path(out).expanduser() / name / VERSION
    divided = pathlib.Path(folder, "train").is_dir()
    found = {
        split: sources.open_folder(folder, split) for split in (SPLITS if divided else SPLITS[:1])
    }
    found = {split: source for split, source in found.items() if source}
    plan = {
        "shrink": shrink,
        "images": {split: source.identity() for split, source in found.items()},
    }
    plan_path = target / "prepare.json"
    if target.exists() and (not plan_path.exists() or json.loads(plan_path.read_text()) != plan):
        raise UserError(
            f"{target} holds something else; remove it, or give another --name or --out"
        )
    atomic_io.write(plan_path, json.dumps(plan, indent=2))
    if not (target / tfds_writer.MANIFEST).exists():
        (target / tfds_writer.UNFINISHED).mkdir(exist_ok=True)
        tasks = [
            task
            for split, source in found.items()
            for task in tfds_writer.tasks(target, name, split, source, shrink)
        ]
        sizes = [len(task.source) for task in tasks]
        for _ in _in_parallel(tfds_writer.write, tasks, count, sizes, " images"):
            pass
        tfds_writer.finish(target, found["train"].classes, tasks)
    return target


def convert_tfrecords(folder, count):
    """Write ArrayRecord files beside the TFRecord files of a prepared dataset, in `count` processes; returns its path.

    Raises:
      UserError: no such dataset, a damaged file, or one with another number of records than it should have.
    """
    folder = pathlib.Path(folder).expanduser()
    originals = tfrecord.shards(folder)
    expected = {tfrecord.beside(path): length for path, length in originals.items()}
    sizes = [path.stat().st_size for path in originals]
    for path, found in _in_parallel(tfrecord.convert, list(originals), count, sizes, "B"):
        if found != expected[path]:
            raise UserError(f"{path} has {found} records instead of {expected[path]}")
    tfrecord.announce(folder)
    return folder


def verify(folder, sample):
    """Look at a prepared dataset: (its manifest, problems, both for people to read).

    Counts the records of every file, decodes `sample` random images of every split, and compares sizes and checksums
    with the manifest where there is one.
    """
    import tensorflow_datasets as tfds

    folder = pathlib.Path(folder).expanduser()
    try:
        builder = tfds.builder_from_directory(str(folder))
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"{folder} is no prepared dataset: {error}") from error
    manifest, problems = {}, []
    for split, info in builder.info.splits.items():
        source = tfds_source.open_split(builder, split)
        for path, length in zip(info.filepaths, info.shard_lengths, strict=True):
            path = tfrecord.beside(pathlib.Path(path))
            try:
                found = tfrecord.count_records(path)
            except UserError as error:
                problems.append(str(error))
                continue
            manifest[path.name] = {**tfds_writer.facts(path), "records": found}
            if found != length:
                problems.append(f"{path.name}: {found} records instead of {length}")
        for i in np.random.default_rng(0).permutation(len(source))[:sample]:
            try:
                decode.decode(source.record(i)[0], 0, 3)
            except (decode.BadImage, OSError) as error:
                problems.append(f"{source.name(i)}: {error}")
    if (folder / tfds_writer.MANIFEST).exists():
        known = json.loads((folder / tfds_writer.MANIFEST).read_text())
        problems += [
            f"{name}: not as in {tfds_writer.MANIFEST}"
            for name in known
            if known[name] != manifest.get(name)
        ]
    return manifest, problems


def main(arguments):
    """Run the command."""
    given = flags.FLAGS
    if sum(map(bool, (given.folder, given.tfrecord, given.verify))) != 1:
        raise UserError("give one of --folder, --tfrecord, --verify")
    if given.verify:
        manifest, problems = verify(given.verify, given.sample)
        for name, facts in manifest.items():
            print(f"{facts['sha256']}  {facts['bytes']:>12}  {facts['records']:>8}  {name}")
        print("\n".join(problems) or "all good")
        sys.exit(bool(problems))
    if given.tfrecord:
        target = convert_tfrecords(given.tfrecord, given.processes)
    else:
        target = convert_folder(given.folder, given.out, given.name, given.shrink, given.processes)
        bad = (target / tfds_writer.BAD).read_text().count("\n")
        print(
            f"{bad} files are no usable images and were left out: {target / tfds_writer.BAD}"
            if bad
            else "no bad files"
        )
    root = target.parent.parent
    print(
        f"ready: --config.data.source=tfds --config.data.name={target.parent.name} --config.data.dir={root}"
    )


def define_flags():
    """Define the flags of the command."""
    flags.DEFINE_string("folder", None, "Images to make a dataset of.")
    flags.DEFINE_string("out", ".", "folder: where to make it; it will be OUT/NAME/1.0.0.")
    flags.DEFINE_string("name", "images", "folder: name of the dataset.")
    flags.DEFINE_integer(
        "shrink", 0, "folder: shrink to this short side (JPEG, quality 90); 0: files as they are."
    )
    flags.DEFINE_string(
        "tfrecord", None, "A prepared dataset (DIR/NAME/VERSION) to make ArrayRecord files for."
    )
    flags.DEFINE_string("verify", None, "A prepared dataset (DIR/NAME/VERSION) to look through.")
    flags.DEFINE_integer("sample", 64, "verify: how many images of each split are decoded.")
    flags.DEFINE_integer("processes", 2, "How many processes work.", lower_bound=1)
