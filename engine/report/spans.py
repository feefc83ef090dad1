"""What the time of student workers and teachers went to, as their telemetry adds it up."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine.report.records import Record, number, read_records, read_several

__all__ = [
    "WAITS",
    "WORKS",
    "Span",
    "mean_shares",
    "shares",
    "students_spans",
    "teachers_spans",
    "waits",
]

WAITS = ("labels", "data")  # of a student worker, which works in the rest of the time
WORKS = ("forward", "decode", "read", "write")  # of a teacher, at the same time
_GPU = ("gpu_utilisation", "gpu_memory_bytes", "gpu_power_w")
_MOST_SPANS = 2000  # of a member of a file; neighbours are put together where it has more
_WAITED = {"waited_labels_s": "labels", "waited_data_s": "data"}


class Span(NamedTuple):
    """Some seconds of a student worker or a teacher, and how many of them went to what."""

    who: str
    host: str
    end: float  # time, as of time.time()
    span_s: float
    parts_s: dict[str, float]
    gpu: dict[str, float]  # by _GPU; empty without NVML

    @property
    def start(self) -> float:
        return self.end - self.span_s


def students_spans(telemetry: Path) -> list[Span]:
    """Of all workers."""
    files = sorted(telemetry.glob("worker-*.jsonl"))
    return [span for one in read_several(files) for span in _spans(one, WAITS, "rank")]


def teachers_spans(telemetry: Path) -> list[Span]:
    return _spans(read_records(telemetry / "teachers.jsonl"), WORKS, "teacher")


def waits(train: Sequence[Record]) -> list[Span]:
    """Rank 0's, of runs without telemetry: its training records add its waits up over a life."""
    found = []
    for before, now in pairwise(train):
        told = [(number(before, name), number(now, name)) for name in _WAITED]
        gained = [b - a for a, b in told if a is not None and b is not None]
        start, end = number(before, "time"), number(now, "time")
        if start is None or end is None or end <= start:
            continue
        if len(gained) == len(_WAITED) and min(gained) >= 0:  # else a life begins here
            parts_s = dict(zip(_WAITED.values(), gained, strict=True))
            found.append(Span("0", "", end, end - start, parts_s, {}))
    return found


def shares(
    spans: Sequence[Span], parts: Sequence[str], edges: np.ndarray
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Share of the time that went to each part in each of n bins, [n], mean over those who were
    there; and in which bins anybody was, bool [n]. `edges`: times, [n + 1], equally far apart."""
    bins, width_s = len(edges) - 1, edges[1] - edges[0]
    there_s, spent_s = np.zeros(bins), {part: np.zeros(bins) for part in parts}
    for span in spans:
        first = int(np.clip((span.start - edges[0]) // width_s, 0, bins - 1))
        last = int(np.clip((span.end - edges[0]) // width_s, 0, bins - 1))
        for place in range(first, last + 1):
            low, high = max(span.start, edges[place]), min(span.end, edges[place + 1])
            if high <= low:
                continue
            there_s[place] += high - low
            for part in parts:
                spent_s[part][place] += span.parts_s[part] * (high - low) / span.span_s
    there = there_s > 0
    whole_s = np.where(there, there_s, 1)
    return {part: spent / whole_s for part, spent in spent_s.items()}, there


def mean_shares(spans: Sequence[Span], parts: Sequence[str]) -> dict[str, float]:
    """Over all of the time; empty where there is none."""
    whole_s = sum(span.span_s for span in spans)
    if not whole_s:
        return {}
    return {part: sum(span.parts_s[part] for span in spans) / whole_s for part in parts}


def _spans(records: Iterable[Record], parts: Sequence[str], who: str) -> list[Span]:
    """Records that do not tell how long they are count for nothing."""
    found: dict[str, list[Span]] = {}
    for record in records:
        end, span_s = number(record, "time"), number(record, "span_s")
        if end is None or span_s is None or end - span_s >= end:  # also where it is too short
            continue
        parts_s = {part: number(record, f"{part}_s") or 0.0 for part in parts}
        gpu = {name: value for name in _GPU if (value := number(record, name)) is not None}
        name, host = str(record.get(who, "")), str(record.get("host", ""))
        found.setdefault(name, []).append(Span(name, host, end, span_s, parts_s, gpu))
    return [span for mine in found.values() for span in _merged(mine)]


def _merged(spans: Sequence[Span]) -> list[Span]:
    """Of one member, in their order, at most 2,000: neighbours are put together. What lies between
    them, as where a run has rested, is not theirs."""
    size = -(-len(spans) // _MOST_SPANS)
    return [_joined(spans[at : at + size]) for at in range(0, len(spans), size)]


def _joined(spans: Sequence[Span]) -> Span:
    if len(spans) == 1:
        return spans[0]
    last = spans[-1]
    parts_s = {part: sum(span.parts_s[part] for span in spans) for part in last.parts_s}
    gpu = {}
    for name in last.gpu:
        known = [span.gpu[name] for span in spans if name in span.gpu]
        gpu[name] = sum(known) / len(known)
    return Span(last.who, last.host, last.end, sum(span.span_s for span in spans), parts_s, gpu)
