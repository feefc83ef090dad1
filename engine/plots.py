"""Plots, as PNG files."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

__all__ = ["Bar", "bars", "why_not"]

_BAR_INCH, _DPI = 0.22, 110
_SPAN = 30  # between values, from which they are shown on a logarithmic axis


class Bar(NamedTuple):
    """A median, with percentiles around it."""

    label: str
    colour: str  # what bars of one colour have in common
    low: float
    middle: float
    high: float


def why_not() -> str:
    """Why there are no plots, "" if there can be."""
    missing = importlib.util.find_spec("matplotlib") is None
    return "matplotlib is not installed; it comes with the extra `bench`" if missing else ""


def bars(path: Path, title: str, unit: str, told: Sequence[Bar]) -> None:
    """Writes horizontal bars, the first on top."""
    from matplotlib.figure import Figure  # pyplot, which keeps state, is not needed

    figure = Figure(figsize=(9, 1.2 + _BAR_INCH * len(told)), dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    colours = {
        name: f"C{place % 10}" for place, name in enumerate(dict.fromkeys(b.colour for b in told))
    }
    middles = [bar.middle for bar in told]
    spread = [
        [max(0.0, bar.middle - bar.low) for bar in told],
        [max(0.0, bar.high - bar.middle) for bar in told],
    ]
    axes.barh(range(len(told)), middles, xerr=spread, color=[colours[bar.colour] for bar in told])
    axes.set_yticks(range(len(told)), [bar.label for bar in told], fontsize=7)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    if 0 < _SPAN * min(middles) < max(middles):
        axes.set_xscale("log")
    axes.set_xlabel(unit)
    axes.set_title(title, fontsize=9)
    figure.savefig(path)
