import numpy as np
import pytest
import torch

from engine.data.loader import Batch, Work
from engine.data.order import Share
from engine.train.ledger import Ledger


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
