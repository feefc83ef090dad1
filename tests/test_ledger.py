import numpy as np
import pytest
import torch

from engine.data.loader import Batch, Work
from engine.data.order import Share
from engine.train.ledger import Ledger, Spoilt, Watch


def batch(real: list[bool], reasons: list[str | None]) -> Batch:
    """A batch of samples, some of them padding, some with a reason not to be used."""
    rows = np.arange(len(real))
    valid = np.array(real) & np.array([reason is None for reason in reasons])
    share = Share(rows, rows, np.array(real))
    images = torch.zeros(len(real), 3, 2, 2, dtype=torch.uint8)
    return Batch(Work("shards", 0, 0, share), images, valid, tuple(reasons), rows)


def test_every_sample_is_trained_or_skipped_with_a_reason():
    ledger = Ledger()
    reasons = [None, "format", "header", "format", None, None]
    first = batch([True] * 5 + [False], reasons)
    trained = np.array([True, False, False, False, False, False])  # row 4: the teacher could not
    ledger.add(first, trained)
    assert ledger.trained == 1
    assert ledger.skipped == {"format": 2, "header": 1, "teacher": 1}
    ledger.add(batch([True, True], [None, "header"]), np.array([True, False]))
    assert ledger.statement(planned=10) == {
        "seen": 10,
        "trained": 2,
        "skipped": {"format": 2, "header": 2, "teacher": 1},
        "pending": 3,
    }


def test_total_adds_up_and_leaves_its_parts_alone():
    parts = [Ledger(3, {"format": 1}, 4), Ledger(), Ledger(4, {"format": 2, "teacher": 1}, 7)]
    total = Ledger.total(parts)
    assert total == Ledger(7, {"format": 3, "teacher": 1}, 11)
    total.add(batch([True], ["format"]), np.array([False]))
    assert parts[0] == Ledger(3, {"format": 1}, 4)
    assert Ledger.total([]) == Ledger()


def test_a_sample_visited_twice_or_lost_is_noticed():
    with pytest.raises(AssertionError, match="twice"):
        Ledger(3, {"format": 2}, 5).statement(planned=4)
    with pytest.raises(AssertionError, match="lost"):
        Ledger(3, {"format": 1}, 5).statement(planned=5)


def test_more_failures_than_a_run_may_skip_stop_it():
    """A share of what was visited, and of a thousand images at least; what the index has excluded
    is no failure."""
    for failed, visited in ((100, 50), (500, 5000)):
        Watch(0.1, 10_000, 4, Ledger()).require_usable(failed, visited)
        with pytest.raises(
            Spoilt, match=rf"{failed + 1} of {visited} .*corpus\.max_skipped = 0\.1"
        ):
            Watch(0.1, 10_000, 4, Ledger()).require_usable(failed + 1, visited)
    skipped = {"format": 7, "unreadable": 2, "changed": 1, "undecodable": 4, "teacher": 8}
    assert Ledger(skipped=skipped).failed == 15


def test_a_long_good_past_excuses_no_failures():
    """100 blocks of 512 are judged at once: 5120 of their images may fail."""
    watch = Watch(0.1, 10_000, 512, Ledger())
    for visited in range(0, 900_000_001, 1_000_000):
        watch.require_usable(0, visited)
    watch.require_usable(5120, 900_005_120)
    with pytest.raises(Spoilt, match="5632 of 5632 images"):
        watch.require_usable(5632, 900_005_632)


def test_a_bad_shard_now_and_then_is_no_reason_to_stop():
    """Blocks of 512, of which one in a hundred fails, sixteen mixed at a time."""
    bad = np.random.default_rng(0).random(100_000) < 0.01
    failed, watch = 512 * np.cumsum(bad), Watch(0.1, 10_000, 512, Ledger())
    for blocks in range(16, len(bad), 16):
        watch.require_usable(int(failed[blocks - 1]), 512 * blocks)


def test_a_run_that_goes_on_is_judged_by_what_it_does_from_there():
    """It was stopped, its corpus was mended, and it is started again."""
    before = Ledger(900, {"unreadable": 200}, 1100)
    Watch(0.1, 10_000, 4, before).require_usable(300, 1200)
    with pytest.raises(Spoilt, match="101 of 100 images"):
        Watch(0.1, 10_000, 4, before).require_usable(301, 1200)


def test_a_small_corpus_is_judged_by_its_own_size():
    watch = Watch(0.1, 30, 4, Ledger())
    watch.require_usable(3, 8)  # of the thirty images of a pass, not of eight
    with pytest.raises(Spoilt, match="4 of 8 images"):
        watch.require_usable(4, 8)
