"""engine.data.index: what one pass over a shard finds, and that others understand it."""

import io
import json
import os
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tars import write_tar

from engine.config import UserError
from engine.data import header, parquet
from engine.data import index as index_module
from engine.data.corpus import Corpus
from engine.data.index import BESIDE, Indexed, index_shard
from engine.data.manifest import MANIFEST, VERSION, ShardIndex
from engine.data.places import Shard, find_shards
from engine.storage.ranges import Access, Storage


def indexed(path: Path, image: str = "") -> ShardIndex:
    return index_of(path, image).ours


def index_of(path: Path, image: str = "") -> Indexed:
    return index_shard(Shard(str(path), path.suffix[1:]), Storage(Access()), image)


def reasons(found: ShardIndex) -> dict[int, str]:
    return {position: reason for position, _, reason in found.excluded()}


def member(path: Path, name: str) -> tarfile.TarInfo:
    with tarfile.open(path) as tar:
        return tar.getmember(name)


def six(encoded, path: Path, number: int = 6) -> Path:
    return write_tar(path, [(f"{i}.jpg", encoded(30, 20, i)) for i in range(number)])


def test_the_index_is_wds2idx_s(corpus_folder, encoded, tmp_path, index):
    """On our shards, and on one with folders, long and accented names, and other members."""
    from wds2idx import IndexCreator

    members = [(f"a/b.c/{'n' * 120}.jpg", encoded(30, 20)), (f"a/b.c/{'n' * 120}.json", b"{}")]
    members += [("é/1.cls", b"3"), ("é/1.seg.PNG", encoded(30, 20, kind="png")), ("z.txt", b"")]
    foreign = write_tar(tmp_path / "foreign" / "0.tar", members)
    index(foreign.parent)
    for shard in [*corpus_folder.glob("*.tar"), foreign]:
        with IndexCreator(str(shard), str(tmp_path / "its.idx"), verbose=False) as creator:
            creator.create_index()
        assert (tmp_path / "its.idx").read_text() == shard.with_suffix(".idx").read_text()


def test_dali_reads_shards_by_our_index(corpus_folder):
    from nvidia.dali import fn, pipeline_def

    shard = str(corpus_folder / "000001.tar")

    @pipeline_def(batch_size=10, num_threads=1, device_id=None)
    def pipeline():
        images, labels = fn.readers.webdataset(
            paths=[shard],
            index_paths=[shard.replace(".tar", ".idx")],
            ext=["jpg;png;webp", "cls"],
            missing_component_behavior="error",
        )
        return images, labels

    images, labels = pipeline().run()
    ours = Corpus.open(str(corpus_folder), 10).read(1)
    assert [images.at(i).tobytes() for i in range(10)] == [bytes(one.data) for one in ours]
    assert [int(labels.at(i).tobytes()) for i in range(10)] == [one.label for one in ours]


def test_exclusions_have_reasons(encoded, tmp_path, index, monkeypatch):
    monkeypatch.setattr(header, "MAX_PIXELS", 30 * 20)
    good = encoded(30, 20)
    shard = write_tar(
        tmp_path / "0.tar",
        [
            ("0.jpg", b"hello"),
            ("1.jpg", good),
            ("2.jpg", good[:20]),
            ("3.jpg", b""),
            ("4.txt", b"a caption"),
            ("5.jpg", encoded(31, 20)),
            ("6.gif", encoded(30, 20, kind="gif")),
            ("7.jpg", encoded(30, 20, kind="gif")),
            ("8.jpg", encoded(30, 20, kind="png")),
        ],
    )
    found = indexed(shard)
    expected = {0: "format", 2: "header", 3: "empty", 4: "no_image", 5: "too_large"}
    expected |= {6: "no_image", 7: "format"}
    assert reasons(found) == expected and found.samples == 9
    assert not found.facts.short and found.facts.bytes == shard.stat().st_size
    assert found.facts.notes == {"images named as another format": 1}
    samples = Corpus.open(str(index(tmp_path)), 100).read(0)
    assert {i: one.reason for i, one in enumerate(samples) if one.reason} == expected
    assert [one.data is None for one in samples] == [one.reason is not None for one in samples]


def test_of_two_images_the_first_is_judged_and_read(encoded, tmp_path, index):
    good, bad = encoded(30, 20, kind="png"), b"hello"
    both = [("0.jpg", bad), ("0.png", good), ("1.png", good), ("1.jpg", bad)]
    write_tar(tmp_path / "0.tar", both)
    samples = Corpus.open(str(index(tmp_path)), 100).read(0)
    assert [one.reason for one in samples] == ["format", None]
    assert bytes(samples[1].data) == good


def test_a_shard_that_lost_its_tail_keeps_and_counts_what_it_can(encoded, tmp_path, index):
    """Cut in the body of sample 3: three usable, one truncated, and no end mark."""
    shard = six(encoded, tmp_path / "0.tar")
    whole, row = shard.read_bytes(), member(shard, "3.jpg")
    for cut in (row.offset_data, row.offset_data + 100, row.offset_data + row.size - 1):
        shard.write_bytes(whole[:cut])
        found = indexed(shard)
        assert reasons(found) == {3: "truncated"} and found.samples == 4
        assert found.facts.short == "3/?"
        samples = Corpus.open(str(index(tmp_path)), 2).read(1)
        assert [one.reason for one in samples] == [None, "truncated"]
    shard.write_bytes(whole[: row.offset_data - 512])  # between two samples
    found = indexed(shard)
    assert found.samples == 3 and not reasons(found) and found.facts.short == "3/?"


def test_an_index_that_was_there_tells_how_many_are_missing(encoded, tmp_path, index):
    """Also once the corpus is indexed again, and where the tar is cut before its end mark."""
    shard = six(encoded, tmp_path / "0.tar")
    index(tmp_path)
    whole = shard.read_bytes()
    shard.write_bytes(whole[: member(shard, "4.jpg").offset])
    for _ in range(2):
        index(tmp_path)
        assert Corpus.open(str(tmp_path), 10).incomplete == (f"{shard} is short 4/6",)
    six(encoded, shard, 5)  # with an end mark
    found = indexed(shard)
    assert found.facts.short == "5/6" and not found.facts.notes
    six(encoded, shard, 7)
    found = indexed(shard)
    assert found.facts.notes == {"another index there did not fit": 1} and not found.facts.short
    shard.write_bytes(whole.rstrip(b"\0") + bytes(-len(whole.rstrip(b"\0")) % 512))
    found = indexed(shard)
    assert found.facts.notes == {"no end mark": 1} and not found.facts.short


def test_what_lies_behind_zeros_is_indexed(encoded, tmp_path, index):
    """A hole, and two tars put together."""
    shard = six(encoded, tmp_path / "0.tar")
    index(tmp_path)
    data = bytearray(shard.read_bytes())
    start, end = member(shard, "2.jpg").offset, member(shard, "3.jpg").offset + 512
    data[start:end] = bytes(end - start)
    shard.write_bytes(data)
    found = indexed(shard)
    assert found.table["key"].to_pylist() == ["0", "1", "4", "5"]
    assert found.facts.short == "4/6" and found.facts.notes == {"damaged places": 1}
    joined = tmp_path / "1.tar"
    joined.write_bytes(2 * six(encoded, joined).read_bytes())
    found = indexed(joined)
    assert found.samples == 12 and found.facts.notes["damaged places"] == 1
    assert found.facts.short == "12/?"


def test_what_img2dataset_counted_tells_how_many_are_missing(encoded, tmp_path):
    shard = six(encoded, tmp_path / "00000.tar")
    (tmp_path / "00000_stats.json").write_text(json.dumps({"count": 10, "successes": 6}))
    assert not indexed(shard).facts.short and not indexed(shard).facts.notes
    shard.write_bytes(shard.read_bytes()[: member(shard, "2.jpg").offset])
    assert indexed(shard).facts.short == "2/6"


def test_a_shard_cut_inside_a_label_can_be_read(encoded, tmp_path, index):
    sample = (("cls", b"1"), ("jpg", encoded(9, 9)))
    members = [(f"{i}.{suffix}", data) for i in range(3) for suffix, data in sample]
    shard = write_tar(tmp_path / "0.tar", members)
    shard.write_bytes(shard.read_bytes()[: member(shard, "2.cls").offset_data])
    samples = Corpus.open(str(index(tmp_path)), 10).read(0)
    assert [one.reason for one in samples] == [None, None, "truncated"]


def test_a_broken_member_header_is_noticed(encoded, tmp_path):
    """And costs its own sample, not those behind it."""
    shard = six(encoded, tmp_path / "0.tar")
    data = bytearray(shard.read_bytes())
    data[member(shard, "3.jpg").offset] ^= 1  # its checksum does not fit any more
    shard.write_bytes(data)
    found = indexed(shard)
    assert found.table["key"].to_pylist() == ["0", "1", "2", "4", "5"] and not reasons(found)
    assert found.facts.short == "5/?" and found.facts.notes == {"damaged places": 1}


def test_a_blank_behind_the_first_dot_does_not_break_the_index(encoded, tmp_path, index):
    write_tar(tmp_path / "0.tar", [("photo.v2 final.jpg", encoded(9, 9)), ("b.jpg", encoded(9, 9))])
    samples = Corpus.open(str(index(tmp_path)), 10).read(0)
    assert [bytes(one.data) for one in samples] == [encoded(9, 9)] * 2


@pytest.mark.parametrize("data", [b"hello" * 1000, b""])
def test_what_is_no_tar_is_named(tmp_path, data: bytes):
    (tmp_path / "0.tar").write_bytes(data)
    with pytest.raises(UserError, match=rf"{tmp_path}/0\.tar: not a tar file"):
        indexed(tmp_path / "0.tar")


def test_a_shard_without_samples_is_named(tmp_path):
    write_tar(tmp_path / "0.tar", [("README", b"no suffix, no sample")])
    with pytest.raises(UserError, match=rf"{tmp_path}/0\.tar: .*holds no samples"):
        indexed(tmp_path / "0.tar")


@pytest.mark.parametrize("label", [b"daisy", b"-1", b"", b"1.5"])
def test_a_label_that_is_no_number_is_noted(encoded, tmp_path, label: bytes):
    good = [("b.cls", b"7\n"), ("b.jpg", encoded(9, 9))]
    shard = write_tar(tmp_path / "0.tar", [("a.cls", label), ("a.jpg", encoded(9, 9)), *good])
    found = indexed(shard)
    assert found.column("label").tolist() == [-1, 7] and not reasons(found)
    assert found.facts.notes == {"labels that are no whole numbers": 1}


def test_names_that_are_not_unicode_are_spelled_out(encoded, tmp_path, index):
    image = encoded(9, 9)
    folder = tmp_path / "shards"
    folder.mkdir()
    with tarfile.open(folder / "0.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        for name in ("caf\xe9.jpg", "b\xe9.cls"):
            info = tarfile.TarInfo(name)
            info.size = len(image)
            tar.addfile(info, io.BytesIO(image))
    shard = folder / "0.tar"
    cut = 512 + -(-len(image) // 512) * 512 + 512 + 100  # in the second
    shard.write_bytes(shard.read_bytes()[:cut])
    samples = Corpus.open(str(index(folder)), 10).read(0)
    assert [one.key for one in samples] == ["caf\\xe9", "b\\xe9"]
    assert bytes(samples[0].data) == image and samples[1].reason == "truncated"


def files_of(folder: Path) -> ShardIndex:
    shards = find_shards(str(folder), Storage(Access()), "shards")
    return index_shard(shards[0], Storage(Access())).ours


def test_a_file_whose_name_is_not_unicode_is_refused(encoded, tmp_path):
    strange = os.fsencode(tmp_path) + b"/caf\xe9.jpg"
    Path(os.fsdecode(strange)).write_bytes(encoded(9, 9))
    (tmp_path / "good.jpg").write_bytes(encoded(9, 9))
    found = files_of(tmp_path)
    assert dict(zip(found.table["key"].to_pylist(), found.all_reasons(), strict=True)) == {
        "caf\\xe9.jpg": "unreadable",
        "good.jpg": None,
    }


def test_a_file_that_is_too_large_is_not_read(encoded, tmp_path):
    """A hole of a terabyte, which no memory holds."""
    (tmp_path / "a.jpg").write_bytes(encoded(9, 9))
    with open(tmp_path / "b.jpg", "wb") as file:
        file.truncate(1 << 40)
    assert reasons(files_of(tmp_path)) == {1: "too_large"}


def test_members_apart_from_their_sample_find_it(encoded, tmp_path):
    """All images first, then all labels; and a key that comes back with another image."""
    images = [(f"{i}.jpg", encoded(30, 20, i)) for i in range(3)]
    labels = [(f"{i}.cls", str(i).encode()) for i in range(3)]
    found = indexed(write_tar(tmp_path / "0.tar", [*images, *labels]))
    assert found.column("label").tolist() == [0, 1, 2] and not reasons(found)
    assert found.facts.notes == {"members apart from their sample": 3}
    again = ("0.jpg", encoded(30, 20, 9))
    found = indexed(write_tar(tmp_path / "1.tar", [*images, again]))
    assert found.table["key"].to_pylist() == ["0", "1", "2", "0"] and not reasons(found)


def test_the_image_that_is_asked_for_is_taken(encoded, tmp_path):
    left, right = encoded(30, 20, 1), encoded(40, 20, 2)
    shard = write_tar(tmp_path / "0.tar", [("a.left.jpg", left), ("a.right.jpg", right)])
    first, other = indexed(shard), indexed(shard, "right.jpg")
    assert first.column("width").tolist() == [30] and other.column("width").tolist() == [40]
    assert first.facts.notes == {BESIDE: 1}
    assert reasons(indexed(shard, "top.jpg")) == {0: "no_image"}


def test_what_is_no_file_is_refused_and_counted(encoded, tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, kind in (("a.jpg", tarfile.SYMTYPE), ("b.jpg", tarfile.CHRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    with pytest.raises(UserError, match="holds no samples"):
        indexed(tmp_path / "0.tar")
    shard = write_tar(tmp_path / "1.tar", [("../../up.jpg", encoded(30, 20))])
    assert indexed(shard).table["key"].to_pylist() == ["../../up"]  # a name, and nothing else


def test_images_in_a_parquet_column(encoded, tmp_path, index):
    """As img2dataset stores them, and as Hugging Face does; a row that is no image, and none."""
    images = [encoded(30, 20, 1), b"hello", None, encoded(20, 40, 2, "png")]
    pq.write_table(
        pa.table({"jpg": images, "key": ["a", "b", "c", "d"], "cls": [3, None, 1, 0]}),
        tmp_path / "0.parquet",
        row_group_size=3,
    )
    found = indexed(tmp_path / "0.parquet")
    assert reasons(found) == {1: "format", 2: "no_image"}
    assert found.table["key"].to_pylist() == ["a", "b", "c", "d"]
    assert found.column("label").tolist() == [3, -1, 1, 0]
    structs = [image and {"bytes": image, "path": "x"} for image in images]
    pq.write_table(pa.table({"image": structs, "label": [0, 1, 2, 3]}), tmp_path / "1.parquet")
    corpus = Corpus.open(str(index(tmp_path)), 2)
    samples = [one for block in range(4) for one in corpus.read(block)]
    assert [one.data and bytes(one.data) for one in samples] == 2 * [
        images[0],
        None,
        None,
        images[3],
    ]
    assert [one.position for one in samples] == 2 * [0, 1, 2, 3]
    with pytest.raises(UserError, match="no column 'picture' of image bytes"):
        indexed(tmp_path / "0.parquet", "picture")


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("key", pa.array([b"ok", b"caf\xe9"], pa.binary()).view(pa.string())),
        ("label", pa.array([1, 2**63 + 1], pa.uint64())),
    ],
)
def test_a_parquet_row_that_cannot_be_read_is_named(encoded, tmp_path, column: str, values):
    images = pa.array([encoded(9, 9)] * 2, pa.binary())
    pq.write_table(pa.table({"jpg": images, column: values}), tmp_path / "0.parquet")
    with pytest.raises(UserError, match=rf"{tmp_path}/0\.parquet: row 1 cannot be read"):
        indexed(tmp_path / "0.parquet")


def test_large_cells_are_refused_and_large_row_groups_noted(encoded, tmp_path, monkeypatch):
    images = [encoded(30, 20, i) for i in range(6)]
    pq.write_table(pa.table({"jpg": images}), tmp_path / "0.parquet", row_group_size=2)
    assert not indexed(tmp_path / "0.parquet").facts.notes
    monkeypatch.setattr(parquet, "LARGE_GROUP_BYTES", 100)
    monkeypatch.setattr(index_module, "MAX_MEMBER_BYTES", max(map(len, images)) - 1)
    found = indexed(tmp_path / "0.parquet")
    assert found.facts.notes == {"row groups of more than 64 MB": 3}
    longest = [i for i, image in enumerate(images) if len(image) == max(map(len, images))]
    assert reasons(found) == dict.fromkeys(longest, "too_large")


def test_a_damaged_parquet_page_is_named(encoded, tmp_path):
    images = [encoded(30, 20, i) for i in range(6)]
    pq.write_table(pa.table({"jpg": images}), tmp_path / "0.parquet", use_dictionary=False)
    data = bytearray((tmp_path / "0.parquet").read_bytes())
    data[4:40] = bytes(byte ^ 0x5A for byte in data[4:40])
    (tmp_path / "0.parquet").write_bytes(data)
    with pytest.raises(UserError, match=rf"{tmp_path}/0\.parquet: row 0 cannot be read"):
        indexed(tmp_path / "0.parquet")


def test_an_index_is_the_same_when_it_is_read_again(corpus_folder):
    found = indexed(corpus_folder / "000001.tar")
    again = ShardIndex.read(found.bytes(), "here")
    assert again.table.equals(found.table) and again.facts == found.facts
    assert np.array_equal(again.column("digest"), found.column("digest"))
    for spoilt in (b"", b"ARROW1", found.bytes()[:-100]):
        with pytest.raises(UserError, match="here: not a shard's index"):
            ShardIndex.read(spoilt, "here")


FLIPS = """
import random, sys
from pathlib import Path
from engine.config import UserError
from engine.data.manifest import ShardIndex, read_manifest

path = Path(sys.argv[1])

def read():
    if path.suffix == ".parquet":
        return read_manifest(path.read_bytes(), str(path), "corpus.shards").to_pylist()
    found = ShardIndex.load(path)
    entries = found.entries(0, found.samples)
    assert all(one.header.width >= 0 and one.offset >= 0 for one in entries)
    return [found.row("", ""), vars(found.facts).copy(), *found.table.to_pylist()]

def shape(rows):
    return [{name: type(value) for name, value in row.items() if name != "reason"} for row in rows]

whole, wanted, dice, told = path.read_bytes(), read(), random.Random(0), [0, 0, 0]
for _ in range(300):
    data = bytearray(whole)
    data[dice.randrange(len(data))] ^= dice.randrange(1, 256)
    path.write_bytes(data)
    try:
        found = read()
    except UserError as error:
        assert str(path) in str(error)
        told[2] += 1
        continue
    assert found == wanted or path.suffix == ".arrow" and shape(found) == shape(wanted), found
    told[found != wanted] += 1
print(*told)
"""


@pytest.mark.parametrize("name", ["0.arrow", MANIFEST])
def test_damaged_bytes_of_an_index_do_no_harm(encoded, tmp_path, index, name: str):
    """In a process of their own, which a bus error would end. All is told by UserError, or reads as
    it was; of an index, which is mapped, some values may differ, which the manifest tells."""
    members = [(f"{i}.jpg", encoded(30, 20, i) if i != 7 else b"oops") for i in range(50)]
    write_tar(tmp_path / "0.tar", members)
    index(tmp_path)
    command = [sys.executable, "-c", FLIPS, str(tmp_path / name)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    equal, other, refused = map(int, done.stdout.split())
    assert equal + other + refused == 300 and equal and refused
    assert (other > 0) == (name == "0.arrow")


def test_a_manifest_of_other_columns_is_named(tmp_path):
    told = {"promptkd": json.dumps({"version": VERSION})}
    for spoilt, metadata in (
        (pa.table({"shard": ["a.tar"]}), told),
        (pa.table({"shard": ["a.tar"]}), {"promptkd": "[2]"}),
        (pa.table({"shard": ["a.tar"]}), {}),
    ):
        pq.write_table(spoilt.replace_schema_metadata(metadata), tmp_path / MANIFEST)
        with pytest.raises(UserError, match=f"{MANIFEST} is not a corpus manifest"):
            Corpus.open(str(tmp_path), 4)


@pytest.mark.parametrize(
    ("column", "value"), [("kind", "zip"), ("samples", -1), ("usable", 7), ("largest_label", -2)]
)
def test_a_manifest_that_makes_no_sense_is_named(
    encoded, tmp_path, index, column: str, value: str | int
):
    six(encoded, tmp_path / "0.tar")
    index(tmp_path)
    table = pq.read_table(tmp_path / MANIFEST)
    at = table.schema.get_field_index(column)
    values = pa.array([value], table.schema.field(at).type)
    pq.write_table(table.set_column(at, table.schema.field(at), values), tmp_path / MANIFEST)
    with pytest.raises(UserError, match=rf"not a corpus manifest \({column}: "):
        Corpus.open(str(tmp_path), 4)


def test_an_index_that_cannot_be_is_named(encoded, tmp_path):
    found = indexed(six(encoded, tmp_path / "0.tar"))
    for name, value in (("offset", -1), ("width", -1), ("format", 3), ("bytes", None)):
        at, kind = found.table.schema.get_field_index(name), found.table.schema.field(name)
        spoilt = found.table.set_column(at, kind, pa.array([value] * 6, kind.type))
        with pytest.raises(UserError, match=rf"here: not a shard's index \({name}: "):
            ShardIndex.read(ShardIndex(found.facts, spoilt).bytes(), "here")
    for facts in ({"kind": "zip"}, {"bytes": "many"}, {"notes": []}):
        spoilt = ShardIndex(replace(found.facts, **facts), found.table)
        with pytest.raises(UserError, match="here: not a shard's index"):
            ShardIndex.read(spoilt.bytes(), "here")


def test_an_empty_index_is_named(tmp_path):
    (tmp_path / "0.arrow").touch()
    with pytest.raises(UserError, match=rf"{tmp_path}/0\.arrow: not a shard's index"):
        ShardIndex.load(tmp_path / "0.arrow")


def test_the_content_tells_what_is_excluded_and_why(encoded, tmp_path):
    found = indexed(six(encoded, tmp_path / "0.tar"))
    contents = {
        ShardIndex.read(one.bytes(), "").row("", "")["content"]
        for one in (found, found, found.with_duplicates([1]), found.with_duplicates([2]))
    }
    assert len(contents) == 3
