"""Scores as a table."""

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["scores"]

COLUMNS = ("base", "novel", "hm", "all", "agreement")


def scores(summary: Mapping[str, Any], rows: Sequence[str]) -> str:
    """Scores of a summary's models, in percent; a dash where there was nothing to count."""
    lines = [f"{'':<18}" + "".join(f"{column:>11}" for column in COLUMNS)]
    for row in rows:
        cells = (summary.get(row, {}).get(column) for column in COLUMNS)
        text = "".join(f"{'-':>11}" if cell is None else f"{cell:>11.2f}" for cell in cells)
        lines.append(f"{row.replace('_', ' '):<18}{text}")
    return "\n".join(lines)
