"""Scores as a table."""

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["scores"]

COLUMNS = ("base", "novel", "hm", "all", "agreement")


def scores(
    summary: Mapping[str, Any], rows: Sequence[str], spread: Mapping[str, Any] | None = None
) -> str:
    """Scores of a summary's models, in percent, with their spread if there is one; a dash where
    there was nothing to count."""
    lines = [f"{'':<16}" + "".join(f"{column:>15}" for column in COLUMNS)]
    for row in rows:
        deviations = spread.get(row, {}) if spread else {}
        cells = (
            _cell(summary.get(row, {}).get(column), deviations.get(column)) for column in COLUMNS
        )
        lines.append(f"{row.replace('_', ' '):<16}" + "".join(f"{cell:>15}" for cell in cells))
    return "\n".join(lines)


def _cell(value: float | None, deviation: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if deviation is None else f"{value:.2f} ± {deviation:.2f}"
