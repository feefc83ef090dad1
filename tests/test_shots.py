"""The choice of labelled samples, and their order."""

import shutil

import numpy as np
import pytest
from tiny import spoil

from engine.config import UserError
from engine.data.corpus import Corpus
from engine.data.shots import Shots, choose

FIELD = "corpus.shards"


@pytest.fixture(scope="module")
def corpus(corpus_folder):
    """24 samples, 8 of each of three labels."""
    return Corpus.open(str(corpus_folder), 512)


def ids(shots: Shots) -> list[tuple[int, int]]:
    return [(one.shard, one.position) for one in shots.samples]


def counts(shots: Shots) -> list[int]:
    return np.bincount([one.label for one in shots.samples]).tolist()


@pytest.mark.parametrize(("classes", "shots"), [(3, 1), (2, 5), (1, 8), (3, 8)])
def test_each_class_gives_as_many_as_are_asked(corpus, classes, shots):
    chosen = choose(corpus, classes, shots, 1, FIELD)
    assert counts(chosen) == [shots] * classes
    assert len(set(ids(chosen))) == len(chosen.samples)


def test_a_class_with_fewer_gives_all(corpus):
    assert counts(choose(corpus, 2, 100, 1, FIELD)) == [8, 8]


def test_a_class_without_a_sample_is_refused(corpus):
    with pytest.raises(UserError, match=r"^corpus\.shards: no sample has label 3, of 5 classes"):
        choose(corpus, 5, 2, 1, FIELD)


def test_the_choice_is_of_the_seed_alone(corpus, corpus_folder):
    one = choose(corpus, 3, 4, 1, FIELD)
    again = choose(Corpus.open(str(corpus_folder), 3), 3, 4, 1, FIELD)  # in other blocks
    assert one.samples == again.samples
    others = [ids(choose(corpus, 3, 4, seed, FIELD)) for seed in range(2, 7)]
    assert all(other != ids(one) for other in others)
    # Over seeds every sample is chosen sometimes, not only the first of a class.
    assert len({place for other in (ids(one), *others) for place in other}) > 20


def test_fewer_shots_are_some_of_more(corpus):
    few, many = (set(ids(choose(corpus, 3, shots, 1, FIELD))) for shots in (2, 6))
    assert few < many


def test_samples_are_read_like_a_corpus_of_one_block(corpus):
    chosen = choose(corpus, 2, 3, 1, FIELD)
    every = {(one.shard, one.position): one for b in range(3) for one in corpus.read(b)}
    assert list(chosen.read(0)) == [every[place] for place in ids(chosen)]
    assert len(chosen.samples) == 6


def test_excluded_samples_are_never_chosen(corpus_folder, tmp_path, index):
    folder = shutil.copytree(corpus_folder, tmp_path / "corpus")
    spoil(folder / "000000.tar", 4)
    index(folder)
    corpus = Corpus.open(str(folder), 512)
    chosen = choose(corpus, 3, 100, 1, FIELD)
    assert len(chosen.samples) == 20
    assert all(one.data is not None and one.reason is None for one in chosen.samples)
    assert not {(0, position) for position in range(4)} & set(ids(chosen))


@pytest.mark.parametrize("batch", [1, 5, 8, 24, 25])
def test_a_pass_visits_each_sample_at_most_once(corpus, batch):
    shots = choose(corpus, 3, 8, 1, FIELD)
    steps = shots.steps(batch)
    assert steps == 24 // batch
    orders = []
    for pass_ in range(4):
        shares = [shots.share(pass_, step, batch, 1) for step in range(steps)]
        visited = [place for share in shares for place in share.offsets.tolist()]
        assert len(visited) == len(set(visited)) == steps * batch
        assert all(0 <= place < 24 for place in visited)
        assert all(share.valid.all() and (share.blocks == 0).all() for share in shares)
        orders.append(tuple(visited))
    if steps:
        assert len(set(orders)) == 4  # another order in each pass


def test_an_order_is_of_the_seed(corpus):
    shots = choose(corpus, 3, 8, 1, FIELD)
    one, same, other = (shots.share(2, 0, 24, seed).offsets.tolist() for seed in (1, 1, 2))
    assert one == same != other and sorted(one) == sorted(other)


def test_samples_left_out_of_a_pass_come_in_another(corpus):
    shots = choose(corpus, 3, 8, 1, FIELD)
    visited = {
        place
        for pass_ in range(5)
        for step in range(shots.steps(7))
        for place in shots.share(pass_, step, 7, 1).offsets.tolist()
    }
    assert visited == set(range(24))
