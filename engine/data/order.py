"""Which samples are trained at which step: pure integers, no I/O.

The blocks of a corpus are permuted for every pass; the samples of the permuted blocks, in a row,
are the order of the pass. It is cut into `lanes` equal spans. Inside a lane, samples are shuffled
within windows of several blocks. Rank r of R trains lanes r, r + R, ...; a step takes batch / lanes
samples of every lane, and the last step is padded. Hence every sample comes exactly once a pass,
all ranks make the same number of steps, and step t holds the same samples at any world size.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

_64_BITS = 0xFFFFFFFFFFFFFFFF

__all__ = ["Block", "Order", "Share", "cut_blocks", "permute"]


class Block(NamedTuple):
    """A run of consecutive samples of one shard: the unit of reading, labelling and accounting."""

    shard: int
    start: int
    length: int


class Share(NamedTuple):
    """What one rank trains at one step. Arrays are [b], b = batch / world size."""

    blocks: np.ndarray  # int64: number of the block in the corpus
    offsets: np.ndarray  # int64: position of the sample in its block
    valid: np.ndarray  # bool: False for the padding of the last step


def cut_blocks(shard_samples: np.ndarray, block_samples: int) -> np.ndarray:
    """Blocks of a corpus as rows (shard, start, length), int64 [n, 3], from its shards' sizes."""
    per_shard = -(-shard_samples // block_samples)
    shard = np.repeat(np.arange(len(shard_samples)), per_shard)
    first = np.repeat(np.cumsum(per_shard) - per_shard, per_shard)
    start = (np.arange(len(shard)) - first) * block_samples
    count = np.minimum(block_samples, shard_samples[shard] - start)
    return np.stack([shard, start, count], axis=1).astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele, Lea, Flood 2014): a bijection of 64-bit words."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _mix_int(x: int) -> int:
    """_mix() of one word, without numpy's cost of a call."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _64_BITS
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _64_BITS
    return x ^ (x >> 31)


def _key(words: tuple[int, ...]) -> int:
    state = 0
    for word in words:
        state = _mix_int(state ^ _mix_int((word * 0x9E3779B97F4A7C15 + 1) & _64_BITS))
    return state


def permute(index: np.ndarray, size: int, *key: int) -> np.ndarray:
    """Images of `index` (ints in [0, size)) under a keyed bijection of [0, size).

    A six-round Feistel network over the next even number of bits, walked until it lands inside the
    range (Black and Rogaway 2002): constant memory at any size, and the same on every machine.
    """
    assert len(index) == 0 or (index.min() >= 0 and index.max() < size)
    bits = max(2, int(size - 1).bit_length())
    half = np.uint64((bits + 1) // 2)
    low = np.uint64((1 << int(half)) - 1)
    keys = [np.uint64(_key((*key, round_))) for round_ in range(6)]

    def rounds(x: np.ndarray) -> np.ndarray:
        left, right = x >> half, x & low
        for round_key in keys:
            left, right = right, left ^ (_mix(right + round_key) & low)
        return (left << half) | right

    with np.errstate(over="ignore"):
        out = rounds(index.astype(np.uint64))
        while (outside := out >= size).any():
            out[outside] = rounds(out[outside])
    return out.astype(np.int64)


@dataclass(frozen=True)
class Order:
    """The order of every pass over a corpus whose blocks hold `counts` samples (int64 [n])."""

    counts: np.ndarray
    lanes: int
    batch: int
    window_samples: int
    seed: int

    def __post_init__(self) -> None:
        assert self.batch % self.lanes == 0 and self.window_samples > 0
        object.__setattr__(self, "_pass", lru_cache(maxsize=2)(self._permuted_blocks))

    @property
    def samples(self) -> int:
        """Samples of a pass."""
        return int(self.counts.sum())

    @property
    def lane_samples(self) -> int:
        """Samples of a lane; the last lanes may be shorter."""
        return -(-self.samples // self.lanes)

    @property
    def steps(self) -> int:
        """Steps of a pass, the same on all ranks."""
        return -(-self.lane_samples * self.lanes // self.batch)

    def _permuted_blocks(self, pass_: int) -> tuple[np.ndarray, np.ndarray]:
        n = len(self.counts)
        blocks = permute(np.arange(n), n, self.seed, pass_)
        return blocks, np.cumsum(self.counts[blocks])

    def share(self, pass_: int, step: int, rank: int = 0, world: int = 1) -> Share:
        """The samples that `rank` of `world` trains at `step` of `pass_`."""
        assert self.lanes % world == 0 and 0 <= step < self.steps
        per_lane = self.batch // self.lanes
        within = np.arange(step * per_lane, (step + 1) * per_lane)
        places = [self._places(pass_, lane, within) for lane in range(rank, self.lanes, world)]
        place = np.concatenate(places)
        valid = place >= 0
        blocks, ends = self._pass(pass_)  # type: ignore[attr-defined]
        slot = np.searchsorted(ends, np.where(valid, place, 0), side="right")
        block = blocks[slot]
        offset = np.where(valid, place - (ends[slot] - self.counts[block]), 0)
        return Share(block, offset, valid)

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
        windows = range(before + 2 if seen else first, last + 2)
        found: dict[tuple[int, int], None] = {}
        for window in windows:
            for lane in range(rank, self.lanes, world):
                found.update(dict.fromkeys(self._window(pass_, lane, window)))
        return list(found)

    def _window(self, pass_: int, lane: int, window: int) -> list[tuple[int, int]]:
        start, length = self._span(lane)
        first = window * self.window_samples
        if first >= length:
            return self._window(pass_ + 1, lane, 0) if window and length else []
        size = min(self.window_samples, length - first)
        blocks, ends = self._pass(pass_)  # type: ignore[attr-defined]
        low, high = np.searchsorted(ends, [start + first, start + first + size - 1], side="right")
        return [(pass_, int(block)) for block in blocks[low : high + 1]]

    def _span(self, lane: int) -> tuple[int, int]:
        """First place of a lane in the order of a pass, and its length."""
        start = lane * self.lane_samples
        return start, max(0, min(self.lane_samples, self.samples - start))

    def _places(self, pass_: int, lane: int, within: np.ndarray) -> np.ndarray:
        """Places in the order of the pass of a lane's samples number `within`; -1: padding."""
        start, length = self._span(lane)
        place = np.full(len(within), -1, np.int64)
        inside = within < length
        for window in np.unique(within[inside] // self.window_samples):
            first = int(window) * self.window_samples
            size = min(self.window_samples, length - first)
            here = inside & (within // self.window_samples == window)
            shuffled = permute(within[here] - first, size, self.seed, pass_, lane, int(window))
            place[here] = start + first + shuffled
        return place
