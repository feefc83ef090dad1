"""A corpus of damaged images and shards, from index to ledger: nothing is lost uncounted."""

import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from damage import mutated, whole_image
from tars import write_tar

from engine.data.batches import training_works
from engine.data.corpus import Corpus
from engine.data.decode import Decoder
from engine.data.loader import FAILURES, Loader
from engine.data.order import Order
from engine.data.views import ViewPolicy
from engine.index import index
from engine.train.ledger import Ledger


def loaded(corpus: Corpus, passes: int = 1) -> Ledger:
    """What becomes of the samples of a corpus on their way to a student."""
    order = Order(corpus.blocks, lanes=2, batch=64, window_samples=128, seed=1)
    decoder = Decoder(ViewPolicy(1, 32), "cpu", 2)
    works = training_works(order, passes, passes, rank=0, world=1, start=0)
    loader, ledger = Loader(corpus, decoder, works, 1 << 28), Ledger()
    for batch in loader:
        ledger.add(batch, batch.valid_B)
        assert not batch.images_BCHW[~batch.valid_B].any()
    loader.close()
    decoder.close()
    return ledger


def damaged_corpus(folder: Path, images: int) -> Corpus:
    """Nine of ten images are damaged."""
    draw = np.random.default_rng(11)
    for shard in range(0, images, 500):
        members = [
            (f"{i}.jpg", whole_image(draw)[1] if i % 10 == 0 else mutated(draw))
            for i in range(shard, min(shard + 500, images))
        ]
        write_tar(folder / f"{shard:06d}.tar", members)
    report = index(str(folder), workers=1)
    assert report.samples == images
    return Corpus.open(str(folder), 64)


def check(corpus: Corpus, images: int) -> None:
    ledger = loaded(corpus)
    statement = ledger.statement(images)
    assert statement["pending"] == 0 and ledger.trained >= images / 10
    by_index = Counter(
        one.reason for block in range(len(corpus.blocks)) for one in corpus.read(block)
    )
    found_later = {reason for reason in statement["skipped"] if reason not in by_index}
    assert found_later == {"undecodable"} <= FAILURES
    assert {r: n for r, n in by_index.items() if r} == {
        r: n for r, n in statement["skipped"].items() if r != "undecodable"
    }
    assert {"format", "header", "truncated"} < set(by_index)


def test_damaged_images_are_counted(tmp_path):
    check(damaged_corpus(tmp_path, 1200), 1200)


@pytest.mark.slow
def test_ten_thousand_damaged_images_are_counted(tmp_path):
    check(damaged_corpus(tmp_path, 11_200), 11_200)


def test_odd_images_of_the_wild_are_counted(data_folder, tmp_path):
    """All of them in one shard: each is decoded, or has its reason."""
    files = sorted((data_folder / "odd_images").glob("*/*"))
    members = [(f"{i:03d}.{file.suffix[1:]}", file.read_bytes()) for i, file in enumerate(files)]
    write_tar(tmp_path / "0.tar", members)
    report = index(str(tmp_path), workers=1)
    ledger = loaded(Corpus.open(str(tmp_path), 16), passes=3)
    assert ledger.statement(3 * report.samples)["pending"] == 0
    unreadable = sum(file.parent.name == "unreadable" for file in files)
    assert sum(ledger.skipped.values()) >= 3 * unreadable
    assert ledger.trained > 3 * 20 and set(report.excluded) <= set(ledger.skipped)


@pytest.mark.parametrize("seed", range(4))
def test_a_shard_cut_anywhere_loses_only_what_is_missing(tmp_path, encoded, seed: int):
    shard = write_tar(
        tmp_path / "0.tar", [(f"{i}.jpg", encoded(40, 30, i, quality=70)) for i in range(40)]
    )
    index(str(tmp_path), workers=1)
    with tarfile.open(shard) as tar:
        ends = [member.offset_data + member.size for member in tar]
    whole = shard.read_bytes()
    images = [one.data and bytes(one.data) for one in Corpus.open(str(tmp_path), 64).read(0)]
    for at in np.random.default_rng(seed).integers(ends[0], ends[-1], 8).tolist():
        shard.write_bytes(whole[:at])
        index(str(tmp_path), workers=1)
        corpus = Corpus.open(str(tmp_path), 64)
        kept = sum(end <= at for end in ends)
        samples = corpus.read(0)
        assert [one.data and bytes(one.data) for one in samples[:kept]] == images[:kept]
        assert [one.reason for one in samples[kept:]] in ([], ["truncated"])
        assert corpus.incomplete == (f"{shard} is short {kept}/40",)
        assert loaded(corpus).trained == kept
