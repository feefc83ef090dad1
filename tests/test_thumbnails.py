"""Small pictures of samples, whatever the samples are."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from servers import serving_files

from engine.config import CorpusConfig, to_dict
from engine.data.corpus import Corpus, Sample
from engine.report import thumbnails as module
from engine.report.thumbnails import shrunk, thumbnails

CRASHING = """
import os, runpy, sys
sys.path.insert(0, os.path.dirname({child!r}))
import shrink
before = shrink.shrunk
def shrunk(data, orientation):
    if data.endswith(b"marked: crash"):
        os.kill(os.getpid(), 11)
    if data.endswith(b"marked: hang"):
        import time; time.sleep(60)
    return before(data, orientation)
shrink.shrunk = shrunk
shrink.main()
"""


def picture(uri: str) -> Image.Image:
    head, _, data = uri.partition(",")
    assert head == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def settings(folder: Path) -> dict:
    return to_dict(CorpusConfig(shards=str(folder)))


def read(folder: Path) -> list[Sample]:
    corpus = Corpus.open(str(folder), 512)
    return [sample for block in range(len(corpus.blocks)) for sample in corpus.read(block)]


def test_pictures_are_those_of_the_samples(corpus_folder):
    """JPEG, PNG and WebP of many sizes, against Pillow's own reduction of the same bytes."""
    samples = read(corpus_folder)
    told = thumbnails(settings(corpus_folder), [(s.shard, s.position) for s in samples])
    assert told.why == "" and len(told.found) == 24
    for sample in samples:
        shown = told.found[sample.shard, sample.position]
        mine = picture(shown.uri)
        whole = Image.open(io.BytesIO(bytes(sample.data))).convert("RGB")
        assert max(mine.size) <= 96 and shown.key == sample.key and shown.shard.endswith(".tar")
        assert mine.width / mine.height == pytest.approx(whole.width / whole.height, rel=0.05)
        small = [np.asarray(one.resize((4, 4), Image.Resampling.BOX), int) for one in (mine, whole)]
        assert np.abs(small[0] - small[1]).max() < 24, shown.key


def test_a_picture_is_turned_as_its_camera_was_held(encoded):
    from engine.data.header import read_header

    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(80, 40, 1, exif=exif)
    header = read_header(memoryview(data))
    assert header.orientation == 6
    sample = Sample(0, 0, memoryview(data), None, None, "k", header)
    ((uri, why),) = shrunk([sample]).values()
    shown = picture(uri)
    assert (shown.width < shown.height, why) == (True, "")
    stored = Image.open(io.BytesIO(data)).transpose(Image.Transpose.ROTATE_270).convert("RGB")
    corner = shown.getpixel((2, 2))
    assert corner == pytest.approx(stored.getpixel((2, 2)), abs=30)


def marked(samples: list[Sample], place: int, mark: bytes) -> None:
    sample = samples[place]
    samples[place] = sample._replace(data=memoryview(bytes(sample.data) + mark))


def test_an_image_that_crashes_its_decoder_costs_itself(corpus_folder, tmp_path, monkeypatch):
    child = tmp_path / "child.py"
    child.write_text(CRASHING.format(child=str(module._CHILD)))
    monkeypatch.setattr(module, "_CHILD", child)
    samples = read(corpus_folder)[:5]
    marked(samples, 1, b"marked: crash")
    marked(samples, 3, b"marked: crash")
    whys = [why for _, why in shrunk(samples).values()]
    assert whys == ["", "crashed", "", "crashed", ""]
    monkeypatch.setattr(module, "_SHRINK_S", 1.5)
    marked(samples, 4, b"marked: hang")
    whys = [why for _, why in shrunk(samples[4:]).values()]
    assert whys == ["timed_out"]


def test_what_has_no_picture_says_why(corpus_folder, tmp_path):
    told = thumbnails(settings(corpus_folder), [(0, 0), (9, 9), (0, 99)])
    assert told.found[0, 0].uri and told.found[9, 9].why == "not in the corpus any more"
    assert told.found[0, 99].uri == ""
    gone = thumbnails(settings(tmp_path), [(0, 0)])
    assert gone.found == {} and "corpus.shards" in gone.why
    assert thumbnails({"shards": 3, "lanes": "x"}, [(0, 0)]).why
    assert thumbnails({}, []) == ({}, "")
    damaged = read(corpus_folder)[0]
    half = damaged._replace(data=memoryview(b"\xff\xd8\xff" + bytes(50)))
    assert list(shrunk([half]).values()) == [("", "undecodable")]


def test_urls_are_read_when_asked_and_private_hosts_when_told(corpus_folder):
    """The hosts that a folder's own config.json lists count for nothing."""
    with serving_files(corpus_folder) as host:
        told = to_dict(CorpusConfig(shards=f"http://{host}/", hosts=(host,)))
        afar = thumbnails(told, [(0, 0)])
        assert afar.found == {} and "--images all" in afar.why
        refused = thumbnails(told, [(0, 0)], "all")
        assert refused.found == {} and "a loopback address" in refused.why
        read = thumbnails(told, [(0, 0)], "all", [host])
        assert read.why == "" and read.found[0, 0].shard == f"http://{host}/000000.tar"
