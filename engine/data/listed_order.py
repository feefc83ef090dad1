"""The order of a run that trains on some samples of a corpus alone."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from engine.config import CorpusConfig
from engine.data.order import Blocks, Order, ranges
from engine.data.permute import permute
from engine.data.sample_list import SampleList

__all__ = ["ListedOrder", "order_of"]


@dataclass(frozen=True, eq=False)
class ListedOrder(Order):
    """The order of every pass over the listed samples of a corpus, and no others.

    A pass visits the blocks that hold some, permuted anew for every pass, and of each its listed
    samples. Lanes, windows and steps are those of Order, over these samples; and a sample's id is
    the one that it has in the whole corpus, for which views are drawn and labels are recorded. A
    pass takes 16 bytes of memory a block.
    """

    listed: SampleList

    @property
    def samples(self) -> int:
        return self.listed.samples

    @cached_property
    def spread(self) -> float:
        """Blocks are read, and labelled by others, as wholes."""
        return int(self.blocks.lengths(self.listed.used).sum()) / self.samples

    @cached_property
    def _laid(self) -> Callable[[int], tuple[np.ndarray, np.ndarray]]:
        """_lay(), of a pass and of the next, whose first windows are announced in it."""
        return lru_cache(maxsize=2)(self._lay)

    def _lay(self, pass_: int) -> tuple[np.ndarray, np.ndarray]:
        """The blocks in the order of a pass, and listed samples up to and with each."""
        used = self.listed.used
        blocks = used[permute(np.arange(len(used)), len(used), self.seed, pass_)]
        return blocks, np.cumsum(self.listed.counts[blocks])

    def _located(self, pass_: int, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        laid, ends = self._laid(pass_)
        slots = np.searchsorted(ends, places, side="right")
        blocks, offsets = laid[slots], np.empty_like(places)
        ranks = places - ends[slots] + self.listed.counts[blocks]  # among the block's listed ones
        for block in np.unique(blocks):
            rows = blocks == block
            offsets[rows] = self.listed.offsets(int(block))[ranks[rows]]
        return blocks, offsets

    def _blocks_between(self, pass_: int, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        laid, ends = self._laid(pass_)
        first, last = (np.searchsorted(ends, places, side="right") for places in (low, high))
        return laid[ranges(first, last)[1]]


def order_of(
    config: CorpusConfig, blocks: Blocks, listed: SampleList | None, batch: int, seed: int
) -> Order:
    """The order of passes over the blocks of a corpus, or over its listed samples."""
    told = (blocks, config.lanes, batch, config.window_blocks * config.block_samples, seed)
    return ListedOrder(*told, listed) if listed else Order(*told)
