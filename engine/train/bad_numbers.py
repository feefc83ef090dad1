"""Steps whose loss or gradients were not finite: counted on the device, looked at now and then."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.data.order import Order
from engine.train.health import Collapse

__all__ = [
    "NotFinite",
    "Streak",
    "require_finite",
    "require_updates",
    "samples_of",
    "write_samples",
]


class NotFinite(Collapse):
    """No worker could learn from any of `steps`, the last ones."""

    def __init__(self, steps: range) -> None:
        super().__init__(
            f"loss or gradients were not finite in {len(steps)} steps in a row, {steps.start} to "
            f"{steps.stop - 1}"
        )
        self.steps = steps


class Streak:
    """In how many steps up to now, in a row, this worker's loss or gradients were not finite.

    `length` is int64 [], on the device, so that no step waits for it. Its minimum over all workers
    is in how many steps nobody learned anything.
    """

    def __init__(self, device: torch.device, length: int = 0) -> None:
        self.length = torch.full((), length, dtype=torch.int64, device=device)

    def add(self, not_finite: Tensor) -> None:
        """Takes in a step. `not_finite`: [], 0 or 1, as the last number of StudentTrainer.step()
        is."""
        self.length = torch.where(not_finite > 0, self.length + 1, 0)


def require_updates(length: int, done: int, most: int) -> None:
    """Raises NotFinite for a streak, over all workers, of `most` steps or more. `done` are the
    steps of the run up to now."""
    if length >= most:
        raise NotFinite(range(done - length, done))


def require_finite(state: Mapping[str, Tensor]) -> None:
    """Raises Collapse where a weight, or what an optimizer keeps of one, is not finite."""
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise Collapse(f"{name} is not finite")


def samples_of(order: Order, steps: range) -> Iterator[tuple[int, int, int]]:
    """Step of the run, shard and position of every sample of some steps, of all workers."""
    for step in steps:
        pass_, within = divmod(step, order.steps)
        share = order.share(pass_, within, 0, 1)
        for row in np.flatnonzero(share.valid).tolist():
            shard, start, _ = order.blocks.at(int(share.blocks[row]))
            yield step, shard, start + int(share.offsets[row])


def write_samples(file: Path, order: Order, steps: range, shards: Sequence[str]) -> None:
    """Writes the samples of some steps, a JSON line each, for who looks into them. `shards`: the
    corpus's own names of its shards."""
    with open(file, "w") as out:
        for step, shard, position in samples_of(order, steps):
            told = {"step": step, "shard": shards[shard], "position": position}
            out.write(json.dumps(told) + "\n")
