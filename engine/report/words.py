"""Numbers and judgements of a run in words."""

from collections.abc import Mapping
from typing import Any

from engine.report.facts import Facts
from engine.report.records import number
from engine.report.spans import WAITS, mean_shares

__all__ = ["bottleneck", "count", "duration", "part", "percent", "score", "scores_of", "verdict"]

_MUCH = 0.15  # of the time, from which waiting is worth a word


def count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def percent(share: float | None, digits: int = 1) -> str:
    """Of a share, 0 to 1."""
    return "-" if share is None else f"{100 * share:.{digits}f} %"


def part(share: float) -> str:
    """Of a share that is not to be taken for none, or all, where it is not."""
    if 0 < share < 0.0001:
        return "< 0.01 %"
    return "> 99.99 %" if 0.9999 < share < 1 else percent(share, 2)


def score(value: float | None) -> str:
    """Of a summary's percentages."""
    return "-" if value is None else f"{value:.2f}"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def scores_of(summary: Mapping[str, Any], model: str) -> dict[str, float | None]:
    """Of student_before, student_after or teacher; None where nothing was scored."""
    told = summary.get(model)
    names = ("base", "novel", "hm", "all", "agreement")
    return {name: number(told, name) if isinstance(told, dict) else None for name in names}


def verdict(facts: Facts) -> str:
    """What has come of a run, in a sentence or two."""
    step, steps, agrees = facts.last("step"), facts.last("steps"), facts.last("agreement")
    if facts.state != "ended":
        at = f"at step {step:,.0f} of {steps:,.0f}" if step and steps else "before its first step"
        told = {
            "running": f"At work, {at}",
            "failed": f"Failed {at}",
            "drained": f"Drained {at}; --resume goes on from there",
            "interrupted": f"Interrupted {at}; --resume goes on from its last checkpoint",
            "broken off": f"Broken off {at}, without a word; --resume goes on from its last "
            "checkpoint",
        }[facts.state]
        if agrees is not None:
            told += f". Of the latest images, student and teacher agree on {percent(agrees)}"
        return f"{told}. {facts.why}" if facts.state == "failed" else f"{told}."
    after, before = (scores_of(facts.summary, f"student_{when}") for when in ("after", "before"))
    teacher = scores_of(facts.summary, "teacher")
    which = "hm" if after["hm"] is not None else "all"
    reached, began = after[which], before[which]
    if reached is None:
        return (
            f"The student agrees with its teacher on {percent(agrees)} of the latest training "
            "images; there were no labelled images to score it on."
        )
    named = "a harmonic mean" if which == "hm" else "an accuracy"
    text = f"The student {'falls to' if began and reached < began else 'reaches'} {named} of "
    text += f"{score(reached)} %"
    others = {"zero-shot": began, "its teacher": teacher[which]}
    if beside := [f"{who} {score(value)}" for who, value in others.items() if value is not None]:
        text += f" ({', '.join(beside)})"
    if after["agreement"] is not None:
        text += f" and agrees with its teacher on {after['agreement']:.1f} % of held-out images"
    return f"{text}."


def bottleneck(facts: Facts) -> str:
    """What bounded the rate."""
    waits = mean_shares(facts.students, WAITS)
    if not waits:
        return ""
    labels = facts.summary.get("labels")
    inline = isinstance(labels, dict) and labels.get("source") == "inline"
    who = "Students, each with a teacher inside," if inline else "Students"
    told = (
        f"{who} worked {percent(1 - sum(waits.values()), 0)} of the time, waited "
        f"{percent(waits['labels'], 0)} for labels and {percent(waits['data'], 0)} for images"
    )
    worst = max(WAITS, key=waits.__getitem__)
    if waits[worst] < _MUCH:
        return f"{told}: {'their own work sets' if inline else 'the student itself sets'} the pace."
    if worst == "labels":
        return f"{told}: teachers set the pace. More of them, or recorded labels, would help."
    return (
        f"{told}: reading and decoding set the pace. More threads, or smaller images, would help."
    )
