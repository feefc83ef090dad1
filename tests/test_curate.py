"""Curation: scores and near-duplicates against brute force, choices, and the list and report."""

import dataclasses

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from recordings import NAMES, SCALE, W_ND, WIDTH, labelling
from torch.nn.functional import normalize

from engine.clip.class_vectors import ClassVectors
from engine.config import CorpusConfig, UserError
from engine.data.corpus import Corpus, open_corpora
from engine.data.order import Blocks
from engine.data.views import TEST_VIEW
from engine.labels.curate.choose import REASONS, choose
from engine.labels.curate.duplicates import buckets, near_duplicates
from engine.labels.curate.rules import Rules
from engine.labels.curate.scan import Scan, features, scan, scores
from engine.labels.store import Store
from engine.labels.targets import BlockView, pack
from jobs import cli

torch.set_num_threads(1)  # products this small do little but wait for each other
CPU = torch.device("cpu")
# Nearly as far from every class as from any other.
NOWHERE = normalize(torch.linalg.svd(W_ND)[2][-1] + 0.02 * W_ND[0], dim=0)
VECTORS = ClassVectors(NAMES, W_ND.numpy(), ("{}",), "t" * 64, SCALE)


def unit(*shape: int, seed: int = 0) -> np.ndarray:
    drawn = np.random.default_rng(seed).standard_normal(shape)
    return (drawn / np.linalg.norm(drawn, axis=-1, keepdims=True)).astype(np.float32)


def with_copies(samples: int, copies: int, distance: float, width: int = 32) -> np.ndarray:
    """Unit rows, the last of which are like some of the others."""
    u, draws = unit(samples, width), np.random.default_rng(1)
    near = u[draws.integers(0, samples // 2, copies)] + distance * unit(copies, width, seed=2)
    u[-copies:] = near / np.linalg.norm(near, axis=1, keepdims=True)
    return u


def by_hand(u: np.ndarray, ordered: np.ndarray, least: float) -> dict[int, int]:
    """What goes, and for the sake of which that stays."""
    staying: list[int] = []
    gone, known = {}, np.empty_like(u)
    for row in ordered.tolist():
        cosines = known[: len(staying)] @ u[row]
        if len(cosines) and cosines.max() >= least:
            gone[row] = staying[int(cosines.argmax())]
        else:
            known[len(staying)] = u[row]
            staying.append(row)
    return gone


def test_scores_are_those_of_their_papers():
    u = torch.from_numpy(unit(50, WIDTH))
    z = SCALE * u @ W_ND.T
    cosines = (z / SCALE).double().numpy()
    wanted = [np.exp(a * cosines) / np.exp(a * cosines).sum(1, keepdims=True) for a in (1, SCALE)]
    shifted = z - z.amax(dim=-1, keepdim=True)
    for found in (scores("features", u, W_ND, SCALE), scores("logits", shifted, W_ND, SCALE)):
        classes, in_domain, probability = (column.numpy() for column in found)
        assert np.array_equal(classes, cosines.argmax(1))
        np.testing.assert_allclose(in_domain, wanted[0].max(1), rtol=1e-5)
        np.testing.assert_allclose(probability, wanted[1].max(1), rtol=1e-3)
    between = normalize(W_ND[0] + W_ND[1], dim=0)
    _, in_domain, probability = scores("features", torch.stack([between, NOWHERE]), W_ND, SCALE)
    assert in_domain[0] > 0.25 and in_domain[1] < 0.21 and probability.max() < 0.9


def test_features_of_logits_are_centred():
    z = torch.randn(4, 7)
    torch.testing.assert_close(features("logits", z), features("logits", z + 3))
    assert features("logits", z).norm(dim=1).allclose(torch.ones(4))
    assert torch.equal(features("features", z), normalize(z, dim=-1))


@pytest.mark.parametrize("least", [0.9, 0.97, 1.1])
def test_one_bucket_misses_nothing(least):
    """Of several tiles; in any order of preference."""
    u = with_copies(5000, 700, 0.2)
    ordered = np.random.default_rng(3).permutation(5000)[:4500]
    originals, nearest = near_duplicates(u, ordered, least, CPU)
    goes = originals != ordered
    gone = dict(zip(ordered[goes].tolist(), originals[goes].tolist(), strict=True))
    assert gone == by_hand(u, ordered, least) and (least > 1) == (not gone)
    for place in range(1, 4500, 371):
        before = ordered[:place][~goes[:place]]
        assert nearest[place] == pytest.approx((u[before] @ u[ordered[place]]).max(), abs=1e-5)
    assert nearest[0] == -1 and (nearest[goes] >= least).all()


def test_no_chain_of_likes_goes_for_one():
    angles = np.arange(12) * 0.1
    u = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    originals, _ = near_duplicates(u, np.arange(12), np.cos(0.15), CPU)
    assert originals.tolist() == [0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10]


def test_many_buckets_part_all_and_find_most():
    u = with_copies(6000, 1500, 0.1).astype(np.float16)
    parts = list(buckets(u, np.arange(6000), CPU, most=500))
    assert sorted(np.concatenate(parts).tolist()) == list(range(6000))
    assert len(parts) >= 12 and max(map(len, parts)) <= 500
    assert all((np.diff(part) > 0).all() for part in parts)
    found = [near_duplicates(u, np.arange(6000), 0.97, CPU, most) for most in (500, 500, 10_000)]
    for one, again in zip(*found[:2], strict=True):
        assert np.array_equal(one, again)
    gone, all_gone = (set(np.flatnonzero(f[0] != np.arange(6000))) for f in found[1:])
    assert len(all_gone) >= 1490 and gone <= all_gone and len(gone) > 0.95 * len(all_gone)


def test_copies_that_cannot_be_parted_are_one_bucket():
    u = np.repeat(unit(1, 8), 3000, axis=0)
    assert [len(part) for part in buckets(u, np.arange(3000), CPU, most=100)] == [3000]
    originals, _ = near_duplicates(u, np.arange(3000), 0.99, CPU, most=100)
    assert (originals == 0).all()


# ------------------------------------------------ choices


def found_of(in_domain: list[float], classes: list[int], **changes) -> Scan:
    n = len(in_domain)
    told = Scan(
        unit(n, 16),
        np.ones(n, bool),
        np.ones(n, bool),
        np.array(classes, np.int32),
        np.array(in_domain, np.float32),
        np.zeros(n, np.float32),
        0,
    )
    return told._replace(**changes)


def reasons(found: Scan, **rules) -> list[str]:
    return [REASONS[reason][:4] for reason in choose(found, Rules(**rules), CPU).reasons]


def test_outliers_go_by_share_or_score():
    found = found_of([0.5, 0.1, 0.4, 0.1, 0.3], [0] * 5)
    assert reasons(found) == ["kept"] * 5
    assert reasons(found, outliers=0.2) == ["kept", "kept", "kept", "outl", "kept"]
    assert reasons(found, outliers=0.4) == ["kept", "outl", "kept", "outl", "kept"]
    assert reasons(found, least_in_domain=0.35) == ["kept", "outl", "kept", "outl", "outl"]
    with pytest.raises(UserError, match="no sample is left: 5 outlier"):
        choose(found, Rules(outliers=1.0), CPU)


def test_of_duplicates_the_one_that_fits_best_stays():
    u = unit(5, 16)
    u[[1, 3, 4]] = u[0]
    found = found_of([0.2, 0.9, 0.5, 0.9, 0.01], [0] * 5, features=u)
    told = choose(found, Rules(duplicates=0.99, outliers=0.2), CPU)
    assert [REASONS[r][:4] for r in told.reasons] == ["dupl", "kept", "kept", "dupl", "outl"]
    assert told.originals.tolist() == [1, -1, -1, 1, -1]
    assert np.isnan(told.nearest).tolist() == [False] * 4 + [True]
    assert choose(found, Rules(), CPU).nearest[[0, 3, 4]] == pytest.approx(1, abs=1e-5)


def test_a_class_keeps_those_that_fit_best():
    found = found_of([0.2, 0.9, 0.5, 0.9, 0.1, 0.6], [0, 0, 1, 0, 1, 1])
    told = reasons(found, most_per_class=2)
    assert told == ["beyo", "kept", "kept", "kept", "beyo", "kept"]


def test_what_has_no_label_is_told_apart():
    there = np.array([True, True, False, False])
    valid = np.array([True, False, False, False])
    found = found_of([0.5, 0, 0, 0], [0, -1, -1, -1], there=there, valid=valid, missing=1)
    with pytest.raises(UserError, match=r"^unlabelled: labels of 1 blocks are missing, 2 samples"):
        choose(found, Rules(), CPU)
    assert reasons(found, unlabelled="drop") == ["kept", "unde", "unla", "unla"]
    assert reasons(found, unlabelled="keep") == ["kept", "unde", "kept", "kept"]


# ------------------------------------------------ from a store


def record(store: Store, corpus: Corpus, u: torch.Tensor, view: int, **changes) -> str:
    """Labels of a corpus whose features are `u`, in blocks of 5: of all but the last 4 samples.
    Sample 7 could not be decoded."""
    told = labelling(corpus=corpus.fingerprint, block_samples=5, **changes)
    told = dataclasses.replace(told, class_vectors=(VECTORS.fingerprint,))
    ours, blocks = store.recorded(told), Blocks(corpus.blocks.shard_samples, 5)
    start = 0
    for block in range(len(blocks) - 1):
        length = blocks.at(block).length
        rows = u[start : start + length]
        z = SCALE * rows @ W_ND.T
        values = rows if told.form == "features" else z - z.amax(-1, keepdim=True)
        valid = np.arange(start, start + length) != 7
        wire = "int8" if told.wire == "int8" else "fp16"
        form = ours.form
        targets = pack(form, values, valid, ours.fingerprint, wire, W_ND, SCALE)
        ours.put(BlockView("shards", block, view), targets)
        start += length
    return ours.fingerprint


@pytest.fixture
def recorded(tmp_path, corpus_folder):
    """A store for a corpus of 10, 10 and 4 samples: sample 13 is much like 2, which fits better; 5
    is an outlier."""
    corpus = open_corpora(CorpusConfig(shards=str(corpus_folder)))["shards"]
    u = normalize(W_ND[torch.arange(24) % 5] + 0.3 * torch.from_numpy(unit(24, WIDTH)), dim=-1)
    u[13], u[5] = normalize(u[2] + 0.02 * NOWHERE, dim=0), NOWHERE
    VECTORS.save(tmp_path / "vectors.safetensors")
    return Store(str(tmp_path / "store")), corpus, u


@pytest.mark.parametrize(
    ("form", "wire"), [("features", "fp16"), ("features", "int8"), ("logits", "fp16")]
)
def test_a_scan_reads_what_was_recorded(recorded, tmp_path, form, wire):
    store, corpus, u = recorded
    record(store, corpus, u, TEST_VIEW, form=form, wire=wire)
    (told,) = store.labellings().values()
    blocks = Blocks(corpus.blocks.shard_samples, 5)
    found = scan(store.recorded(told), blocks, TEST_VIEW, VECTORS, tmp_path, CPU)
    assert found.missing == 1 and found.there.tolist() == [True] * 20 + [False] * 4
    assert np.flatnonzero(~found.valid).tolist() == [7, 20, 21, 22, 23]
    valid = found.valid
    values = u if form == "features" else SCALE * u @ W_ND.T
    sought = features(form, values).numpy()[valid]
    assert ((found.features[valid] * sought).sum(1) > 0.999).all()
    assert not found.features[~valid].any() and found.features.dtype == np.float16
    classes, in_domain, _ = scores("features", u, W_ND, SCALE)
    assert np.array_equal(found.classes[valid], classes.numpy()[valid])
    assert found.in_domain[valid] == pytest.approx(in_domain.numpy()[valid], rel=0.01)
    assert found.in_domain[valid].argmin() == 5 and (found.classes[~valid] == -1).all()
    assert {path.name for path in tmp_path.iterdir()} == {"store", "vectors.safetensors"}


def curated(tmp_path, corpus_folder, *words: str, out: str = "list.parquet") -> int:
    told = ["--corpus", corpus_folder, "--classes", tmp_path / "vectors.safetensors"]
    told += ["--out", tmp_path / out, *words]
    return cli.main(["store", "curate", str(tmp_path / "store"), *map(str, told)])


def test_a_list_with_its_report(recorded, tmp_path, corpus_folder, capsys):
    store, corpus, u = recorded
    record(store, corpus, u, TEST_VIEW)
    record(store, corpus, torch.from_numpy(unit(24, WIDTH, seed=9)), 0)
    rules = ("--duplicates", "0.999", "--outliers", "0.05", "--unlabelled", "keep")
    assert curated(tmp_path, corpus_folder, *rules) == 0
    said = capsys.readouterr()
    assert "the test view" in said.err and "1 of 5 blocks have no labels" in said.err
    told = dict(line.split()[:2] for line in said.out.splitlines()[:4])
    assert told == {"kept": "21", "undecodable": "1", "outlier": "1", "duplicate": "1"}
    config = CorpusConfig(shards=str(corpus_folder), samples=str(tmp_path / "list.parquet"))
    listed = open_corpora(config)["shards"].listed
    kept = [s + o for b, s in enumerate((0, 10, 20)) for o in listed.offsets(b).tolist()]
    assert set(range(24)) - set(kept) == {5, 7, 13}

    table = pq.read_table(tmp_path / "list.scores.parquet").to_pylist()
    assert [row["reason"] for row in table].count("kept") == 21 and len(table) == 24
    assert table[5]["reason"] == "outlier" and table[7]["reason"] == "undecodable"
    assert table[7]["class"] is table[7]["in_domain"] is table[23]["nearest"] is None
    copy = table[13]
    assert (copy["shard"], copy["position"], copy["reason"]) == (1, 3, "duplicate")
    assert (copy["original_shard"], copy["original_position"]) == (0, 2)
    assert copy["nearest"] == pytest.approx(1, abs=1e-3) and table[5]["nearest"] is None
    text = (tmp_path / "list.md").read_text()
    keys = [corpus.keys(0, [2])[0], corpus.keys(1, [3])[0]]
    assert f"| 000000.tar:2 `{keys[0]}` | 1 | 000001.tar:3 `{keys[1]}` |" in text
    assert "| ant |" in text and "duplicates: 0.999" in text


def test_without_rules_all_is_kept_and_scored(recorded, tmp_path, corpus_folder, capsys):
    store, corpus, u = recorded
    record(store, corpus, u, 3, form="logits")
    record(store, corpus, u, 11, form="logits")
    assert curated(tmp_path, corpus_folder, "--unlabelled", "drop") == 0
    said = capsys.readouterr()
    assert "view 3, random crops" in said.err and "logits of 5 classes" in said.err
    assert said.out.split()[:2] == ["kept", "19"]
    table = pq.read_table(tmp_path / "list.scores.parquet").to_pydict()
    assert table["nearest"][13] == pytest.approx(1, abs=1e-3)


def test_what_does_not_fit_is_refused(recorded, tmp_path, corpus_folder, capsys):
    store, corpus, u = recorded

    def complaint(*words: str, out: str = "list.parquet") -> str:
        assert curated(tmp_path, corpus_folder, *words, out=out) == 2
        return capsys.readouterr().err

    assert "holds no labels" in complaint()
    first = record(store, corpus, u, 0)
    assert "unlabelled: labels of 1 blocks are missing, 4 samples" in complaint()
    assert "out: " in complaint(out="list.csv") and "out: " in complaint(out="no/x.parquet")
    assert "view: the views that are recorded are 0" in complaint("--view", "1")
    second = record(store, corpus, u, 0, seed=9)
    named = complaint()
    assert "labelling: name one of" in named and first in named and second in named
    assert "labelling: 0123 is none of this corpus" in complaint("--labelling", "0123")
    lacks = complaint("--labelling", first)
    assert "unlabelled: " in lacks
    dataclasses.replace(VECTORS, vectors=-W_ND.numpy()).save(tmp_path / "vectors.safetensors")
    assert "classes: these are not the class vectors" in complaint()
    other = open_corpora(CorpusConfig(shards=f"{corpus_folder}/000001.tar"))["shards"]
    assert other.fingerprint != corpus.fingerprint
    VECTORS.save(tmp_path / "vectors.safetensors")
    words = ["--corpus", f"{corpus_folder}/000001.tar"]
    assert "holds no labels of this corpus" in complaint(*words)
    assert not list(tmp_path.glob("list.*"))
