"""What a run tells of itself: records as JSON lines, and what NVML says of the GPUs."""

import json
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

import pynvml

__all__ = ["GpuSampler", "Recorder", "Stopwatch", "gpu"]

_LONGEST = 1 << 20  # bytes of a record
_AGAIN_S = 30.0
_NVML_S = 2.0  # for its last answer: of a driver that hangs there is none
log = logging.getLogger(__name__)


class Recorder:
    """Appends records to a file, as JSON lines; each is on the disk's queue before record()
    returns.

    Where one cannot be written, as on a full disk, it and those of the next half minute are left
    out, and the run goes on.
    """

    def __init__(self, file: Path) -> None:
        self._path = file
        self._file: FileIO | None = None
        self._again_s = 0.0  # of time.monotonic(): when to try again
        self._open()

    def record(self, kind: str, **values: Any) -> None:
        if not self._file and time.monotonic() >= self._again_s:
            self._open()
        if not self._file:
            return
        line = json.dumps({"time": time.time(), "kind": kind, **values}).encode() + b"\n"
        try:
            if self._file.write(line) < len(line):
                self._wait("No space left on device")
        except OSError as error:
            self._wait(error.strerror)

    def close(self) -> None:
        self._again_s = math.inf
        if self._file:
            self._file.close()
            self._file = None

    def _open(self) -> None:
        try:
            self._path.parent.mkdir(exist_ok=True)
            self._file = open(self._path, "ab", buffering=0)
            _mend(self._path)
        except OSError as error:
            self._wait(error.strerror)

    def _wait(self, why: str | None) -> None:
        first = not self._again_s
        self.close()
        self._again_s = time.monotonic() + _AGAIN_S
        if first:
            log.warning("%s: not recorded, and tried again later: %s", self._path, why)


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
    """Samples a GPU's utilisation, memory and power once a second, by a thread.

    Where there is nothing to sample, `absent` says why.
    """

    def __init__(self, index: int | None, period_s: float = 1.0) -> None:
        """Of the CUDA device `index` of this process; of none, where it has none."""
        self._samples: deque[tuple[float, ...]] = deque(maxlen=1000)  # each with its time
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.absent = ""
        if index is None:
            self.absent = "the run is on the CPU"
            return
        try:
            pynvml.nvmlInit()
            self._handle = _handle(index)
        except pynvml.NVMLError as error:
            self.absent = str(error)
            return
        self._thread = threading.Thread(target=self._run, args=(period_s,), daemon=True)
        self._thread.start()

    def means(self, past_s: float) -> dict[str, float]:
        """Over the last `past_s` seconds, or else of the last sample: gpu_utilisation (0..1),
        gpu_memory_bytes, gpu_power_w; empty where there is none."""
        everything = list(self._samples)
        since = time.monotonic() - past_s
        samples = [told for at, *told in everything if at >= since]
        samples = samples or [told for _, *told in everything[-1:]]
        names = ("gpu_utilisation", "gpu_memory_bytes", "gpu_power_w")
        columns = zip(*samples, strict=True)
        return {n: sum(c) / len(samples) for n, c in zip(names, columns, strict=False)}

    def statement(self, past_s: float) -> dict[str, Any]:
        """The means, or, under `no_gpu`, why there are none."""
        return {**self.means(past_s)} or {"no_gpu": self.absent}

    def close(self) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join(_NVML_S)
            if not self._thread.is_alive():
                pynvml.nvmlShutdown()

    def _run(self, period_s: float) -> None:
        while True:
            try:
                used = pynvml.nvmlDeviceGetUtilizationRates(self._handle).gpu / 100
                memory = float(pynvml.nvmlDeviceGetMemoryInfo(self._handle).used)
                power_w = pynvml.nvmlDeviceGetPowerUsage(self._handle) / 1000
            except pynvml.NVMLError as error:  # some GPUs, and parts of GPUs, tell less
                self.absent = str(error)
                return
            self._samples.append((time.monotonic(), used, memory, power_w))
            if self._stop.wait(period_s):
                return


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
