"""engine.data.corpus: opening indexed shards, and reading their blocks."""

import io
import shutil
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tars import write_tar
from tiny import spoil

from engine.config import UserError
from engine.data import corpus as corpus_module
from engine.data import parquet
from engine.data.corpus import Corpus
from engine.data.manifest import MANIFEST
from engine.index import index as index_into
from engine.storage.ranges import Access, Storage


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
    blocks = [corpus.blocks.at(block) for block in range(len(corpus.blocks))]
    assert blocks == [
        (0, 0, 4), (0, 4, 4), (0, 8, 2), (1, 0, 4), (1, 4, 4), (1, 8, 2), (2, 0, 4)
    ]  # fmt: skip
    assert corpus.samples == 24
    tens = Corpus.open(str(corpus_folder), 10).blocks
    assert [tens.at(block).length for block in range(len(tens))] == [10, 10, 4]


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
    image = Corpus.open(str(copy), 4).read(4)[1]
    data[data.index(bytes(image.data)) + len(image.data) // 2] ^= 1
    shard.write_bytes(data)
    index(copy)
    assert Corpus.open(str(copy), 4).fingerprint != Corpus.open(str(corpus_folder), 4).fingerprint


def test_a_place_without_shards_is_named(tmp_path):
    assert f"{tmp_path}/{MANIFEST} is missing; run `promptkd index" in complaint(tmp_path)
    assert "corpus.evaluation: no .tar" in complaint(tmp_path / "none", "corpus.evaluation")
    assert "is not set" in complaint("")


@pytest.mark.parametrize("where", ["pipe:cat x.tar", "ftp://host/0.tar", "file:x.tar"])
def test_other_schemes_are_refused(where: str):
    assert f"{where}: only paths and urls" in complaint(where)


def test_braces_stand_for_numbers_and_colons_join(copy, corpus_folder):
    numbers = Corpus.open(f"{copy}/{{000000..000002..2}}.tar", 4)
    assert numbers.shards == (f"{copy}/000000.tar", f"{copy}/000002.tar")
    both = Corpus.open(f"{corpus_folder}::{copy}/000002.tar", 4)
    assert both.samples == 28 and both.shards[3] == f"{copy}/000002.tar"
    assert [s.data for s in both.read(7)] == [s.data for s in both.read(6)]
    assert "000003.tar is not in" in complaint(f"{copy}/{{000000..000007}}.tar")
    assert "twice" in complaint(f"{copy}::{copy}/000001.tar")
    for many in ("{0..99999999}", "{-99999999..9}", "{0..9999}{0..9999}"):
        assert "more than 10,000,000" in complaint(f"{copy}/{many}.tar")
    few = "{000000..999999..999999}"
    assert f"{copy}/999999.tar is not in" in complaint(f"{copy}/{few}.tar")


def test_a_packed_tar_is_refused(copy):
    (copy / "000003.tar.gz").touch()
    assert "000003.tar.gz is not a plain .tar" in complaint(f"{copy}/*.tar*")
    assert Corpus.open(str(copy), 4).samples == 24


def test_shards_of_two_folders_are_one_corpus(copy):
    other = shutil.copytree(copy, copy.with_name("other"))
    every = Corpus.open(f"{copy.parent}/*/00000[12].tar", 4)
    assert every.shards == tuple(f"{f}/00000{n}.tar" for f in (copy, other) for n in (1, 2))
    assert Corpus.open(f"{copy.parent}/*", 4).samples == 48


def test_a_missing_manifest_or_index_is_named(copy):
    (copy / "000001.arrow").unlink()
    assert f"{copy}/000001.tar has no index {copy}/000001.arrow" in complaint(copy)
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


def test_an_index_that_does_not_fit_is_named(copy):
    """One cut short, one of another shard."""
    file, whole = copy / "000000.arrow", (copy / "000000.arrow").read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=rf"{file}: not a shard's index"):
        Corpus.open(str(copy), 4).read(0)
    shutil.copy(copy / "000001.arrow", file)
    with pytest.raises(UserError, match=rf"{file}: does not fit its manifest"):
        Corpus.open(str(copy), 4).read(0)


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
    assert Corpus.open(str(copy), 4).samples == corpus.samples


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


def test_images_that_changed_under_their_index_are_skipped(copy, capsys):
    """Some bytes of one image, at the same size: its neighbours are as they were."""
    corpus = Corpus.open(str(copy), 4)
    before = corpus.read(4)
    data = bytearray((copy / "000001.tar").read_bytes())
    data[data.index(bytes(before[1].data)) + 30] ^= 1
    (copy / "000001.tar").write_bytes(data)
    after = Corpus.open(str(copy), 4).read(4)
    assert [one.reason for one in after] == [None, "changed", None, None]
    assert after[1].data is None and after[2] == before[2]
    assert f"{copy}/000001.tar: has changed since" in capsys.readouterr().err


def test_a_shard_that_is_gone_or_grows_while_it_is_read_is_skipped(copy, capsys):
    corpus = Corpus.open(str(copy), 4)
    with open(copy / "000000.tar", "ab") as shard:
        shard.write(b"more")
    (copy / "000001.tar").unlink()
    assert [one.reason for one in corpus.read(0)] == ["changed"] * 4
    assert [one.reason for one in corpus.read(3) + corpus.read(4)] == ["unreadable"] * 8
    told = capsys.readouterr().err
    assert told.count("000000.tar: changed") == 1 and told.count("000001.tar: unreadable") == 1
    assert [one.reason for one in corpus.read(6)] == [None] * 4


@pytest.fixture
def storage(monkeypatch) -> Storage:
    """That of the corpora that are opened: it counts what is read."""
    one = Storage(Access())
    monkeypatch.setattr(corpus_module, "Storage", lambda _: one)
    return one


def in_parquet(path: Path, images: Sequence[bytes], group: int, **how) -> Path:
    how = {"compression": "none", "use_dictionary": False, "write_statistics": False, **how}
    pq.write_table(pa.table({"jpg": images}), path, row_group_size=group, **how)
    return path


def test_a_row_group_is_read_once_for_all_its_blocks(tmp_path, encoded, index, storage):
    images = [encoded(60, 40, i % 7) for i in range(120)]
    size = in_parquet(tmp_path / "0.parquet", images, 50).stat().st_size
    corpus = Corpus.open(str(index(tmp_path)), 10)
    before = storage.bytes_read
    samples = [one for block in range(len(corpus.blocks)) for one in corpus.read(block)]
    assert [bytes(one.data) for one in samples] == images
    assert storage.bytes_read - before < 1.5 * size


def test_of_row_groups_the_last_are_kept(tmp_path, encoded, index, storage, monkeypatch):
    """Not more than fit, but one; and picked samples of one group are read together."""
    monkeypatch.setattr(parquet, "KEPT_BYTES", 1)
    images = [encoded(60, 40, i % 7) for i in range(100)]
    size = in_parquet(tmp_path / "0.parquet", images, 50).stat().st_size
    corpus = Corpus.open(str(index(tmp_path)), 10)

    def read_by(read, *arguments) -> float:
        before = storage.bytes_read
        assert all(one.data == images[one.position] for one in read(*arguments))
        return (storage.bytes_read - before) / size

    read_by(corpus.read, 0)
    assert read_by(corpus.read, 1) == 0
    for block in (5, 0):
        assert 0.4 < read_by(corpus.read, block) < 0.6
    positions = [70, 3, 99, 4, 51]
    assert [one.position for one in corpus.pick(0, positions)] == positions
    assert read_by(corpus.pick, 0, positions) < 1.1


def test_threads_read_parquet_side_by_side(tmp_path, encoded, index, monkeypatch):
    images = [encoded(60, 40, i % 7) for i in range(90)]
    monkeypatch.setattr(parquet, "KEPT_BYTES", 2 * sum(map(len, images)) // 9)
    for number in range(3):
        in_parquet(tmp_path / f"{number}.parquet", images, 10, compression="snappy")
    corpus = Corpus.open(str(index(tmp_path)), 5)
    order = np.random.default_rng(0).permutation(4 * len(corpus.blocks)) % len(corpus.blocks)
    with ThreadPoolExecutor(8) as pool:
        for block in pool.map(corpus.read, order.tolist()):
            assert [bytes(one.data) for one in block] == [images[one.position] for one in block]


def of_size(path: Path, images: list[bytes], size: int, **how) -> None:
    """Such a parquet file of so many bytes: its last image is padded."""
    while missing := size - in_parquet(path, images, 100, **how).stat().st_size:
        images = [*images[:-1], (images[-1] + bytes(max(missing, 0)))[: len(images[-1]) + missing]]


@pytest.mark.parametrize("change", ["footer", "column", "page", "rows"])
def test_a_parquet_shard_that_changed_is_skipped(tmp_path, encoded, index, capsys, change: str):
    """At the same size."""
    images = [encoded(60, 40, i) for i in range(20)]
    shard = in_parquet(tmp_path / "0.parquet", images, 100)
    data = shard.read_bytes()
    corpus = Corpus.open(str(index(tmp_path)), 10)
    if change == "footer":
        shard.write_bytes(data[:-4] + b"XXXX")
    elif change == "column":
        head, _, tail = data.rpartition(b"ARROW:schema")
        shard.write_bytes(head.replace(b"jpg", b"jpx") + b"ARROW:schemb" + tail)
    elif change == "page":
        shard.write_bytes(data[:4] + bytes(byte ^ 0x5A for byte in data[4:40]) + data[40:])
    else:
        of_size(shard, images[:-1], len(data))
    assert [(one.reason, one.data) for one in corpus.read(1)] == [("changed", None)] * 10
    assert [one.reason for one in corpus.pick(0, [3, 1])] == ["changed"] * 2
    assert capsys.readouterr().err.count("0.parquet: changed, and skipped") == 1


def test_what_lies_between_two_images_is_not_read(tmp_path, encoded, index, storage):
    """Where it is much: a film."""
    images = [encoded(60, 40, i) for i in range(4)]
    film = bytes(3 << 20)
    write_tar(
        tmp_path / "0.tar",
        [
            ("0.jpg", images[0]),
            ("0.mp4", film),
            ("1.jpg", images[1]),
            ("1.txt", b"a caption"),
            ("2.jpg", images[2]),
            ("2.mp4", film),
            ("3.jpg", images[3]),
        ],
    )
    corpus = Corpus.open(str(index(tmp_path)), 10)
    before = storage.bytes_read
    assert [bytes(one.data) for one in corpus.read(0)] == images
    assert storage.bytes_read - before < 1 << 20


def test_only_the_first_shards_that_fail_are_announced(tmp_path, encoded, index, capsys):
    for number in range(8):
        write_tar(tmp_path / f"{number}.tar", [("0.jpg", encoded(30, 20))])
    corpus = Corpus.open(str(index(tmp_path)), 1)
    for shard in tmp_path.glob("*.tar"):
        shard.unlink()
    capsys.readouterr()
    with ThreadPoolExecutor(4) as pool:
        reasons = [one.reason for block in pool.map(corpus.read, [*range(8)] * 2) for one in block]
    assert reasons == ["unreadable"] * 16
    told = capsys.readouterr().err
    assert told.count(".tar: unreadable") == 5 and told.count("further shards") == 1


def test_a_file_that_cannot_be_read_is_announced(tmp_path, encoded, capsys):
    folder = tmp_path / "files"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.jpg").write_bytes(encoded(30, 20, number))
    index_into(str(folder), tmp_path / "index", workers=1)
    corpus = Corpus.open(str(tmp_path / "index"), 10)
    (folder / "1.jpg").unlink()
    assert [one.reason for one in corpus.read(0)] == [None, "unreadable", None]
    assert "1.jpg" in capsys.readouterr().err


def test_the_fingerprint_tells_what_is_excluded(copy):
    shutil.copy(copy / "000000.tar", copy / "000003.tar")
    index_into(str(copy), workers=1)
    plain = Corpus.open(str(copy), 4)
    index_into(str(copy), workers=1, dedup=True)
    without = Corpus.open(str(copy), 4)
    assert without.excluded == plain.excluded + 10
    assert without.fingerprint != plain.fingerprint
