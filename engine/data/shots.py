"""The few labelled samples of stage I, held in memory as one block."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.config import UserError
from engine.data.corpus import Corpus, Sample
from engine.data.order import Share
from engine.data.permute import permute

__all__ = ["Shots", "choose"]

_CHOICE, _ORDER = 0, 1  # keep the two uses of a seed apart


@dataclass(frozen=True)
class Shots:
    """Labelled samples; read like a corpus of one block."""

    samples: Sequence[Sample]

    def block_bytes(self, block: int) -> int:
        return sum(len(sample.data) for sample in self.samples if sample.data)

    def read(self, block: int) -> Sequence[Sample]:
        assert block == 0
        return self.samples

    def share(self, pass_: int, step: int, batch: int, seed: int) -> Share:
        """The samples of a step: a pass visits all in another order, but for the last few that do
        not fill a batch (as the reference's loader drops them)."""
        places = np.arange(step * batch, (step + 1) * batch)
        offsets = permute(places, len(self.samples), seed, _ORDER, pass_)
        return Share(np.zeros(batch, np.int64), offsets, np.ones(batch, bool))

    def steps(self, batch: int) -> int:
        """Steps of a pass."""
        return len(self.samples) // batch


def choose(corpus: Corpus, classes: int, shots: int, seed: int, field: str) -> Shots:
    """`shots` samples of each of the first `classes` labels, a pure function of the seed.

    A class with fewer gives all it has. Raises UserError, naming `field`, for a class with none.
    """
    found = [
        np.stack([np.full(len(labels), shard), np.arange(len(labels)), labels], axis=1)
        for shard in range(len(corpus.shards))
        if len(labels := corpus.labels(shard))
    ]
    ids = np.concatenate(found)
    chosen = []
    for label in range(classes):
        own = ids[ids[:, 2] == label]
        if not len(own):
            raise UserError(f"{field}: no sample has label {label}, of {classes} classes to learn")
        order = permute(np.arange(len(own)), len(own), seed, _CHOICE, label)
        chosen.append(own[order[:shots]])
    wanted = np.concatenate(chosen)
    samples: list[Sample] = []
    for shard in np.unique(wanted[:, 0]).tolist():
        positions = wanted[wanted[:, 0] == shard, 1].tolist()
        samples += corpus.pick(shard, sorted(positions))
    return Shots(tuple(samples))
