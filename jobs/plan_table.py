"""A plan as it is printed."""

import json
from collections.abc import Iterator, Mapping, Sequence

from engine.plan import Plan
from engine.rates import Rates

__all__ = ["each", "table", "told_rates", "toml"]


def told_rates(rates: Rates, origins: Mapping[str, str]) -> Iterator[str]:
    """Lines: each rate with its origin, and which there are not."""
    units = {
        "teacher": "images/s a GPU",
        "student": "images/s a GPU",
        "decode": "images/s a core",
        "link_gbit_s": "Gbit/s a node",
        "disk_gb_s": "GB/s a node",
        "image_bytes": "bytes",
        "label_bytes": "bytes",
    }
    for name, unit in units.items():
        if (value := getattr(rates, name)) is not None:
            origin = f"  ({origins[name]})" if name in origins else ""
            yield f"{name:<12}{value:>12,.6g} {unit}{origin}"
    bounds = ("decode", "link_gbit_s", "disk_gb_s")
    if unknown := [name for name in bounds if getattr(rates, name) is None]:
        yield f"not known, and taken to bound nothing: {', '.join(unknown)}"
    if rates.shared_cores:
        yield "decoding, labelling and training share the same cores"


def table(found: Mapping[int, Sequence[Plan]], price: float | None) -> Iterator[str]:
    """Lines: the ways of each number of GPUs, the fastest first."""
    cost = f"{'cost':>11}" if price is not None else ""
    yield f"{'GPUs':>5}{'label':>7}{'train':>7}{'images/s':>11}{'hours':>10}{cost}  way, and bound"
    for gpus, ways in found.items():
        for turn, plan in enumerate(ways):
            first = f"{gpus:>5}" if turn == 0 else " " * 5
            cost = f"{plan.gpu_hours * price:>11,.2f}" if price is not None else ""
            way = f"{plan.source}{' + store' if plan.store else ''}"
            numbers = f"{plan.images_per_second:>11,.0f}{plan.hours:>10,.3g}{cost}"
            label = plan.teachers or "-"
            yield f"{first}{label:>7}{plan.students:>7}{numbers}  {way:<15} {plan.bound}"


def each(plan: Plan, students: int) -> str:
    if students == 1:
        return ":"
    turns = "one after the other" if plan.source == "inline" else "side by side"
    return f", for each of {students} students, {turns}:"


def toml(told: Mapping[str, Mapping[str, str | int]]) -> Iterator[str]:
    for section, values in told.items():
        yield f"[{section}]"
        yield from (f"{name} = {json.dumps(value)}" for name, value in values.items())
