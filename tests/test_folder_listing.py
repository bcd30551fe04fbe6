"""Listing a folder: the order, links, what is counted, and memory that workers share."""

import errno
import multiprocessing
import os
import pathlib
import pickle
import subprocess
import sys

import numpy as np
import pytest
from ml_collections import ConfigDict

from lmim_jax.data import folder_listing, inventory, shared_array, sources
from lmim_jax.data.decode import SUFFIXES
from lmim_jax.utils.checksum import names_checksum
from lmim_jax.utils.faults import ReadFailed

# Names whose order depends on how "/" sorts among other characters, and on bytes outside UTF-8
NAMES = (
    "a/x.jpg",
    "a-b/x.JPG",
    "a.png",
    "a/b/x.jpeg",
    "a/b.jpg",
    "a!/x.jpg",
    "Z/x.jpg",
    "é/x.jpg",
    "\udc80/x.jpg",
    "\ue000/x.jpg",
    "😀.jpg",
    "z/line\nbreak.jpg",
    "z/notes.txt",
    "z/Thumbs.db",
    "z/README",
    "loose.TXT",
    ".hidden.jpg",
    ".git/x.jpg",
    "empty/.keep",
)


def make_files(top, names):
    for name in names:
        path = pathlib.Path(top, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return top


def walked(top):
    """Sorted relative paths of all files that are not hidden, the plain way."""
    found = []
    for parent, folders, names in os.walk(top):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [f"{parent}/{name}" for name in names if not name.startswith(".")]
    return sorted(os.path.relpath(path, top) for path in found)


def test_paths_are_sorted_as_strings(tmp_path):
    listing = folder_listing.list_folder(make_files(tmp_path, NAMES))
    images = [name for name in walked(tmp_path) if name.lower().endswith(SUFFIXES)]
    assert len(images) == 12
    assert list(listing.images) == images
    assert list(listing.others) == sorted(set(walked(tmp_path)) - set(images))
    assert names_checksum(listing.images) == names_checksum(images)


def test_what_is_below_a_folder_is_counted(tmp_path):
    listing = folder_listing.list_folder(make_files(tmp_path, NAMES))
    assert listing.suffixes == {".txt": 2, ".db": 1, "": 1}
    assert listing.loose == 2
    assert listing.classes == tuple(sorted(["a", "a-b", "a!", "Z", "é", "\udc80", "\ue000", "z"]))
    assert listing.folders == tuple(sorted([*listing.classes, "empty"]))
    assert sum(count for _, count in listing.runs) == len(listing.images)
    names = iter(listing.images)
    for folder, count in listing.runs:
        for _ in range(count):
            assert next(names).rpartition("/")[0].split("/")[0] == folder


def test_each_real_folder_is_listed_once(tmp_path):
    top = make_files(tmp_path / "top", ["a/1.jpg", "b/2.jpg"])
    outside = make_files(tmp_path / "outside", ["3.jpg", "inner/4.jpg"])
    hidden = make_files(tmp_path / "top" / ".store", ["5.jpg"])
    links = {
        "a/loop": top,  # to what contains the link
        "a/up": tmp_path,
        "a/self": "self",
        "c": top / "b",  # listed by its own path
        "d": outside,
        "e": outside / "inner",  # listed through d
        "f": hidden,  # not listed otherwise
        "g": tmp_path / "absent",
    }
    for name, target in links.items():
        (top / name).symlink_to(target)
    (outside / "back").symlink_to(top / "a")
    (outside / "inner" / "loop").symlink_to(outside)
    listing = folder_listing.list_folder(top)
    assert list(listing.images) == ["a/1.jpg", "b/2.jpg", "d/3.jpg", "d/inner/4.jpg", "f/5.jpg"]
    skipped = dict(listing.skipped_links)
    assert skipped == {
        "a/loop": str(top),
        "a/up": str(tmp_path),
        "c": str(top / "b"),
        "d/back": str(top / "a"),
        "d/inner/loop": str(outside),
        "e": str(outside / "inner"),
    }
    assert list(listing.others) == ["a/self", "g"]  # links that lead nowhere


def test_skipped_links_are_named(tmp_path):
    make_files(tmp_path, ["train/a/1.jpg", "train/b/2.jpg"])
    (tmp_path / "train" / "a" / "loop").symlink_to(tmp_path)
    listings = {}
    source = sources.open_folder(tmp_path, "train", listings=listings)
    assert (len(source), source.classes) == (2, ("a", "b"))
    (line,) = inventory.describe_files(listings.values())
    assert f"a/loop -> {tmp_path}" in line[1]


def test_a_split_may_be_a_link_to_another(tmp_path):
    make_files(tmp_path, ["train/a/1.jpg", "train/b/2.jpg"])
    (tmp_path / "test").symlink_to("train")
    assert list(sources.open_folder(tmp_path, "test").files) == ["a/1.jpg", "b/2.jpg"]


def fail_to_list(monkeypatch, name, error):
    def scandir(path, original=os.scandir):
        if name in path:
            raise error
        return original(path)

    monkeypatch.setattr(os, "scandir", scandir)


def test_a_forbidden_folder_is_named(tmp_path, monkeypatch):
    make_files(tmp_path, ["a/1.jpg", "lost+found/2.jpg"])
    fail_to_list(monkeypatch, "lost+found", PermissionError(errno.EACCES, "Permission denied"))
    listing = folder_listing.list_folder(tmp_path)
    assert (list(listing.images), listing.unreadable) == (["a/1.jpg"], ("lost+found",))


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    make_files(tmp_path, ["a/1.jpg", "b/2.jpg"])
    fail_to_list(monkeypatch, "/b", OSError(errno.EIO, "Input/output error"))
    with pytest.raises(ReadFailed, match=r"/b/: this folder cannot be listed \(Input/output error"):
        folder_listing.list_folder(tmp_path)


def test_labels_follow_the_names_of_classes(tmp_path):
    names = [f"train/{name}/{i}.jpg" for name in ("a", "a-b", "c") for i in range(3)]
    make_files(tmp_path, names)
    source = sources.open_folder(tmp_path, "train")
    found = {(source.files[i].split("/")[0], int(source.labels.array[i])) for i in range(9)}
    assert found == {("a", 0), ("a-b", 1), ("c", 2)}
    some = sources.open_folder(tmp_path, "train", max_per_class=2, only=("c", "a"))
    assert list(some.files) == ["a/0.jpg", "a/1.jpg", "c/0.jpg", "c/1.jpg"]
    assert some.labels.array.tolist() == [1, 1, 0, 0]


def test_both_splits_are_listed_once(tmp_path, monkeypatch):
    make_files(tmp_path, ["train/a/1.jpg", "test/a/2.jpg"])
    listed = []

    def list_folder(top, original=folder_listing.list_folder):
        listed.append(top.name)
        return original(top)

    monkeypatch.setattr(folder_listing, "list_folder", list_folder)
    config = {"source": "folder", "path": str(tmp_path), "classes": ""}
    config |= {"train_split": "train", "test_split": "test"}
    config |= {"train_per_class": 0, "test_per_class": 0, "held_out": 0.0, "labels": ""}
    config |= {"modalities": {}}
    splits = sources.open_splits(ConfigDict(config))
    assert [len(split) for split in splits.values()] == [1, 1]
    assert sorted(listed) == ["test", "train"]


def _last(source, queue):
    """In another process: the last name, and the size of the source's pickle there."""
    queue.put((source.files[-1], source.labels.array[-1], len(pickle.dumps(source))))


@pytest.mark.skipif(not shared_array.HAS_REFERENCES, reason="no files in memory")
def test_processes_share_the_memory_of_a_source():
    count = 200_000
    names = folder_listing.share_names(f"class/{i:06d}.jpg" for i in range(count))
    labels = shared_array.share(np.arange(count, dtype=np.int32))
    source = sources.FolderSource("/data", names, labels, ("class",))
    assert len(pickle.dumps(source)) < 1000
    # Not forked: nothing is inherited
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_last, args=(source, queue))
    process.start()
    last, label, size = queue.get(timeout=60)
    process.join()
    assert (last, label) == (f"class/{count - 1:06d}.jpg", count - 1)
    assert size < 1000


def test_a_name_takes_few_bytes_beside_its_own():
    """Memory of the whole process, in another one, so that nothing else is measured."""
    code = """
from lmim_jax.data import folder_listing, shared_array
import numpy as np, os
def used():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE")
before, count = used(), 500_000
names = folder_listing.share_names(f"class/{i:020d}.jpg" for i in range(count))
labels = shared_array.share(np.zeros(count, np.int32))
assert sum(map(len, names)) + labels.array.sum() == 30 * count  # all pages are in memory
print((used() - before) / count - 30)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 30  # 9, and what the allocator keeps
