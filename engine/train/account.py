"""What the steps of a run have come to: added up on the device, and looked at now and then."""

import time
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from engine.config import CorpusConfig, TrainConfig
from engine.data.loader import Batch
from engine.data.order import Order
from engine.train.bad_numbers import Streak, require_updates
from engine.train.checkpoint import Checkpoint
from engine.train.health import Health
from engine.train.ledger import Ledger, Watch

__all__ = ["Account", "Totals"]


class Totals(NamedTuple):
    """Of all workers, over the steps since the last look; the last four, over the whole run."""

    images: int  # that were trained
    kl: float  # summed over them, as are the next two
    agreeing: float  # whose highest class is the teacher's
    loss: float
    steps: int  # of workers, which count one by one, as here:
    not_finite: int  # steps whose loss or gradients were not
    took_s: float
    failed: int  # samples that could not be used, against what the index said
    visited: int  # samples
    streak: int  # the latest steps from which no worker could learn
    done: int  # steps of the run

    def record(self) -> dict[str, Any]:
        """Means over images, and their number a second."""
        count = max(self.images, 1)
        return {
            "loss": self.loss / count,
            "kl": self.kl / count,
            "agreement": self.agreeing / count,
            "not_finite": self.not_finite,
            "images_per_second": self.images / self.took_s,
        }


class Account:
    """A worker's account of a run; totals, and what is judged of them, are the same on all."""

    def __init__(
        self,
        start: Checkpoint | None,
        order: Order,
        config: TrainConfig,
        data: CorpusConfig,
        classes: int,
        device: torch.device,
    ) -> None:
        self._config, self._classes, self._device = config, classes, device
        before = start.ledger if start else Ledger()
        # What earlier lives of the run have done is counted once, by rank 0.
        self.ledger = Ledger.total([before] if dist.get_rank() == 0 else [])
        self.health = start.health if start else Health()
        self._watch = Watch(data.max_skipped, order.samples, order.blocks.largest, before)
        self._streak = Streak(device, self.health.streak)
        self._sums = torch.zeros(6, dtype=torch.float64, device=device)  # counts are exact
        self._looked_at = start.step if start else 0
        self._then = time.perf_counter()

    def add(self, batch: Batch, trained_B: np.ndarray, sums: Tensor) -> None:
        """Takes in a step, of which StudentTrainer.step() gave `sums`, without waiting for it."""
        self.ledger.add(batch, trained_B)
        self._sums += sums
        self._streak.add(sums[-1])

    def settle(self, done: int) -> Totals:
        """Adds up all workers' steps since the last time; `done` are those of the run. From then on
        the ledger counts as trained what was learned from. Every worker calls it."""
        seen = torch.tensor([self.ledger.failed, self.ledger.visited], device=self._device)
        sums = torch.cat([self._sums, seen])
        dist.all_reduce(sums)
        streak = self._streak.length.clone()
        dist.all_reduce(streak, dist.ReduceOp.MIN)
        images, kl, agreeing, loss, lost, not_finite, failed, visited = sums.tolist()
        if dist.get_rank() == 0:
            self.ledger.lose(int(lost))
        now = time.perf_counter()
        totals = Totals(
            int(images),
            kl,
            agreeing,
            loss,
            (done - self._looked_at) * dist.get_world_size(),
            int(not_finite),
            now - self._then,
            int(failed),
            int(visited),
            int(streak),
            done,
        )
        self._sums.zero_()
        self._looked_at, self._then = done, now
        return totals

    def judge(self, totals: Totals) -> None:
        """Raises Collapse, its NotFinite, or Spoilt."""
        self.health.observe(
            totals.images,
            totals.kl,
            totals.agreeing,
            totals.steps,
            totals.not_finite,
            totals.streak,
            classes=self._classes,
            enough=self._config.judge_images,
        )
        require_updates(totals.streak, totals.done, self._config.max_not_finite)
        self._watch.require_usable(totals.failed, totals.visited)
