"""What torch.profiler saw of some steps: how busy the GPU was, and with what.

Only sums over intervals are kept; no trace is written.
"""

import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

__all__ = ["Gap", "Interval", "Summary", "Tracer", "busy_s", "gaps", "lines", "summary"]

_LISTED = 10


class Interval(NamedTuple):
    """A kernel, copy or fill on a GPU; or, on a CPU, an operator's own time."""

    name: str
    start_s: float
    end_s: float


class Gap(NamedTuple):
    """In which the GPU does nothing."""

    seconds: float
    after: str  # what ended before it, and began after it
    before: str


class Summary(NamedTuple):
    wall_s: float
    busy: float | None  # share of the wall time in which any kernel ran; None on a CPU
    gaps: list[Gap]  # the longest
    top: list[tuple[str, float, int]]  # by their time: name, seconds in all, how often
    total_s: float  # of all kernels or operators


def busy_s(intervals: Iterable[Interval]) -> float:
    """Length of the union: streams overlap."""
    total, until = 0.0, float("-inf")
    for one in sorted(intervals, key=lambda one: one.start_s):
        total += max(0.0, one.end_s - max(one.start_s, until))
        until = max(until, one.end_s)
    return total


def gaps(intervals: Iterable[Interval]) -> list[Gap]:
    """Between the first and the last, the longest first."""
    found: list[Gap] = []
    last: Interval | None = None  # to end, so far
    for one in sorted(intervals, key=lambda one: one.start_s):
        if last and one.start_s > last.end_s:
            found.append(Gap(one.start_s - last.end_s, last.name, one.name))
        if last is None or one.end_s > last.end_s:
            last = one
    return sorted(found, key=lambda gap: -gap.seconds)


def summary(intervals: Sequence[Interval], wall_s: float, on_gpu: bool) -> Summary:
    """Of what happened within so many seconds."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for one in intervals:
        seconds[one.name].append(one.end_s - one.start_s)
    top = [(name, sum(spent), len(spent)) for name, spent in seconds.items()]
    top.sort(key=lambda row: -row[1])
    return Summary(
        wall_s,
        busy_s(intervals) / wall_s if on_gpu else None,
        gaps(intervals)[:_LISTED] if on_gpu else [],
        top[:_LISTED],
        sum(row[1] for row in top),
    )


def lines(found: Summary, steps: int) -> Iterable[str]:
    """A short table."""
    kind = "operator" if found.busy is None else "kernel"
    yield f"  {steps} steps in {found.wall_s:.3f} s"
    if found.busy is not None:
        yield f"  the GPU is busy for {found.busy:.1%}; the longest gaps:"
        yield from (
            f"  {1000 * gap.seconds:>9.3f} ms  after {gap.after[:40]}, before {gap.before[:40]}"
            for gap in found.gaps[:5]
        )
    yield f"  {'ms a step':>11}{'share':>8}{'calls':>7}  {kind}"
    for name, seconds, calls in found.top:
        share = seconds / found.total_s
        yield f"  {1000 * seconds / steps:>11.3f}{share:>8.1%}{calls / steps:>7.0f}  {name[:70]}"


class Tracer:
    """Sees what lies between start() and stop(), both called on the thread that launches it.

    On a GPU the kernels alone: operators would be traced at the cost of launches. On a CPU the
    operators of all threads, each less those that it calls.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        kind = ProfilerActivity.CUDA if self._on_gpu else ProfilerActivity.CPU
        self._profiler = profile(activities=[kind])
        self._began = self._wall_s = 0.0

    def start(self) -> None:
        self._settle()
        self._profiler.start()
        self._began = time.perf_counter()

    def stop(self) -> None:
        self._settle()
        self._wall_s = time.perf_counter() - self._began
        self._profiler.stop()

    def summary(self) -> Summary:
        return summary(self._intervals(), self._wall_s, self._on_gpu)

    def _intervals(self) -> list[Interval]:
        if self._on_gpu:
            return [
                Interval(one.name, one.time_range.start / 1e6, one.time_range.end / 1e6)
                for one in self._profiler.events()
                if one.device_type == DeviceType.CUDA and not one.is_user_annotation
            ]
        return [
            Interval(one.name, 0.0, one.self_cpu_time_total / 1e6)
            for one in self._profiler.events()
            if one.device_type == DeviceType.CPU
        ]

    def _settle(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()
