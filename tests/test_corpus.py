"""engine.data.corpus: opening indexed shards, and reading their blocks."""

import io
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from tiny import spoil

from engine.config import UserError
from engine.data.corpus import MANIFEST, Corpus


@pytest.fixture
def copy(corpus_folder: Path, tmp_path: Path) -> Path:
    """A corpus of 10, 10 and 4 samples that may be spoilt."""
    return Path(shutil.copytree(corpus_folder, tmp_path / "corpus"))


def complaint(where: Path | str, field: str = "corpus.shards") -> str:
    with pytest.raises(UserError) as error:
        Corpus.open(str(where), 4, field)
    assert str(error.value).startswith(field)
    return str(error.value)


def test_blocks_are_cut_within_shards(corpus_folder):
    corpus = Corpus.open(str(corpus_folder), 4)
    assert corpus.blocks.tolist() == [
        [0, 0, 4], [0, 4, 4], [0, 8, 2], [1, 0, 4], [1, 4, 4], [1, 8, 2], [2, 0, 4]
    ]  # fmt: skip
    assert corpus.samples == 24 and corpus.counts.tolist() == [4, 4, 2, 4, 4, 2, 4]
    assert Corpus.open(str(corpus_folder), 10).counts.tolist() == [10, 10, 4]


@pytest.mark.parametrize("block_samples", [1, 3, 10, 512])
def test_blocks_hold_every_sample_once_as_it_was_stored(
    corpus_folder, images_folder, block_samples: int
):
    corpus = Corpus.open(str(corpus_folder), block_samples)
    samples = [one for block in range(len(corpus.blocks)) for one in corpus.read(block)]
    places = [(shard, i) for shard, count in enumerate((10, 10, 4)) for i in range(count)]
    assert [(one.shard, one.position) for one in samples] == places
    for label, folder in enumerate(("daisy", "oak_tree", "tulip")):
        stored = sorted(bytes(one.data) for one in samples if one.label == label)
        assert stored == sorted(file.read_bytes() for file in (images_folder / folder).iterdir())
    assert corpus.largest_label == 2


def test_a_glob_takes_what_it_matches_in_order(corpus_folder):
    one = Corpus.open(f"{corpus_folder}/000001*.tar", 512)
    assert one.samples == 10 and one.shards == (f"{corpus_folder}/000001.tar",)
    every = Corpus.open(f"{corpus_folder}/*.tar", 512)
    assert every.shards == Corpus.open(str(corpus_folder), 512).shards
    assert list(every.shards) == sorted(every.shards)
    assert [s.data for s in one.read(0)] == [s.data for s in every.read(1)]


@pytest.mark.parametrize("pattern", ["?00001.tar", "00000[12].tar", "000001.tar"])
def test_a_glob_without_a_star_takes_what_it_matches(copy, pattern: str):
    assert Corpus.open(f"{copy}/{pattern}", 512).samples < 24


def test_a_folder_may_have_brackets_in_its_name(copy):
    folder = copy.rename(copy.with_name("corpus [v1]"))
    assert Corpus.open(str(folder), 512).samples == 24


def test_the_fingerprint_is_of_the_contents(copy, corpus_folder, index):
    assert Corpus.open(str(copy), 4).fingerprint == Corpus.open(str(corpus_folder), 9).fingerprint
    shard = copy / "000001.tar"
    data = bytearray(shard.read_bytes())
    data[-3000] ^= 1
    shard.write_bytes(data)
    index(copy)
    assert Corpus.open(str(copy), 4).fingerprint != Corpus.open(str(corpus_folder), 4).fingerprint


def test_a_place_without_shards_is_named(tmp_path):
    assert f"no .tar shards at {tmp_path}" in complaint(tmp_path)
    assert "corpus.evaluation: no .tar" in complaint(tmp_path / "none", "corpus.evaluation")
    assert "is not set" in complaint("")


@pytest.mark.parametrize("where", ["s3://bucket/x", "pipe:cat x.tar", "https://host/{0..9}.tar"])
def test_other_schemes_are_refused(where: str):
    assert f"{where}: only local" in complaint(where)


def test_a_packed_tar_is_refused(copy):
    (copy / "000003.tar.gz").touch()
    assert "000003.tar.gz is not a plain .tar" in complaint(f"{copy}/*.tar*")
    assert Corpus.open(str(copy), 4).samples == 24


def test_shards_of_two_folders_are_refused(copy):
    shutil.copytree(copy, copy.with_name("other"))
    assert "several folders" in complaint(copy.parent / "*" / "*.tar")


def test_a_missing_manifest_or_index_is_named(copy):
    (copy / "000001.idx").unlink()
    assert f"{copy}/000001.tar has no .idx" in complaint(copy)
    (copy / MANIFEST).unlink()
    assert f"{copy / MANIFEST} is missing; run `promptkd index" in complaint(copy)
    (copy / MANIFEST).write_bytes(b"not parquet")
    assert f"{copy / MANIFEST} is not a corpus manifest" in complaint(copy)


def test_a_missing_shard_is_named_unless_a_glob_leaves_it_out(copy):
    (copy / "000002.tar").unlink()
    assert f"{copy}/000002.tar is in {MANIFEST} but missing" in complaint(copy)
    assert Corpus.open(f"{copy}/*.tar", 4).samples == 20


def test_a_shard_that_is_new_or_changed_is_named(copy):
    shutil.copy(copy / "000000.tar", copy / "000003.tar")
    assert f"{copy}/000003.tar is not in {MANIFEST}" in complaint(copy)
    (copy / "000003.tar").unlink()
    size = (copy / "000001.tar").stat().st_size
    with open(copy / "000001.tar", "ab") as shard:
        shard.write(b"\0")
    message = complaint(copy)
    assert f"{copy}/000001.tar has {size + 1} bytes, its manifest says {size}" in message


def test_an_index_of_another_version_is_named(copy):
    file = copy / "000000.idx"
    file.write_text(file.read_text().replace("v1.2", "v1.1", 1))
    with pytest.raises(UserError, match=rf"{file}: not a v1\.2 index"):
        Corpus.open(str(copy), 4).read(0)


def test_an_index_that_is_too_short_is_named(copy):
    file = copy / "000000.idx"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:5]))
    with pytest.raises(UserError, match=str(file)):
        Corpus.open(str(copy), 4).read(1)


def test_an_index_made_anew_is_read_anew(copy, index, encoded):
    """Within one process, as the quickstart does."""
    corpus = Corpus.open(str(copy), 4)
    before = [bytes(one.data) for one in corpus.read(0)]
    shutil.copy(copy / "000001.tar", copy / "000000.tar")
    index(copy)
    after = Corpus.open(str(copy), 4).read(0)
    assert [bytes(one.data) for one in after] != before
    assert [one.data for one in after] == [one.data for one in Corpus.open(str(copy), 4).read(3)]


def test_a_corpus_without_a_usable_image_is_named(tmp_path, index):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        info = tarfile.TarInfo("a.jpg")
        info.size = 5
        tar.addfile(info, io.BytesIO(b"hello"))
    index(tmp_path)
    assert "holds no usable image" in complaint(tmp_path)


def test_excluded_samples_keep_their_place(copy, index):
    """A sample spoilt in place is excluded, and its neighbours stay as they were."""
    corpus = Corpus.open(str(copy), 4)
    before = corpus.read(4)
    data = bytearray((copy / "000001.tar").read_bytes())
    at = data.index(bytes(before[1].data))
    data[at : at + 4] = b"oops"
    (copy / "000001.tar").write_bytes(data)
    index(copy)
    after = Corpus.open(str(copy), 4).read(4)
    assert [one.reason for one in after] == [None, "format", None, None]
    assert after[1].data is None and after[1].label == before[1].label
    assert [after[i].data for i in (0, 2, 3)] == [before[i].data for i in (0, 2, 3)]
    assert np.array_equal(Corpus.open(str(copy), 4).blocks, corpus.blocks)


def test_picked_samples_are_those_of_the_blocks(corpus_folder):
    corpus = Corpus.open(str(corpus_folder), 4)
    every = [one for block in range(len(corpus.blocks)) for one in corpus.read(block)]
    for shard, positions in ((0, [7, 0, 3]), (1, [9]), (2, [])):
        wanted = [one for i in positions for one in every if (one[0], one[1]) == (shard, i)]
        assert corpus.pick(shard, positions) == wanted


def test_labels_are_those_of_the_samples(corpus_folder):
    corpus = Corpus.open(str(corpus_folder), 4)
    every = [one for block in range(len(corpus.blocks)) for one in corpus.read(block)]
    for shard in range(3):
        wanted = [one.label for one in every if one.shard == shard]
        assert corpus.labels(shard).dtype == np.int64
        assert corpus.labels(shard).tolist() == wanted and None not in wanted


def test_a_sample_that_is_excluded_or_unlabelled_has_no_label(copy, index, images_folder):
    spoil(copy / "000000.tar", 2)
    with tarfile.open(copy / "000003.tar", "w") as tar:
        for name in ("a", "b"):
            tar.add(next(images_folder.rglob("*.jpeg")), f"{name}.jpg")
        label = tarfile.TarInfo("b.cls")
        label.size = 2
        tar.addfile(label, io.BytesIO(b"7\n"))
    index(copy)
    corpus = Corpus.open(str(copy), 4)
    assert corpus.labels(0)[:2].tolist() == [-1, -1] and (corpus.labels(0)[2:] >= 0).all()
    assert corpus.labels(3).tolist() == [-1, 7] and corpus.largest_label == 7
    assert [one.reason for one in corpus.pick(0, [1, 2])] == ["format", None]


def test_a_shard_that_changed_under_its_index_is_named(copy):
    corpus = Corpus.open(str(copy), 4)
    shard = copy / "000001.tar"
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(UserError, match=rf"^{shard} has changed since it was indexed"):
        corpus.labels(1)
