"""Small charts as inline SVG: pure functions from numbers to markup.

Colours and type are the page's: elements carry classes (`s0`, `s1`, ... for series). Whatever text
comes in is escaped.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from markupsafe import Markup

__all__ = ["Curve", "dots", "lines", "si", "stack", "ticks"]

_WIDTH, _HEIGHT = 420, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 12, 34
_LEAST = 1e-300  # what can be told apart from nothing
_MOST_POINTS = 300  # of a curve, which are as many as can be told apart


class Curve(NamedTuple):
    """Points of a line, in the order of x; finite."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]


class _Frame:
    """A chart's plane, from numbers to places."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float]) -> None:
        self.x, self.y = _wide(*x), _wide(*y)

    def at_x(self, value: float) -> float:
        low, high = self.x
        return _LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def at_y(self, value: float) -> float:
        low, high = self.y
        return _HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)


def lines(
    title: str,
    about: str,
    curves: Sequence[Curve],
    x_label: str,
    *,
    percent: bool = False,
    from_zero: bool = True,
) -> Markup:
    """Curves over one another. `about` says in words what is seen, for who cannot see it.
    `percent`: y is a share, 0 to 1. `from_zero`: y begins there."""
    thin = [_thinned(curve) for curve in curves if len(curve.xs)]
    ys = [y for curve in thin for y in curve.ys]
    low, high = (min(ys), max(ys)) if ys else (0.0, 1.0)
    if percent:
        low, high = 0.0, 1.0
    elif from_zero:
        low, high = min(0.0, low), high * 1.05
    xs = [x for curve in thin for x in (curve.xs[0], curve.xs[-1])]
    frame = _Frame((min(xs), max(xs)) if xs else (0, 1), (low, high))
    body = [_grid(frame, x_label, percent)]
    for number, curve in enumerate(thin):
        points = " ".join(
            f"{frame.at_x(x):.1f},{frame.at_y(y):.1f}"
            for x, y in zip(curve.xs, curve.ys, strict=True)
        )
        name = Markup("<title>{}</title>").format(curve.name)
        if len(curve.xs) == 1:
            body.append(_dot(frame, curve.xs[0], curve.ys[0], f"s{number % 8}", name))
        else:
            body.append(
                Markup('<polyline class="line s{}" points="{}">{}</polyline>').format(
                    number % 8, points, name
                )
            )
    return _svg(title, about, body)


def stack(
    title: str,
    about: str,
    edges: Sequence[float],
    layers: Mapping[str, Sequence[float]],
    x_label: str,
    *,
    percent: bool = True,
) -> Markup:
    """Layers on top of one another, the first one at the bottom, over n bins between n + 1 `edges`.
    Not `percent`: numbers, of any size."""
    heights = np.array([list(layer) for layer in layers.values()]).reshape(len(layers), -1)
    tops = np.cumsum(heights, axis=0)
    high = 1.0 if percent else max(1.0, float(tops.max(initial=0.0)) * 1.05)
    frame = _Frame((edges[0], edges[-1]), (0.0, high))
    body = []
    for number, name in enumerate(layers):
        path = []
        for place in range(heights.shape[1]):
            if heights[number, place] <= 0:
                continue
            left, right = frame.at_x(edges[place]), frame.at_x(edges[place + 1])
            top = frame.at_y(min(tops[number, place], high))
            bottom = frame.at_y(min(tops[number, place] - heights[number, place], high))
            path.append(f"M{left:.1f} {top:.1f}H{right:.1f}V{bottom:.1f}H{left:.1f}Z")
        body.append(
            Markup('<path class="area s{}" d="{}"><title>{}</title></path>').format(
                number % 8, "".join(path), name
            )
        )
    return _svg(title, about, [*body, _grid(frame, x_label, percent)])


def dots(
    title: str,
    about: str,
    xs: Sequence[float],
    ys: Sequence[float],
    names: Sequence[str],
    marked: Sequence[bool],
    x_label: str,
    line: float | None = None,
) -> Markup:
    """Points, some of them marked, and a line across at some y."""
    most = max(ys, default=1.0)
    frame = _Frame((min(xs, default=0.0), max(xs, default=1.0)), (0.0, most * 1.1))
    body = [_grid(frame, x_label, False)]
    if line is not None:
        body.append(
            Markup('<line class="middle" x1="{}" x2="{}" y1="{y:.1f}" y2="{y:.1f}"/>').format(
                _LEFT, _WIDTH - _RIGHT, y=frame.at_y(line)
            )
        )
    for x, y, name, far in zip(xs, ys, names, marked, strict=True):
        told = Markup("<title>{}</title>").format(name)
        body.append(_dot(frame, x, y, "far" if far else "s0", told))
    return _svg(title, about, body)


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from low to high, at most about `most`."""
    span = high - low
    if not (span > _LEAST and math.isfinite(span)):
        return [low]
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(m * power for m in (1, 2, 5, 10) if span / (m * power) <= most)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def si(value: float) -> str:
    """A number, short: 0.25, 12, 1.5k, 2M."""
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g}{letter}"
    return f"{value:.3g}"


def _wide(low: float, high: float) -> tuple[float, float]:
    """Bounds that are apart."""
    half = 0.5 * (abs(low) if abs(low) > _LEAST else 1)
    return (low, high) if high - low > _LEAST else (low - half, low + half)


def _thinned(curve: Curve) -> Curve:
    """Means over equal runs of points, where there are too many."""
    if len(curve.xs) <= _MOST_POINTS:
        return curve
    parts = [np.array_split(np.asarray(one, float), _MOST_POINTS) for one in curve[1:]]
    xs, ys = ([float(part.mean()) for part in one] for one in parts)
    return Curve(curve.name, xs, ys)


def _dot(frame: _Frame, x: float, y: float, kind: str, inside: Markup) -> Markup:
    return Markup('<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="2.6">{}</circle>').format(
        kind, frame.at_x(x), frame.at_y(y), inside
    )


def _grid(frame: _Frame, x_label: str, percent: bool) -> Markup:
    parts = []
    for value in ticks(*frame.y):
        y = frame.at_y(value)
        told = f"{100 * value:.0f} %" if percent else si(value)
        parts.append(
            Markup(
                '<line class="grid" x1="{}" x2="{}" y1="{y:.1f}" y2="{y:.1f}"/>'
                '<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>'
            ).format(_LEFT, _WIDTH - _RIGHT, _LEFT - 6, y + 4, told, y=y)
        )
    for value in ticks(*frame.x):
        parts.append(
            Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
                frame.at_x(value), _HEIGHT - _BOTTOM + 16, si(value)
            )
        )
    parts.append(
        Markup('<text class="label" x="{}" y="{}" text-anchor="end">{}</text>').format(
            _WIDTH - _RIGHT, _HEIGHT - 4, x_label
        )
    )
    return Markup("").join(parts)


def _svg(title: str, about: str, body: Iterable[Markup]) -> Markup:
    return Markup(
        '<svg class="chart" viewBox="0 0 {} {}" role="img"><title>{}</title><desc>{}</desc>{}</svg>'
    ).format(_WIDTH, _HEIGHT, title, about, Markup("").join(body))
