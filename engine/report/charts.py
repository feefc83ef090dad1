"""The charts of a report: facts to SVG."""

from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import Markup

from engine.report.facts import Facts
from engine.report.findings import Drift
from engine.report.records import series
from engine.report.spans import WAITS, WORKS, Span, mean_shares, shares
from engine.report.svg import Curve, dots, lines, si, stack
from engine.report.words import percent

__all__ = ["curves", "entropies", "stages", "waiting"]

_BINS = 80
_CURVES = {
    "images_per_second": "Throughput, images/s",
    "loss": "Loss",
    "agreement": "Agreement with the teacher",
}


def waiting(students: Sequence[Span]) -> Markup | None:
    """Of student workers, work and waits over time."""
    if not students:
        return None
    edges, label, unit_s = _edges(students)
    waits, there = shares(students, WAITS, edges)
    work = np.where(there, 1 - sum(waits.values()), 0).clip(0, 1)
    layers = {"work": work, **{f"waiting for {part}": waits[part] for part in WAITS}}
    told = ", ".join(f"{n} % for {p}" for p, n in _rounded(mean_shares(students, WAITS)).items())
    about = f"Share of the time of {_members(students)} student workers. Waiting: {told}."
    return stack("Students", about, _scaled(edges, unit_s), _listed(layers), label)


def stages(teachers: Sequence[Span]) -> Markup | None:
    """Of teachers, the stages of their pipelines, which work at the same time."""
    if not teachers:
        return None
    edges, label, unit_s = _edges(teachers)
    layers, _ = shares(teachers, WORKS, edges)
    told = ", ".join(f"{p} {n} %" for p, n in _rounded(mean_shares(teachers, WORKS)).items())
    about = f"Stages at work, mean of {_members(teachers)} teachers: {told} of the time."
    return stack("Teachers", about, _scaled(edges, unit_s), _listed(layers), label, percent=False)


def curves(runs: Mapping[str, Facts]) -> list[tuple[str, Markup]]:
    """Throughput, loss and agreement by step, of one run or several over one another."""
    found = []
    for name, title in _CURVES.items():
        told = {who: series(facts.train, "step", name) for who, facts in runs.items()}
        known = [Curve(who, xs, ys) for who, (xs, ys) in told.items()]
        if not any(curve.xs for curve in known):
            continue
        ends = [f"{c.name} from {si(c.ys[0])} to {si(c.ys[-1])}" for c in known if c.xs]
        chart = lines(
            title,
            f"{title} by step: {'; '.join(ends)}.",
            known,
            "step",
            percent=name == "agreement",
        )
        found.append((title, chart))
    return found


def entropies(told: Drift) -> Markup | None:
    """The teacher's mean entropy of each shard."""
    if not len(told.shards):
        return None
    names = [
        f"shard {shard}: {entropy:.3f} nats, of {samples} samples"
        for shard, entropy, samples in zip(
            told.shards.tolist(), told.entropy.tolist(), told.samples.tolist(), strict=True
        )
    ]
    about = (
        f"The teacher's mean entropy in nats of {len(names)} shards; median {told.middle:.3f}, "
        f"{int(told.far.sum())} of them far from it."
    )
    xs, ys = told.shards.tolist(), told.entropy.tolist()
    return dots("Entropy by shard", about, xs, ys, names, told.far.tolist(), "shard", told.middle)


def _edges(spans: Sequence[Span]) -> tuple[np.ndarray, str, float]:
    """Of bins over all of the time: times; what the axis says, and seconds of its unit."""
    start, end = min(span.start for span in spans), max(span.end for span in spans)
    bins = min(_BINS, max(1, len(spans)))
    unit_s, label = (3600, "hours") if end - start > 7200 else (60, "minutes")
    if end - start < 180:
        unit_s, label = 1, "seconds"
    edges = np.linspace(start, end, bins + 1)
    if not (np.diff(edges) > 0).all():  # closer together than numbers of this size can be
        edges = np.array([start, end])
    return edges, label, unit_s


def _scaled(edges: np.ndarray, unit_s: float) -> list[float]:
    return ((edges - edges[0]) / unit_s).tolist()


def _listed(layers: Mapping[str, np.ndarray]) -> dict[str, list[float]]:
    return {name: layer.tolist() for name, layer in layers.items()}


def _members(spans: Sequence[Span]) -> int:
    return len({span.who for span in spans})


def _rounded(told: Mapping[str, float]) -> dict[str, str]:
    return {name: percent(value, 0).removesuffix(" %") for name, value in told.items()}
