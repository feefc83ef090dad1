"""Benchmark results as tables: of each case on each device, what its newest run has measured.

benchmarks/rows.py appends the rows. Providers are compared within a run alone, so a case is shown
as one run has it; a bench whose cases were run at different times has a table for each run.
"""

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from engine.config import UserError
from engine.json_text import parse_json

__all__ = ["COLUMNS", "Row", "Table", "aligned", "markdown", "newest", "read", "tables"]

COLUMNS = (
    *("date", "git_sha", "device", "bench", "case", "provider", "metric", "unit"),
    *("p20", "p50", "p80", "n", "config", "versions"),
)
_MOST_METRICS = 8  # of a table with a column for each


class Row(NamedTuple):
    """One metric of a case and provider in one run; percentiles are over its repeats."""

    date: str  # UTC, to the minute
    git_sha: str
    device: str
    bench: str
    case: str
    provider: str
    metric: str
    unit: str
    p20: float
    p50: float
    p80: float
    n: int
    config: Mapping[str, Any]
    versions: str

    @property
    def run(self) -> tuple[str, str]:
        return self.date, self.git_sha


class Table(NamedTuple):
    """Cases of one run that have the same metrics; a line for each case and provider."""

    bench: str
    device: str
    date: str
    git_sha: str
    versions: str
    metrics: dict[str, str]  # their units
    lines: dict[tuple[str, str], dict[str, Row]]  # by case and provider, then by metric


def read(file: Path) -> list[Row]:
    """The rows of a file. Raises UserError, naming file and line, for one that is no row."""
    try:
        with open(file, newline="", encoding="utf-8") as opened:
            reader = csv.reader(opened, strict=True)
            if (header := next(reader, None)) != list(COLUMNS):
                raise UserError(
                    f"{file}, line 1: the columns are not {','.join(COLUMNS)}: {header}"
                )
            return [_row(values, f"{file}, line {reader.line_num}") for values in reader]
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{file}: no CSV file: {error}") from None


def _row(values: Sequence[str], where: str) -> Row:
    if len(values) != len(COLUMNS):
        raise UserError(f"{where}: {len(values)} values for {len(COLUMNS)} columns")
    told: dict[str, Any] = dict(zip(COLUMNS, values, strict=True))
    for column, kind in (("p20", float), ("p50", float), ("p80", float), ("n", int)):
        try:
            told[column] = kind(told[column])
            if not math.isfinite(told[column]):
                raise ValueError("not finite")
        except ValueError:
            raise UserError(f"{where}: {column} is no number: {told[column]!r}") from None
    try:
        told["config"] = parse_json(told["config"])
    except ValueError as error:
        raise UserError(f"{where}: config is no JSON: {error}") from None
    return Row(**told)


def newest(rows: Iterable[Row]) -> list[Row]:
    """Of each case on each device, the rows of its newest run; of two that are of the same minute,
    of the one that was written later. What a run has measured twice counts once, the last time."""
    listed = list(rows)
    runs: dict[tuple[str, ...], tuple[str, str]] = {}
    for row in listed:
        case = (row.bench, row.device, row.case)
        if case not in runs or row.date >= runs[case][0]:
            runs[case] = row.run
    kept: dict[tuple[str, ...], Row] = {}
    for row in listed:
        case = (row.bench, row.device, row.case)
        if row.run == runs[case]:
            kept[*case, row.provider, row.metric] = row
    return list(kept.values())


def tables(rows: Iterable[Row]) -> list[Table]:
    """Of the newest rows: by device, then the newest run first."""
    metrics: dict[tuple[str, ...], dict[str, str]] = {}
    listed = newest(rows)
    for row in listed:
        case = (row.bench, row.device, *row.run, row.case)
        metrics.setdefault(case, {})[row.metric] = row.unit
    found: dict[tuple[Any, ...], Table] = {}
    for row in listed:
        units = metrics[row.bench, row.device, *row.run, row.case]
        kind = (row.bench, row.device, *row.run, frozenset(units))
        if kind not in found:
            told = (row.bench, row.device, row.date, row.git_sha, row.versions)
            found[kind] = Table(*told, units, {})
        found[kind].lines.setdefault((row.case, row.provider), {})[row.metric] = row
    by_date = sorted(found.values(), key=lambda table: table.date, reverse=True)
    return sorted(by_date, key=lambda table: (table.bench, table.device))


def markdown(found: Sequence[Table], ranges: bool) -> str:
    """All tables of a bench, under headings that tell device, date and commit. `ranges`: with the
    20th and 80th percentiles."""
    lines: list[str] = []
    heading: tuple[str, ...] = ()
    for table in found:
        about = (table.bench, table.device, table.date, table.git_sha)
        if about[:1] != heading[:1]:
            lines += [f"# {table.bench}", ""]
        if about[:2] != heading[:2]:
            lines += [f"## {table.device}", ""]
        if about != heading:
            lines += [f"{table.date}, {table.git_sha} ({table.versions}):", ""]
        heading = about
        lines += [*aligned(_cells(table, ranges)), ""]
    return "\n".join(lines)


def aligned(cells: Sequence[Sequence[str]]) -> Iterable[str]:
    """A markdown table whose first line is its head."""
    columns = list(zip(*cells, strict=True))
    widths = [max(3, *map(len, column)) for column in columns]
    for number, line in enumerate(cells):
        yield "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        if number == 0:
            yield "|" + "|".join("-" * (width + 2) for width in widths) + "|"


def _cells(table: Table, ranges: bool) -> list[list[str]]:
    if len(table.metrics) > _MOST_METRICS:
        return [["case", "provider", "metric", "median"]] + [
            [*_escaped(*key, f"{metric}{_unit(row.unit)}"), _value(row, ranges)]
            for key, by_metric in table.lines.items()
            for metric, row in by_metric.items()
        ]
    head = [f"{metric}{_unit(unit)}" for metric, unit in table.metrics.items()]
    return [["case", "provider", *_escaped(*head)]] + [
        [
            *_escaped(*key),
            *(_value(by[name], ranges) if name in by else "" for name in table.metrics),
        ]
        for key, by in table.lines.items()
    ]


def _escaped(*texts: str) -> list[str]:
    return [text.replace("|", "\\|").replace("\n", " ") for text in texts]


def _unit(unit: str) -> str:
    return "" if unit == "1" else f", {unit}"


def _value(row: Row, ranges: bool) -> str:
    if not ranges or row.n == 1:
        return f"{row.p50:.4g}"
    return f"{row.p50:.4g} ({row.p20:.4g} to {row.p80:.4g})"
