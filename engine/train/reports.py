"""What a student worker tells of itself now and then: what it has waited for, and its GPU."""

import socket
import time
from pathlib import Path

from engine.data.loader import Loader
from engine.labels.targets import TargetSource
from engine.telemetry import GpuSampler, Recorder
from engine.train.ledger import Ledger

__all__ = ["Reports"]

_PERIOD_S = 5.0


class Reports:
    """Writes `telemetry/worker-RANK.jsonl` of a run folder: at most every five seconds, what has
    become of the time since the last one. It asks nobody, and nobody waits for it."""

    def __init__(
        self,
        folder: Path,
        rank: int,
        source: TargetSource,
        loader: Loader,
        ledger: Ledger,
        gpu: GpuSampler,
    ) -> None:
        self._rank, self._source, self._loader, self._ledger = rank, source, loader, ledger
        self._gpu, self._host = gpu, socket.gethostname()
        self._recorder = Recorder(folder / "telemetry" / f"worker-{rank}.jsonl")
        self._told_s = float("-inf")
        self._before = self._now()

    def tell(self, step: int, last: bool) -> None:
        """After `step` steps of the run; the first time, the `last` and when it is time."""
        now = self._now()
        if not last and now[0] < self._told_s + _PERIOD_S:
            return
        span_s, labels_s, data_s, images = (
            one - other for one, other in zip(now, self._before, strict=True)
        )
        self._told_s, self._before = now[0], now
        self._recorder.record(
            "worker",
            rank=self._rank,
            host=self._host,
            step=step,
            span_s=span_s,
            labels_s=labels_s,
            data_s=data_s,
            images=max(images, 0),  # some may turn out not to have been learned from
            skipped=self._ledger.skipped,
            **self._gpu.statement(span_s),
        )

    def close(self) -> None:
        self._recorder.close()

    def _now(self) -> tuple[float, float, float, int]:
        """The time, and all that has been waited and trained up to it."""
        waited = self._source.waited_s, self._loader.waited_s
        return time.monotonic(), *waited, self._ledger.trained
