"""engine.data.shards: from images to shards to an index that DALI understands."""

import io
import shutil
import tarfile
from collections.abc import Iterable
from pathlib import Path

import pytest

from engine.config import UserError
from engine.data import header
from engine.data.corpus import Corpus
from engine.data.shards import index_shard, write_shards


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def contents(shard: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(shard) as tar:
        return [(one.name, tar.extractfile(one).read()) for one in tar]  # type: ignore[union-attr]


def test_every_image_is_packed_once_with_its_label(images_folder, tmp_path):
    shards, names, left_out = write_shards(images_folder, tmp_path / "out", None, 10, False)
    assert [shard.name for shard in shards] == ["000000.tar", "000001.tar", "000002.tar"]
    assert names == ["daisy", "oak tree", "tulip"] and not left_out
    packed = [one for shard in shards for one in contents(shard)]
    assert len({name.partition(".")[0] for name, _ in packed}) == 24
    labels = {name[:-4]: int(data) for name, data in packed if name.endswith(".cls")}
    images = {name.partition(".")[0]: data for name, data in packed if not name.endswith(".cls")}
    for label, folder in enumerate(("daisy", "oak_tree", "tulip")):
        stored = sorted(data for key, data in images.items() if labels[key] == label)
        assert stored == sorted(file.read_bytes() for file in (images_folder / folder).iterdir())
    assert [label for label in labels.values()] != sorted(labels.values())  # they are shuffled


def test_shards_of_the_same_images_are_the_same_bytes(images_folder, corpus_folder, tmp_path):
    copy = shutil.copytree(images_folder, tmp_path / "copy", copy_function=shutil.copyfile)
    again, _, _ = write_shards(copy, tmp_path / "out", None, 10, False)
    for shard in again:
        assert shard.read_bytes() == (corpus_folder / shard.name).read_bytes()
    other, _, _ = write_shards(copy, tmp_path / "other", None, 10, False, seed=1)
    assert other[0].read_bytes() != again[0].read_bytes()


def test_class_names_set_the_labels(images_folder, tmp_path, index):
    names = ["tulip", "rose", "oak tree", "daisy"]
    _, told, _ = write_shards(images_folder, tmp_path, names, 100, False)
    assert told == names
    corpus = Corpus.open(str(index(tmp_path)), 100)
    assert {one.label for one in corpus.read(0)} == {0, 2, 3}
    assert corpus.largest_label == 3


def test_a_folder_that_is_no_class_is_named(images_folder, tmp_path):
    with pytest.raises(UserError, match=r"classes: .*tulip is not among the 2 class names"):
        write_shards(images_folder, tmp_path, ["daisy", "oak tree"], 100, False)


def test_images_without_folders_have_no_label(encoded, tmp_path, index):
    (tmp_path / "images" / ".hidden").mkdir(parents=True)
    for number in range(3):
        (tmp_path / "images" / f"{number}.jpg").write_bytes(encoded(30, 20, number))
    (tmp_path / "images" / ".hidden" / "x.txt").write_text("not seen")
    shards, names, _ = write_shards(tmp_path / "images", tmp_path / "out", None, 2, False)
    assert len(shards) == 2 and names == []
    corpus = Corpus.open(str(index(tmp_path / "out")), 2)
    assert [one.label for block in range(2) for one in corpus.read(block)] == [None] * 3
    assert corpus.largest_label == -1


def test_keys_hold_one_sample_whatever_files_are_called(encoded, tmp_path, index):
    """Dots, blanks and equal names must not split or merge samples."""
    names = ["a.b.c.jpg", "a.jpg", "a.png", "ä b.jpg", "x" * 200 + ".jpg", "100%06d.jpg", "JPG"]
    for number, name in enumerate(names):
        file = tmp_path / "im 100%d" / "k" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(30, 20, number))
    out = tmp_path / "out 50%"
    write_shards(tmp_path / "im 100%d", out, None, 100, False)
    samples = Corpus.open(str(index(out)), 100).read(0)
    assert len({bytes(one.data) for one in samples}) == len(names)
    assert all(one.reason is None and one.label == 0 for one in samples)


@pytest.mark.parametrize(("data", "why"), [(b"hello", "format"), (b"", "empty")])
def test_a_file_that_is_no_image_is_named_or_counted(encoded, tmp_path, data: bytes, why: str):
    images = tmp_path / "images"
    images.mkdir()
    (images / "good.jpg").write_bytes(encoded(30, 20))
    (images / "bad.jpg").write_bytes(data)
    with pytest.raises(UserError, match=rf"images: {images}/bad\.jpg .*\({why}\)"):
        write_shards(images, tmp_path / "out", None, 10, False)
    shards, _, left_out = write_shards(images, tmp_path / "other", None, 10, True)
    assert left_out == {why: 1} and len(contents(shards[0])) == 1


def test_folders_that_cannot_serve_are_named(images_folder, corpus_folder, tmp_path):
    with pytest.raises(UserError, match=r"images: .*none is not a folder"):
        write_shards(tmp_path / "none", tmp_path / "out", None, 10, False)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"images: .*empty holds no files"):
        write_shards(tmp_path / "empty", tmp_path / "out", None, 10, False)
    with pytest.raises(UserError, match=r"out: .* already holds shards"):
        write_shards(images_folder, corpus_folder, None, 10, False)


def test_a_second_try_works_once_the_bad_file_is_gone(encoded, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    (images / "good.jpg").write_bytes(encoded(30, 20))
    (images / "bad.jpg").write_bytes(b"hello")
    with pytest.raises(UserError):
        write_shards(images, tmp_path / "out", None, 10, False)
    (images / "bad.jpg").unlink()
    assert len(write_shards(images, tmp_path / "out", None, 10, False)[0]) == 1


def test_folders_of_one_class_name_are_refused(encoded, tmp_path):
    for name in ("a_b", "a b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "1.jpg").write_bytes(encoded(30, 20))
    with pytest.raises(UserError, match="a b"):
        write_shards(tmp_path / "images", tmp_path / "out", None, 10, False)


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
    found = index_shard(shard)
    expected = {0: "format", 2: "header", 3: "empty", 4: "no_image", 5: "too_large"}
    expected |= {6: "no_image", 7: "format"}
    assert found.excluded == expected
    assert len(found.rows) == 9 and found.complete and found.bytes == shard.stat().st_size
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


SIX = [f"{i}.jpg" for i in range(6)]


def test_a_shard_that_lost_its_tail_keeps_and_counts_what_it_can(encoded, tmp_path, index):
    """Cut in the body of sample 3: three usable, one truncated, and no end mark."""
    shard = write_tar(tmp_path / "0.tar", [(name, encoded(30, 20)) for name in SIX])
    whole, row = shard.read_bytes(), index_shard(shard).rows[3][0]
    for cut in (row.offset, row.offset + 100, row.offset + row.bytes - 1):
        shard.write_bytes(whole[:cut])
        found = index_shard(shard)
        assert len(found.rows) == 4 and found.excluded == {3: "truncated"} and not found.complete
        samples = Corpus.open(str(index(tmp_path)), 2).read(1)
        assert [one.reason for one in samples] == [None, "truncated"]
    shard.write_bytes(whole[: row.offset - 512])  # between two samples
    found = index_shard(shard)
    assert len(found.rows) == 3 and not found.excluded and not found.complete


def test_a_shard_cut_inside_a_label_can_be_read(encoded, tmp_path, index):
    sample = (("cls", b"1"), ("jpg", encoded(9, 9)))
    members = [(f"{i}.{suffix}", data) for i in range(3) for suffix, data in sample]
    shard = write_tar(tmp_path / "0.tar", members)
    shard.write_bytes(shard.read_bytes()[: index_shard(shard).rows[2][0].offset])
    samples = Corpus.open(str(index(tmp_path)), 10).read(0)
    assert [one.reason for one in samples] == [None, None, "truncated"]


def test_a_broken_member_header_is_noticed(encoded, tmp_path):
    shard = write_tar(tmp_path / "0.tar", [(name, encoded(30, 20)) for name in SIX])
    data = bytearray(shard.read_bytes())
    data[index_shard(shard).rows[3][0].offset - 512] ^= 1  # its checksum does not fit any more
    shard.write_bytes(data)
    assert not index_shard(shard).complete


def test_a_blank_behind_the_first_dot_does_not_break_the_index(encoded, tmp_path, index):
    write_tar(tmp_path / "0.tar", [("photo.v2 final.jpg", encoded(9, 9)), ("b.jpg", encoded(9, 9))])
    samples = Corpus.open(str(index(tmp_path)), 10).read(0)
    assert [bytes(one.data) for one in samples] == [encoded(9, 9)] * 2


@pytest.mark.parametrize("data", [b"hello" * 1000, b""])
def test_what_is_no_tar_is_named(tmp_path, data: bytes):
    (tmp_path / "0.tar").write_bytes(data)
    with pytest.raises(UserError, match=rf"{tmp_path}/0\.tar: not a tar file"):
        index_shard(tmp_path / "0.tar")


def test_a_shard_without_samples_is_named(tmp_path):
    write_tar(tmp_path / "0.tar", [("README", b"no suffix, no sample")])
    with pytest.raises(UserError, match=rf"{tmp_path}/0\.tar: holds no samples"):
        index_shard(tmp_path / "0.tar")


@pytest.mark.parametrize("label", [b"daisy", b"-1", b"", b"1.5"])
def test_a_label_that_is_no_number_is_named(encoded, tmp_path, label: bytes):
    shard = write_tar(tmp_path / "0.tar", [("a.cls", label), ("a.jpg", encoded(9, 9))])
    with pytest.raises(UserError, match=rf"{shard}, a\.cls: a label"):
        index_shard(shard)


def test_the_hash_is_that_of_the_whole_file(corpus_folder):
    import hashlib

    shard = corpus_folder / "000002.tar"
    assert index_shard(shard).sha256 == hashlib.sha256(shard.read_bytes()).hexdigest()
