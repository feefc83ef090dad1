"""engine.data.shards: from images to shards."""

import shutil
import tarfile
from pathlib import Path

import pytest

from engine.config import UserError
from engine.data.corpus import Corpus
from engine.data.shards import write_shards


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
