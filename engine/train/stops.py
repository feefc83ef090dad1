"""When all workers are to stop, at one step: to drain a run, or because it is another driver's."""

import signal
import threading
from collections import deque
from enum import IntEnum
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor

from engine import lease
from engine.progress import say

__all__ = ["Stop", "Stopped", "Stops", "hear_sigterm"]

_PERIOD_S = 0.5  # between looks at the lease
_LAG = 2  # steps, on a GPU, until it is known what was asked: then nobody waits for its answer

_told = threading.Event()


class Stop(IntEnum):
    """Why to stop; where several reasons meet, the largest counts."""

    NONE = 0
    WORKER = 1  # a worker has heard SIGTERM: all commit, and are started again
    DRIVER = 2  # the driver has: all commit, and the run ends
    LOST = 3  # the run has been taken over: nothing more is written


_STOPS: dict[lease.State, Stop] = {
    "held": Stop.NONE,
    "draining": Stop.DRIVER,
    "lost": Stop.LOST,
}


class Stopped(Exception):
    """All workers stop, after `step` steps."""

    def __init__(self, stop: Stop, step: int) -> None:
        super().__init__(stop, step)
        self.stop, self.step = stop, step


def hear_sigterm() -> None:
    """From now on SIGTERM asks this worker's gang to stop; a second one does what it did before.
    To be called in a main thread."""
    before = signal.getsignal(signal.SIGTERM)

    def hear(number: int, frame: FrameType | None) -> None:
        _told.set()
        signal.signal(signal.SIGTERM, before)

    signal.signal(signal.SIGTERM, hear)


class Stops:
    """What the workers of a gang agree on. Rank 0 looks at the lease of the run folder, which
    `owner` has taken; where there is no owner, nobody does."""

    def __init__(self, folder: Path, owner: str, device: torch.device) -> None:
        self._folder, self._owner, self._device = folder, owner, device
        self._reads = bool(owner) and dist.get_rank() == 0
        self._seen = Stop.NONE
        self._coming: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stops", daemon=True)
        if self._reads:
            self._thread.start()

    def agreed(self) -> Stop:
        """What was asked at this step, or on a GPU a few before. Every worker calls it once a
        step."""
        flag = self._everyones()
        if self._device.type != "cuda":
            return Stop(int(flag))
        host = torch.empty(1, pin_memory=True).copy_(flag, non_blocking=True)
        copied = torch.cuda.Event(blocking=True)  # a core that spins is one less to decode
        copied.record()
        self._coming.append((host, copied))
        if len(self._coming) <= _LAG:
            return Stop.NONE
        host, copied = self._coming.popleft()
        copied.synchronize()
        return Stop(int(host))

    def now(self) -> Stop:
        """What is asked at this moment, by a look at the lease, if it can be read. Every worker
        calls it."""
        if self._reads:
            self._try_to_look()
        return Stop(int(self._everyones()))

    def require_held(self) -> None:
        """For the process that writes, just before it commits. Raises OSError where the run has
        been taken over, or where that cannot be told."""
        if self._reads:
            self._look()
            if self._seen is Stop.LOST:
                raise OSError(f"{self._folder} has been taken over by another driver")

    def close(self) -> None:
        self._ended.set()
        if self._reads:
            self._thread.join()

    def _everyones(self) -> Tensor:
        asked = max(self._seen, Stop.WORKER if _told.is_set() else Stop.NONE)
        flag = torch.full((1,), float(asked), device=self._device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return flag

    def _look(self) -> None:
        self._seen = _STOPS[lease.state(self._folder, self._owner)]

    def _watch(self) -> None:
        while not self._ended.wait(_PERIOD_S):
            self._try_to_look()

    def _try_to_look(self) -> None:
        try:
            self._look()
        except OSError as error:
            say(f"warning: the lease of {self._folder} cannot be read: {error}")
