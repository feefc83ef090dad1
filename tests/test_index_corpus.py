"""engine.index: whole corpora, wherever they lie, at once or in several goes."""

import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tars import write_tar

from engine.config import UserError
from engine.data import places
from engine.data.corpus import Corpus
from engine.data.manifest import MANIFEST
from engine.index import index


@pytest.fixture
def shards(corpus_folder: Path, tmp_path: Path) -> Path:
    """Three shards that are not indexed yet."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in corpus_folder.glob("*.tar"):
        shutil.copy(shard, folder)
    return folder


def images_of(corpus: Corpus) -> list[bytes | None]:
    samples = [one for block in range(len(corpus.blocks)) for one in corpus.read(block)]
    return [one.data and bytes(one.data) for one in samples]


def test_what_is_indexed_and_has_not_changed_is_kept(shards, encoded):
    assert index(str(shards), workers=1).reused == 0
    before = {file: file.stat().st_mtime_ns for file in shards.glob("*.arrow")}
    write_tar(shards / "000001.tar", [("a.jpg", encoded(30, 20))])
    (shards / MANIFEST).unlink()  # as if it had been broken off
    report = index(str(shards), workers=1)
    assert (report.shards, report.reused, report.samples) == (3, 2, 15)
    changed = [f for f, time in before.items() if f.stat().st_mtime_ns != time]
    assert changed == [shards / "000001.arrow"]
    assert Corpus.open(str(shards), 100).samples == 15


def test_a_shard_of_the_same_size_that_changed_is_indexed_anew(shards):
    index(str(shards), workers=1)
    shard = shards / "000002.tar"
    data = bytearray(shard.read_bytes())
    image = Corpus.open(str(shards), 100).read(2)[0]
    data[data.index(bytes(image.data))] ^= 255
    shard.write_bytes(data)
    report = index(str(shards), workers=1)
    assert report.reused == 2 and report.excluded == {"format": 1}


def test_an_index_may_lie_elsewhere(shards, tmp_path, corpus_folder):
    report = index(f"{shards}/000002.tar::{shards}/000000.tar", tmp_path / "index", workers=1)
    assert report.manifest == tmp_path / "index" / MANIFEST
    corpus = Corpus.open(str(tmp_path / "index"), 100)
    assert corpus.shards == (f"{shards}/000002.tar", f"{shards}/000000.tar")
    every = Corpus.open(str(corpus_folder), 100)
    assert images_of(corpus)[:4] == [bytes(one.data) for one in every.read(2)]
    assert not list(shards.glob("*.arrow"))


def test_a_folder_of_images_is_a_corpus(images_folder, tmp_path):
    with pytest.raises(UserError, match=r"^out: .*--out DIR"):
        index(str(images_folder), workers=1)
    report = index(str(images_folder), tmp_path, workers=1)
    assert report.samples == 24 and not report.excluded
    names = sorted(str(f.relative_to(images_folder)) for f in images_folder.rglob("*.*"))
    corpus = Corpus.open(str(tmp_path), 10)
    assert images_of(corpus) == [(images_folder / name).read_bytes() for name in names]
    assert [one.key for one in corpus.read(2)] == names[20:]


def test_a_folder_of_many_images_is_several_shards_and_kept(images_folder, tmp_path, monkeypatch):
    """Also where the folder's name has a dot, and the index lies next to it."""
    monkeypatch.setattr(places, "_FILES", 10)
    photos = shutil.copytree(images_folder, tmp_path / "photos.v1")
    assert index(str(photos), tmp_path, workers=1).shards == 3
    corpus = Corpus.open(str(tmp_path), 10)
    assert sorted(images_of(corpus)) == sorted(f.read_bytes() for f in photos.rglob("*.*"))
    assert index(str(photos), tmp_path, workers=1).reused == 3
    os.utime(photos / "daisy" / "00.jpeg")
    assert index(str(photos), tmp_path, workers=1).reused == 2


def test_shards_of_like_names_have_an_index_each(tmp_path, encoded):
    for name in ("a#1.tar", "a-1.tar", "b.c.tar", "b.tar"):
        write_tar(tmp_path / name, [(f"{name[:3]}.jpg", encoded(30, 20, len(name)))])
    index(str(tmp_path), workers=1)
    corpus = Corpus.open(str(tmp_path), 10)
    assert [one.key for block in range(4) for one in corpus.read(block)] == ["a#1", "a-1", "b", "b"]


def test_the_manifest_is_no_shard(tmp_path, encoded):
    """Parquet shards by a glob, twice, then another one."""
    for name in "ab":
        table = pa.table({"jpg": [encoded(30, 20, 1)]})
        pq.write_table(table, tmp_path / f"{name}.parquet")
        assert index(f"{tmp_path}/*.parquet", workers=1).samples == "ab".index(name) + 1
        assert index(f"{tmp_path}/*.parquet", workers=1).reused == "ab".index(name) + 1
    for where in (tmp_path, f"{tmp_path}/*.parquet"):
        assert Corpus.open(str(where), 10).samples == 2
    shutil.copy(tmp_path / "a.parquet", tmp_path / "c.parquet")
    with pytest.raises(UserError, match=r"c\.parquet is not in corpus\.parquet"):
        Corpus.open(str(tmp_path), 10)


def test_out_may_be_the_folder_of_the_shards_by_another_name(shards, monkeypatch):
    monkeypatch.chdir(shards.parent)
    index("shards", shards, workers=1)
    assert sorted(file.name for file in shards.glob("*.arrow"))[0] == "000000.arrow"
    for where in ("shards", "./shards/", str(shards), "shards/*.tar"):
        assert Corpus.open(where, 10).samples == 24


def test_an_image_that_is_gone_is_skipped(images_folder, tmp_path):
    copy = shutil.copytree(images_folder, tmp_path / "images")
    index(str(copy), tmp_path / "index", workers=1)
    corpus = Corpus.open(str(tmp_path / "index"), 10)
    os.unlink(copy / "daisy" / "00.jpeg")
    assert [one.reason for one in corpus.read(0)][:2] == ["unreadable", None]


def test_duplicates_are_excluded_once_asked_for(shards, encoded):
    """The first stays; and it is taken back when it is asked for no more."""
    twin = encoded(50, 40, 7)
    write_tar(shards / "1.tar", [("a.jpg", twin), ("b.jpg", encoded(50, 40, 8)), ("c.jpg", twin)])
    write_tar(shards / "2.tar", [("a.jpg", twin), ("bad.jpg", b"hello")])
    assert index(str(shards), workers=1).excluded == {"format": 1}
    report = index(str(shards), dedup=True, workers=1)
    assert report.excluded == {"format": 1, "duplicate": 2} and report.reused == 5
    corpus = Corpus.open(f"{shards}/[12].tar", 100)
    assert [one.reason for one in corpus.read(0)] == [None, None, "duplicate"]
    assert [one.reason for one in corpus.read(1)] == ["duplicate", "format"]
    assert corpus.excluded == 3
    assert (shards / "excluded.csv").read_text().splitlines() == [
        "shard,position,key,reason",
        "1.tar,2,c,duplicate",
        "2.tar,0,a,duplicate",
        "2.tar,1,bad,format",
    ]
    assert index(str(shards), workers=1).excluded == {"format": 1}
    assert Corpus.open(f"{shards}/[12].tar", 100).excluded == 1


def test_bad_shards_stop_it_or_are_left_out(shards):
    (shards / "3.tar").write_bytes(b"<html>not found</html>")
    write_tar(shards / "4.tar", [])
    message = r"3\.tar: not a tar file.*2 shards have failed.*--skip-bad-shards"
    with pytest.raises(UserError, match=message):
        index(str(shards), workers=1)
    assert not (shards / MANIFEST).exists()
    report = index(str(shards), skip_bad_shards=True, workers=1)
    assert (report.shards, report.reused, len(report.left_out)) == (3, 3, 2)
    assert "4.tar" in report.left_out[1]
    corpus = Corpus.open(str(shards), 10)
    assert corpus.samples == 24 and len(corpus.shards) == 5
    assert corpus.incomplete == (f"{shards}/3.tar is short 0/?", f"{shards}/4.tar is short 0/?")
    assert [len(corpus.labels(shard)) for shard in range(5)] == [10, 10, 4, 0, 0]
    assert sum(one is not None for one in images_of(corpus)) == 24


def test_shards_that_are_all_bad_are_an_error_all_the_same(tmp_path):
    write_tar(tmp_path / "0.tar", [])
    with pytest.raises(UserError, match=r"0\.tar"):
        index(str(tmp_path), skip_bad_shards=True, workers=1)


def test_a_place_without_shards_is_named(tmp_path):
    with pytest.raises(UserError, match=rf"shards: no .tar shards at {tmp_path}"):
        index(str(tmp_path))
    with pytest.raises(UserError, match=r"shards: pipe:cat x\.tar: only paths"):
        index("pipe:cat x.tar")


def test_img2dataset_s_output_is_a_corpus_as_it_is(tmp_path, encoded):
    """Its tars; their .parquet holds what is known of each image, not the image."""
    for shard in range(2):
        members = []
        for i in range(3):
            key = f"{shard:05d}{i:04d}"
            members += [
                (f"{key}.jpg", encoded(64, 48, 3 * shard + i)),
                (f"{key}.json", b'{"caption": "a cat"}'),
                (f"{key}.txt", b"a cat"),
            ]
        write_tar(tmp_path / f"{shard:05d}.tar", members)
        pq.write_table(pa.table({"url": ["http://x"] * 4}), tmp_path / f"{shard:05d}.parquet")
        (tmp_path / f"{shard:05d}_stats.json").write_text('{"count": 4, "successes": 3}')
    report = index(str(tmp_path), workers=1)
    assert (report.shards, report.samples, report.short, dict(report.notes)) == (2, 6, [], {})
    assert images_of(Corpus.open(str(tmp_path), 2))[4] == encoded(64, 48, 4)


@pytest.mark.ray
def test_ray_tasks_find_the_same(shards, tmp_path, local_ray):
    (shards / "3.tar").write_bytes(b"no tar")
    with pytest.raises(UserError, match=r"3\.tar: not a tar"):
        index(str(shards), tmp_path / "a", workers=2)
    report = index(str(shards), tmp_path / "a", skip_bad_shards=True, workers=2)
    index(str(shards), tmp_path / "b", skip_bad_shards=True, workers=1)
    assert report.reused == 3
    a, b = (Corpus.open(str(tmp_path / name), 4) for name in "ab")
    assert a.fingerprint == b.fingerprint and images_of(a) == images_of(b)
