"""Folders of files on disk, in memory, and in a bucket through its real client."""

import importlib.util

import numpy as np
import pytest
from recordings import assert_same, labelling, rows, targets

from engine.config import UserError
from engine.data.order import Blocks
from engine.labels.store import Store
from engine.labels.targets import BlockView
from engine.labels.upkeep import checked, holdings, needless
from engine.storage.folder import open_folder
from jobs import cli


def test_all_kinds_of_folder_do_the_same(where):
    folder = open_folder(where, "x")
    assert folder.entries("") == [] and [*folder.files("")] == [] and folder.broken_off("", 0) == []
    with pytest.raises(FileNotFoundError):
        folder.read("a/b")
    assert folder.write("a/b", b"hello", replace=False)
    assert not folder.write("a/b", b"other", replace=False) and folder.read("a/b") == b"hello"
    assert folder.write("a/b", b"others", replace=True) and folder.read("a/b") == b"others"
    assert folder.write("a/c/d", b"", replace=True) and folder.write("e", b"1", replace=True)
    assert folder.read("a/b", 3) == b"oth" and folder.read("a/b", 99) == b"others"
    again = open_folder(where + "/", "x")
    assert again.entries("") == ["a", "e"] and again.entries("a") == ["b", "c"]
    assert dict(again.files("a")) == {"a/b": 6, "a/c/d": 0}
    folder.remove("a/c/d")
    assert dict(again.files("")) == {"a/b": 6, "e": 1}


def test_files_are_listed_a_folder_at_a_time(where):
    folder = open_folder(where, "x")
    for name in ("a/1", "a/2", "b/1", "c/d/1"):
        folder.write(name, b"12", replace=False)
    files = folder.files("")
    assert next(files) == ("a/1", 2)
    folder.remove("b/1")
    assert [*files] == [("a/2", 2), ("c/d/1", 2)]


def test_a_store_is_kept_in_any(where, capsys):
    ours = Store(where).open(labelling(), add=False)
    whole, wanted = targets(ours.labelling, 8), BlockView("shards", 0, 0)
    for offsets in (np.arange(5), np.arange(5, 8)):
        ours.put(wanted, rows(whole, offsets), offsets, 8)
    blocks = Blocks(np.array([8, 8]), 8)
    assert_same(ours.get(wanted, 8), whole)
    assert ours.missing(0, blocks) == 1 and ours.get(BlockView("shards", 1, 0), 8) is None
    ours.put(wanted, whole)
    store = Store(where)
    (held,) = holdings(store, ours.fingerprint)
    assert (held.blocks, held.parts, held.images, held.bytes) == (1, 2, 8, ours.written_bytes)
    assert [fault for _, fault in checked(store, ours.fingerprint)] == [None] * 3
    assert {why for _, why in needless(store, [])} == {"superseded"}
    assert cli.main(["store", "gc", where]) == 0
    assert "2 files removed" in capsys.readouterr().out
    assert len([*store.folder.files("")]) == 2 and ours.missing(0, blocks) == 1
    assert ours.recording and ours.damaged == 0


def test_a_bucket_that_denies_us(bucket, capsys):
    ours = Store("s3://labels/store").open(labelling(), add=False)
    bucket.down = True
    wanted = BlockView("shards", 0, 0)
    assert ours.get(wanted, 8) is None and ours.damaged == 1
    ours.put(wanted, targets(ours.labelling, 8))
    assert not ours.recording and "no more labels are recorded" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"^targets\.store: .* cannot be listed"):
        ours.missing(0, Blocks(np.array([8]), 8))
    with pytest.raises(UserError, match=r"^targets\.store: s3://labels/store cannot be read"):
        Store("s3://labels/store").labellings()


@pytest.mark.skipif(bool(importlib.util.find_spec("gcsfs")), reason="gcsfs is installed")
def test_a_package_that_is_missing_is_named():
    with pytest.raises(UserError, match=r"^x: gs://b/s needs .*promptkd-engine\[gcs\]"):
        open_folder("gs://b/s", "x")
