"""Time, memory and launches of a call, on a CPU or on the current CUDA device."""

import ctypes
import os
import statistics
import time
from collections.abc import Callable, Iterable
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

__all__ = ["Ceilings", "Launched", "Meter", "in_turn", "micros", "resident_bytes"]

Call = Callable[[], object]
T = TypeVar("T")
_L2 = 2**28  # bytes, several times any L2
_LEAST_S, _MOST_CALLS = 0.02, 50


class Ceilings(NamedTuple):
    """What this machine does of either kind of work at the most, measured."""

    flops_per_s: float  # of a large matrix product
    bytes_per_s: float  # of a large copy, counting bytes read and written


class Launched(NamedTuple):
    kernels: int  # copies and fills too
    seconds: float  # spent in them


class Meter:
    def __init__(self) -> None:
        self.cuda = torch.cuda.is_available()
        self.device = torch.device("cuda" if self.cuda else "cpu")
        self._l2 = torch.empty(_L2 if self.cuda else 0, dtype=torch.int8, device=self.device)
        self.memory = (
            "peak of CUDA's caching allocator" if self.cuda else "allocations of torch's profiler"
        )

    def warm(self, call: Call) -> int:
        """Calls it until it is compiled; how often to call it for one measurement."""
        for _ in range(3):
            call()
        once_s = self.seconds(call, 3)
        return max(1, min(_MOST_CALLS, round(_LEAST_S / once_s)))

    def seconds(self, call: Call, calls: int) -> float:
        """The median of some calls. CUDA: between events, with a cold L2, so that it is the GPU's
        time, plus the time in which the GPU waits for its next launch."""
        return statistics.median(self._times(call, calls))

    def _times(self, call: Call, calls: int) -> list[float]:
        if not self.cuda:
            return _wall(call, calls)
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        for start, end in events:
            self._l2.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1000 for start, end in events]

    def peak_bytes(self, call: Call) -> int:
        """The most that it held at a time, above what was there; what it returns counts. Memory of
        libraries' own, and workspaces which a first call has left, do not."""
        if not self.cuda:
            return _allocated(call)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before

    def peak_rss_bytes(self, call: Call) -> int:
        """On a CPU: the same of the process' resident memory, which has libraries' own in it."""
        ctypes.CDLL(None).malloc_trim(0)  # or it is served from what earlier calls have left
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
        before = _status_bytes("VmRSS")
        call()
        return _status_bytes("VmHWM") - before

    def launched(self, call: Call) -> Launched:
        """On a GPU, by the profiler, with a cold L2."""
        assert self.cuda
        self._l2.zero_()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            call()
            torch.cuda.synchronize()
        kernels = [
            event
            for event in profiler.events()
            if event.device_type == DeviceType.CUDA and not event.is_user_annotation
        ]
        return Launched(len(kernels), sum(k.time_range.elapsed_us() for k in kernels) / 1e6)

    def state(self) -> dict[str, object]:
        """The GPU's clock as it is now, or the CPU's threads and load."""
        if self.cuda:
            return {"clock_MHz": torch.cuda.clock_rate()}
        return {"threads": torch.get_num_threads(), "load_average": round(os.getloadavg()[0], 1)}

    def ceilings(self, dtype: torch.dtype) -> Ceilings:
        size, copied = (8192, 2**31) if self.cuda else (2048, 2**27)
        a = torch.randn(size, size, device=self.device).to(dtype)
        b, out = torch.randn_like(a), torch.empty_like(a)
        source = torch.empty(copied, dtype=torch.int8, device=self.device).fill_(1)
        target = torch.empty_like(source)

        def product() -> Any:
            return torch.mm(a, b, out=out)

        def copy() -> Any:
            return target.copy_(source)

        for call in (product, copy):
            self.warm(call)
        product_s, copy_s = min(self._times(product, 10)), min(self._times(copy, 10))
        return Ceilings(2 * size**3 / product_s, 2 * copied / copy_s)


def _wall(call: Call, calls: int) -> list[float]:
    found = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return found


def in_turn(sides: Iterable[T], number: int) -> list[T]:
    """The sides of a comparison, as round `number` goes through them: odd ones backwards, so that
    what drifts meanwhile strikes all alike."""
    return list(sides)[:: -1 if number % 2 else 1]


def micros(call: Call) -> float:
    """Microseconds of one call, on a CPU."""
    return 1e6 * _wall(call, 1)[0]


def resident_bytes() -> int:
    """Of this process."""
    return _status_bytes("VmRSS")


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def _allocated(call: Call) -> int:
    """The profiler tells of every allocation and release, in bytes and in time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = call()
    told = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    del kept
    held = accumulate(e.nbytes() for e in sorted(told, key=lambda e: e.start_ns()))
    return max(held, default=0)
