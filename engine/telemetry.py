"""What a run tells of itself: records as JSON lines, and what NVML says of the GPUs."""

import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pynvml

__all__ = ["GpuSampler", "Recorder", "Stopwatch", "gpu"]

_LONGEST = 1 << 20  # bytes of a record
log = logging.getLogger(__name__)


class Recorder:
    """Appends records to `metrics.jsonl`; each is on the disk's queue before record() returns.

    Where one cannot be written, as on a full disk, there are no more, and the run goes on.
    """

    def __init__(self, folder: Path) -> None:
        self._file = open(folder / "metrics.jsonl", "ab", buffering=0)
        _mend(Path(self._file.name))
        self._off = False

    def record(self, kind: str, **values: Any) -> None:
        if self._off:
            return
        line = json.dumps({"time": time.time(), "kind": kind, **values}).encode() + b"\n"
        try:
            self._off = self._file.write(line) < len(line)
            why = "No space left on device" if self._off else ""
        except OSError as error:
            self._off, why = True, str(error.strerror)
        if self._off:
            log.warning("%s: nothing more is recorded: %s", self._file.name, why)

    def close(self) -> None:
        self._file.close()


def _mend(file: Path) -> None:
    """Cuts off a record of which a full disk took but a part."""
    with open(file, "r+b") as opened:
        size = opened.seek(0, os.SEEK_END)
        opened.seek(max(0, size - _LONGEST))
        tail = opened.read(min(size, _LONGEST))
        if tail and not tail.endswith(b"\n"):
            opened.truncate(size - len(tail) + tail.rfind(b"\n") + 1)


class Stopwatch:
    """How long something takes, and how many bytes go through it. Safe for several threads."""

    def __init__(self) -> None:
        self.total_s, self._bytes, self._laps = 0.0, 0, 0
        self._recent_s: deque[float] = deque(maxlen=1000)
        self._lock = threading.Lock()

    @contextmanager
    def lap(self, size: int = 0) -> Iterator[None]:
        """Times its body, through which `size` bytes go."""
        started = time.perf_counter()
        yield
        took_s = time.perf_counter() - started
        with self._lock:
            self.total_s += took_s
            self._bytes += size
            self._laps += 1
            self._recent_s.append(took_s)

    def statement(self) -> dict[str, float]:
        """Laps, seconds and bytes in all; median and 99th percentile of the last thousand laps."""
        with self._lock:
            recent = sorted(self._recent_s) or [0.0]
            return {
                "laps": self._laps,
                "s": self.total_s,
                "p50_s": recent[len(recent) // 2],
                "p99_s": recent[len(recent) * 99 // 100],
                "bytes": self._bytes,
            }


class GpuSampler:
    """Means of GPU utilisation, memory and power since the last call, by a thread once a second.

    Where NVML is absent it says so in one line, and has nothing to tell.
    """

    def __init__(self, index: int, period_s: float = 1.0) -> None:
        self._samples: list[tuple[float, float, float]] = []
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        try:
            pynvml.nvmlInit()
            self._handle = _handle(index)
        except pynvml.NVMLError as error:
            log.warning("no GPU metrics: %s", error)
            return
        self._thread = threading.Thread(target=self._run, args=(period_s,), daemon=True)
        self._thread.start()

    def means(self) -> dict[str, float]:
        """gpu_utilisation (0..1), gpu_memory_bytes, gpu_power_w; empty without NVML."""
        samples, self._samples = self._samples, []
        if not samples:
            return {}
        columns = [sum(column) / len(samples) for column in zip(*samples, strict=True)]
        return dict(
            zip(("gpu_utilisation", "gpu_memory_bytes", "gpu_power_w"), columns, strict=True)
        )

    def close(self) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join()
            pynvml.nvmlShutdown()

    def _run(self, period_s: float) -> None:
        while not self._stop.wait(period_s):
            try:
                used = pynvml.nvmlDeviceGetUtilizationRates(self._handle).gpu / 100
                memory = float(pynvml.nvmlDeviceGetMemoryInfo(self._handle).used)
                power_w = pynvml.nvmlDeviceGetPowerUsage(self._handle) / 1000
            except pynvml.NVMLError as error:  # some GPUs, and parts of GPUs, tell less
                log.warning("no more GPU metrics: %s", error)
                return
            self._samples.append((used, memory, power_w))


def gpu() -> str:
    """Model and driver of the node's first GPU; empty where NVML finds none."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ""
    try:
        name = pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(0))
        return f"{name}, driver {pynvml.nvmlSystemGetDriverVersion()}"
    except pynvml.NVMLError:
        return ""
    finally:
        pynvml.nvmlShutdown()


def _handle(index: int):
    """NVML's handle of a CUDA device: NVML does not heed CUDA_VISIBLE_DEVICES, which Ray sets."""
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    name = visible[index] if visible else str(index)
    if name.isdigit():
        return pynvml.nvmlDeviceGetHandleByIndex(int(name))
    return pynvml.nvmlDeviceGetHandleByUUID(name)
