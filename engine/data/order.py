"""Which samples are trained at which step: pure integers, no I/O, arrays over shards at most.

A pass visits units of exactly `block_samples` samples, permuted anew for every pass: a unit is a
whole block, or as many samples of the shards' short last blocks laid in a row. The order is cut
into `lanes` equal spans. Inside a lane, samples are shuffled within windows of several blocks.
Rank r of R trains lanes r, r + R, ...; a step takes batch / lanes samples of every lane, and the
last step is padded. Hence every sample comes exactly once a pass, all ranks make the same number of
steps, and step t holds the same samples at any world size.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from engine.data.permute import key_of, lengthened, permute, permute_each

_SHORT = 1 << 32  # keeps the place of a pass's short unit apart from other uses of the seed

__all__ = ["Block", "Blocks", "Order", "Share", "ranges"]


class Block(NamedTuple):
    """A run of consecutive samples of one shard: the unit of reading, labelling and accounting."""

    shard: int
    start: int
    length: int


class Share(NamedTuple):
    """What one rank trains at one step. Arrays are [b], b = batch / world size."""

    blocks: np.ndarray  # int64: number of the block in the corpus
    offsets: np.ndarray  # int64: position of the sample in its block
    valid: np.ndarray  # bool: False for the padding of the last step, which names any sample


@dataclass(frozen=True, eq=False)
class Blocks:
    """The blocks of a corpus: each shard cut in runs of `block_samples`, the last run shorter.

    Blocks are numbered through the shards, from 0. `shard_samples` is int64 [shards]; a shard may
    be empty.
    """

    shard_samples: np.ndarray
    block_samples: int

    @cached_property
    def _ends(self) -> np.ndarray:
        """Blocks up to and with each shard, int64 [shards]."""
        return np.cumsum(-(-self.shard_samples // self.block_samples))

    @cached_property
    def samples(self) -> int:
        """Samples of all blocks."""
        return int(self.shard_samples.sum())

    @cached_property
    def largest(self) -> int:
        """Samples of the largest block."""
        return min(self.block_samples, int(self.shard_samples.max(initial=0)))

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def at(self, block: int) -> Block:
        """Where a block lies."""
        assert 0 <= block < len(self)
        shard = int(np.searchsorted(self._ends, block, side="right"))
        before = int(self._ends[shard - 1]) if shard else 0
        start = (block - before) * self.block_samples
        samples = int(self.shard_samples[shard])
        return Block(shard, start, min(self.block_samples, samples - start))

    def holding(self, shards: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Blocks that hold some samples, by shard and position in it, int64 [n]."""
        cut = -(-self.shard_samples[shards] // self.block_samples)
        return self._ends[shards] - cut + positions // self.block_samples

    def lengths(self, blocks: np.ndarray) -> np.ndarray:
        """Samples of each of some blocks, int64 [n]."""
        shards = np.searchsorted(self._ends, blocks, side="right")
        after = self._ends[shards] - blocks - 1  # blocks of the same shard that follow
        short = self.shard_samples[shards] % self.block_samples
        return np.where((after > 0) | (short == 0), self.block_samples, short)


class _Row:
    """The samples of a corpus in a row: those of whole blocks, then those of short ones.

    Both in the order of the blocks, which have numbers of their own here: whole ones come first.
    """

    def __init__(self, blocks: Blocks) -> None:
        whole, short = np.divmod(blocks.shard_samples, blocks.block_samples)
        ends = np.cumsum(whole)
        self._block_samples = blocks.block_samples
        self._whole = int(whole.sum())
        # Of each short block: whole blocks before it, and its start among short blocks' samples.
        # One more ends both: int64 [short blocks + 1].
        self._before = np.append(ends[short > 0], self._whole)
        self._starts = np.append(0, np.cumsum(short[short > 0]))

    def numbers(self, places: np.ndarray) -> np.ndarray:
        """Numbers of the blocks that hold the samples at `places` of the row."""
        beyond = places - self._whole * self._block_samples
        short = np.searchsorted(self._starts, beyond, side="right") - 1
        return np.where(beyond < 0, places // self._block_samples, self._whole + short)

    def starts(self, numbers: np.ndarray) -> np.ndarray:
        """Places of the first samples of some blocks, by their numbers here."""
        short = np.maximum(numbers - self._whole, 0)
        whole = np.minimum(numbers, self._whole)
        return whole * self._block_samples + self._starts[short]

    def blocks(self, numbers: np.ndarray) -> np.ndarray:
        """Numbers in the corpus of some blocks, by their numbers here."""
        short = np.maximum(numbers - self._whole, 0)
        shorts_before = np.searchsorted(self._before, numbers, side="right")
        is_whole = numbers < self._whole
        return np.where(is_whole, numbers + shorts_before, self._before[short] + short)

    def torn(self) -> int:
        """Samples of the short blocks that lie in two units."""
        first, last = self._starts[:-1], self._starts[1:] - 1
        in_two = first // self._block_samples != last // self._block_samples
        return int((last - first + 1)[in_two].sum())


@dataclass(frozen=True, eq=False)
class Order:
    """The order of every pass over the blocks of a corpus."""

    blocks: Blocks
    lanes: int
    batch: int
    window_samples: int
    seed: int

    def __post_init__(self) -> None:
        assert self.batch % self.lanes == 0 and self.window_samples > 0

    @property
    def samples(self) -> int:
        """Samples of a pass."""
        return self.blocks.samples

    @property
    def lane_samples(self) -> int:
        """Samples of a lane; the last lanes may be shorter."""
        return -(-self.samples // self.lanes)

    @property
    def steps(self) -> int:
        """Steps of a pass, the same on all ranks."""
        return -(-self.lane_samples * self.lanes // self.batch)

    @cached_property
    def spread(self) -> float:
        """Samples of the blocks that a window takes from, for each of its own, on average: a block
        may lie in two units, which come far apart."""
        return 1 + self._row.torn() / max(self.samples, 1)

    @cached_property
    def _row(self) -> _Row:
        return _Row(self.blocks)

    def share(self, pass_: int, step: int, rank: int = 0, world: int = 1) -> Share:
        """The samples that `rank` of `world` trains at `step` of `pass_`."""
        assert self.lanes % world == 0 and 0 <= step < self.steps
        per_lane = self.batch // self.lanes
        within_P = np.arange(step * per_lane, (step + 1) * per_lane)
        places, valid = self._places(pass_, np.arange(rank, self.lanes, world), within_P)
        return Share(*self._located(pass_, places), valid)

    def coming(
        self, pass_: int, step: int, rank: int = 0, world: int = 1, afresh: bool = False
    ) -> list[tuple[int, int]]:
        """(pass, block) of the windows that this step brings into sight: those after the ones its
        lanes enter. Empty where no lane enters a window. At a pass's first step, and `afresh`,
        which is for a run's first step wherever it is, also the windows that the lanes are in."""
        per_lane = self.batch // self.lanes
        first = step * per_lane // self.window_samples
        last = ((step + 1) * per_lane - 1) // self.window_samples
        before = (step * per_lane - 1) // self.window_samples
        seen = step > 0 and not afresh
        lanes = np.arange(rank, self.lanes, world)
        found: dict[tuple[int, int], None] = {}
        for window in range(before + 2 if seen else first, last + 2):
            found.update(dict.fromkeys(self._window(pass_, lanes, window)))
        return list(found)

    def _window(self, pass_: int, lanes: np.ndarray, window: int) -> list[tuple[int, int]]:
        """(pass, block) of a window of some lanes. After a lane's last comes the next pass's first.
        A block is named as often as a unit or a lane has some of it."""
        starts, lengths = self._spans(lanes)
        first = window * self.window_samples
        sizes = np.clip(lengths - first, 0, self.window_samples)
        low, inside = starts + first, sizes > 0
        named = self._blocks_between(pass_, low[inside], (low + sizes - 1)[inside])
        found = [(pass_, block) for block in named.tolist()]
        over = (lengths > 0) & (window == -(-lengths // self.window_samples))
        return found + (self._window(pass_ + 1, lanes[over], 0) if over.any() else [])

    def _located(self, pass_: int, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Blocks, and offsets in them, of the samples at some places of the order of a pass."""
        slots, offsets = np.divmod(self._filled_up(pass_, places), self.blocks.block_samples)
        few_slots, which = np.unique(slots, return_inverse=True)
        units = self._units(pass_, few_slots)[which]
        in_row = units * self.blocks.block_samples + offsets
        numbers = self._row.numbers(in_row)
        return self._row.blocks(numbers), in_row - self._row.starts(numbers)

    def _blocks_between(self, pass_: int, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """Blocks of the samples from each place `low` to `high` of the order of a pass."""
        size = self.blocks.block_samples
        low, high = self._filled_up(pass_, low), self._filled_up(pass_, high)
        spans, slots = ranges(low // size, high // size)
        units = self._units(pass_, slots)
        # A span may begin or end within a unit, and a short unit ends with the row.
        first = units * size + np.maximum(low[spans] - slots * size, 0)
        last = units * size + np.minimum(high[spans] - slots * size, size - 1)
        last = np.minimum(last, self.samples - 1)
        _, numbers = ranges(self._row.numbers(first), self._row.numbers(last))
        return self._row.blocks(numbers)

    def _spans(self, lanes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First places of lanes in the order of a pass, and their lengths."""
        starts = lanes * self.lane_samples
        return starts, np.clip(self.samples - starts, 0, self.lane_samples)

    def _places(
        self, pass_: int, lanes: np.ndarray, within_P: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Places in the order of the pass of the lanes' samples number `within_P`, lane by lane,
        and which of them there are: the others are padding, at place 0."""
        starts, lengths = (column[:, None] for column in self._spans(lanes))
        valid = within_P < lengths
        windows_P = within_P // self.window_samples
        first_P = windows_P * self.window_samples
        index = np.where(valid, within_P - first_P, 0)
        sizes = np.clip(lengths - first_P, 1, self.window_samples)
        key = np.array(key_of(self.seed, pass_), np.uint64)
        keys = lengthened(lengthened(key, lanes[:, None]), windows_P)
        shuffled = permute_each(index.ravel(), sizes.ravel(), keys.ravel())
        places = starts + first_P + shuffled.reshape(valid.shape)
        return np.where(valid, places, 0).ravel(), valid.ravel()

    def _short_slot(self, pass_: int) -> int:
        """Where among the units of a pass the short one comes, if there is one; else their end."""
        whole, short = divmod(self.samples, self.blocks.block_samples)
        return key_of(self.seed, pass_, _SHORT) % (whole + 1) if short else whole

    def _filled_up(self, pass_: int, places: np.ndarray) -> np.ndarray:
        """Places of the order of a pass, as they were if its short unit were filled up."""
        size = self.blocks.block_samples
        short = self.samples % size
        behind = places >= self._short_slot(pass_) * size + short
        return places + behind * (-short % size)

    def _units(self, pass_: int, slots: np.ndarray) -> np.ndarray:
        """Numbers, along the row, of the units that come in some places of the order of a pass."""
        whole, gap = self.samples // self.blocks.block_samples, self._short_slot(pass_)
        others = np.where(slots == gap, 0, slots - (slots > gap))
        if not whole:
            return others
        return np.where(slots == gap, whole, permute(others, whole, self.seed, pass_))


def ranges(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All integers of the ranges `low` to `high`, both within; before them the range of each."""
    lengths = high - low + 1
    which = np.repeat(np.arange(len(low)), lengths)
    first = np.cumsum(lengths) - lengths
    return which, low[which] + np.arange(len(which)) - first[which]
