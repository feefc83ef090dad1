"""What became of every sample: seen = trained + skipped (with a reason) + pending, exactly."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine.data.loader import FAILURES, Batch

__all__ = ["Ledger", "Spoilt", "Watch"]

_ENOUGH = 1000  # images, or a pass, of which a share can be judged
_BLOCKS = 100  # failures come by blocks: over so many they even out


class Spoilt(RuntimeError):
    """More images turn out unusable than a run may skip. All workers raise it at the same step."""


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

    def lose(self, count: int) -> None:
        """Counts so many as skipped that were added as trained: those whose loss or gradients were
        not finite, which is known later. In the ledger of one worker, for all of them."""
        if count:
            self.trained -= count
            self.skipped = dict(Counter(self.skipped) + Counter(not_finite=count))

    @property
    def failed(self) -> int:
        """Samples that could not be used, against what the index said."""
        return sum(count for reason, count in self.skipped.items() if reason in FAILURES)

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


class Watch:
    """Stops a run that fails too often: over all that it has visited since it was started, and
    over the latest `_BLOCKS` blocks or more, so that a long good past excuses nothing."""

    def __init__(self, share: float, samples: int, largest_block: int, before: Ledger) -> None:
        """For a corpus of so many samples."""
        self._share, self._enough = share, min(_ENOUGH, samples)
        self._many = max(_ENOUGH, _BLOCKS * largest_block)
        self._start = self._judged = before.failed, before.visited

    def require_usable(self, failed: int, visited: int) -> None:
        """Of all workers and lives of the run. Raises Spoilt where more than the share failed."""
        for (failed_before, visited_before), enough in (
            (self._start, self._enough),
            (self._judged, self._many),
        ):
            now_failed, now_visited = failed - failed_before, visited - visited_before
            if now_failed > self._share * max(now_visited, enough):
                raise Spoilt(
                    f"{now_failed} of {now_visited} images could not be read, decoded or labelled, "
                    f"more than corpus.max_skipped = {self._share:g} allows; ledger.json counts "
                    "the reasons"
                )
        if visited - self._judged[1] >= self._many:
            self._judged = failed, visited
