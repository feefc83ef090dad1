"""What became of every sample: seen = trained + skipped (with a reason) + pending, exactly."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from engine.data.loader import Batch

__all__ = ["Ledger"]


@dataclass
class Ledger:
    """Counts of samples, one for each pass they come in."""

    trained: int = 0
    skipped: dict[str, int] = field(default_factory=dict)

    def add(self, batch: Batch, trained_B: np.ndarray) -> None:
        """Counts a batch of which `trained_B` entered the loss; padding counts for nothing."""
        self.trained += int(trained_B.sum())
        left_out = np.flatnonzero(batch.work.share.valid & ~trained_B)
        reasons = Counter(batch.reasons[row] or "teacher" for row in left_out)
        self.skipped = dict(Counter(self.skipped) + reasons)

    @classmethod
    def total(cls, ledgers: Iterable["Ledger"]) -> "Ledger":
        total = cls()
        for ledger in ledgers:
            total.trained += ledger.trained
            total.skipped = dict(Counter(total.skipped) + Counter(ledger.skipped))
        return total

    def statement(self, seen: int) -> dict[str, object]:
        """What `ledger.json` says; `seen` is the samples of all passes of the run."""
        pending = seen - self.trained - sum(self.skipped.values())
        assert pending >= 0, "a sample was counted twice"
        return {
            "seen": seen,
            "trained": self.trained,
            "skipped": dict(sorted(self.skipped.items())),
            "pending": pending,
        }
