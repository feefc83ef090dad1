"""What became of every sample: seen = trained + skipped (with a reason) + pending, exactly."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine.data.loader import Batch

__all__ = ["Ledger"]


@dataclass
class Ledger:
    """Counts of samples, one for each pass they come in; `visited` is counted on its own, so that
    the sum can be held against it."""

    trained: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    visited: int = 0

    def add(self, batch: Batch, trained_B: np.ndarray) -> None:
        """Counts a batch of which `trained_B` entered the loss; padding counts for nothing."""
        self.visited += int(batch.work.share.valid.sum())
        self.trained += int(trained_B.sum())
        left_out = np.flatnonzero(batch.work.share.valid & ~trained_B)
        reasons = Counter(batch.reasons[row] or "teacher" for row in left_out)
        self.skipped = dict(Counter(self.skipped) + reasons)

    @classmethod
    def total(cls, ledgers: Iterable["Ledger"]) -> "Ledger":
        total = cls()
        for ledger in ledgers:
            total.visited += ledger.visited
            total.trained += ledger.trained
            total.skipped = dict(Counter(total.skipped) + Counter(ledger.skipped))
        return total

    def statement(self, planned: int) -> dict[str, Any]:
        """What `ledger.json` says of a run over `planned` samples, all passes together."""
        assert self.visited == self.trained + sum(self.skipped.values()), "a sample was lost"
        assert self.visited <= planned, "a sample was visited twice"
        return {
            "seen": planned,
            "trained": self.trained,
            "skipped": dict(sorted(self.skipped.items())),
            "pending": planned - self.visited,
        }
