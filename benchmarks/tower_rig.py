"""Rounds through the providers of a case, for `bench_towers`."""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from meters import Meter, in_turn
from rows import Bench

from engine.clip.towers import DTYPES

__all__ = ["Call", "Plan", "Rig", "Tower", "Work", "compare"]

Call = Callable[[], object]
_MOST_CALLS = 50


class Tower(NamedTuple):
    """A size of the case `teacher`."""

    model: str
    images: int
    precisions: tuple[str, ...] = ()  # eager and compiled; (): the product's own choice, eager


class Plan(NamedTuple):
    """Sizes on a kind of machine."""

    towers: tuple[Tower, ...]
    pair: tuple[str, str]  # teacher and student of all else
    student: int  # images
    tricks: int
    steps: tuple[int, ...]
    classes: int
    rounds: int
    long_rounds: int  # where a call takes up to a minute
    least_s: float  # of one measurement
    resident: bool = True  # the reference's step once more, with images in memory


class Work(NamedTuple):
    """A provider's part in a case."""

    make: Callable[[], Call]
    images: int  # of a call
    gflops: float  # of an image
    precision: str  # that of most of it
    compiled: bool = False


class Found(NamedTuple):
    call: Call
    calls: int  # of one measurement
    first_s: float  # 0 where it is not made beforehand
    peaks: list[int]
    seconds: list[float]  # of a call, in every round


class Rig:
    """What all cases measure with, and the medians of what they found."""

    def __init__(self, meter: Meter, plan: Plan, bench: Bench) -> None:
        self.meter, self.plan, self.bench, self.device = meter, plan, bench, meter.device
        self.told: dict[tuple[str, str, str], float] = {}  # by case, provider and metric
        self._ceilings: dict[torch.dtype, float] = {}

    def ceiling(self, precision: str) -> float:
        """FLOP/s of a large matrix product."""
        dtype = DTYPES.get(precision, torch.bfloat16)
        if dtype not in self._ceilings:
            self._ceilings[dtype] = self.meter.ceilings(dtype).flops_per_s
            name = f"{dtype}".removeprefix("torch.")
            config = {"dtype": name, **self.meter.state()}
            self.bench.add(
                "machine", "torch", f"flops_{name}", "1/s", [self._ceilings[dtype]], config
            )
        return self._ceilings[dtype]

    def seconds(self, call: Call, calls: int) -> float:
        """Of one of so many calls on end."""
        self._synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        self._synchronize()
        return (time.perf_counter() - start) / calls

    def _synchronize(self) -> None:
        if self.meter.cuda:
            torch.cuda.synchronize()

    def ready(self, work: Work) -> Found:
        """Its call, made and warm; on a CPU, where it takes seconds, compiled and no more."""
        cuda, seen = self.meter.cuda, []
        if cuda:
            torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved() if cuda else 0
        call = work.make()
        if not cuda:
            first_s = self.seconds(call, 1) if work.compiled else 0.0
            return Found(call, 1, first_s, [], [])
        for _ in range(4):  # CUDA graphs are recorded in the second
            seen.append(self.seconds(call, 1))
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        call()
        peak = torch.cuda.max_memory_reserved() - before
        calls = max(1, min(_MOST_CALLS, round(self.plan.least_s / seen[-1])))
        return Found(call, calls, seen[0], [peak], [])

    def measure(self, one: Found) -> None:
        def timed() -> None:
            one.seconds.append(self.seconds(one.call, one.calls))

        if one.peaks:
            timed()
        else:
            one.peaks.append(self.meter.peak_rss_bytes(timed))


def compare(
    rig: Rig,
    case: str,
    works: Mapping[str, Work],
    config: Mapping[str, Any],
    base: str,
    rounds: int = 0,
) -> None:
    """Measures and tells of all providers; ratios are to `base`. `rounds` 0: as the plan has it."""
    began = time.perf_counter()
    torch.compiler.reset()  # or it stops compiling, after so many shapes
    found = {}
    for name, work in works.items():
        try:
            found[name] = rig.ready(work)
        except Exception as error:  # the others are to be measured all the same
            why = f"{type(error).__name__}: {str(error)[:500]}"
            print(f"{case}: {name} takes no part: {why}", flush=True)
    for turn in range(rounds or rig.plan.rounds):
        for name in in_turn(found, turn):
            rig.measure(found[name])
    for name in found:
        _add(rig, case, name, works, found, config, base)
    print(f"{case}: {time.perf_counter() - began:.0f} s", flush=True)


def _add(
    rig: Rig,
    case: str,
    name: str,
    works: Mapping[str, Work],
    found: Mapping[str, Found],
    config: Mapping[str, Any],
    base: str,
) -> None:
    """The rows of a provider."""
    work, one = works[name], found[name]
    about = {
        "B": work.images,
        "precision": work.precision,
        "GF": round(work.gflops, 2),
        **config,
        "calls": one.calls,
        **rig.meter.state(),
    }

    def row(metric: str, unit: str, values: Iterable[float]) -> None:
        told = list(values)
        rig.told[case, name, metric] = statistics.median(told)
        rig.bench.add(case, name, metric, unit, told, about)

    rates = [work.images / s for s in one.seconds]
    row("images_per_second", "1/s", rates)
    row("tflops", "TFLOP/s", (rate * work.gflops / 1e3 for rate in rates))
    row("share", "1", (rate * work.gflops * 1e9 / rig.ceiling(work.precision) for rate in rates))
    row("peak", "MB", [peak / 1e6 for peak in one.peaks])
    if one.first_s:
        row("first_call", "s", [one.first_s])
    if base in found:
        ratios = [a / b for a, b in zip(one.seconds, found[base].seconds, strict=True)]
        row("time_over_ours", "1", ratios)
        if (least := works[base].gflops / work.gflops) != 1:
            row("time_per_flop_over_ours", "1", (ratio * least for ratio in ratios))
