"""Records of a run folder, as they are: files may be missing, end in the middle of a line, tell of
steps that a restart has repeated, or come from an older version."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.json_text import parse_json

__all__ = ["Record", "lineage", "number", "read_object", "read_records", "series"]

Record = Mapping[str, Any]


def read_object(file: Path) -> dict[str, Any]:
    """What a JSON file holds; nothing where it is missing, damaged, or holds no object."""
    try:
        told = parse_json(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


def read_records(file: Path) -> list[Record]:
    """The whole records of a file, in its order; none where there is no such file."""
    found: list[Record] = []
    try:
        with open(file, "rb") as lines:
            for line in lines:
                try:
                    told = parse_json(line)
                except ValueError:  # a worker was killed while it wrote
                    continue
                if isinstance(told, dict):
                    found.append(told)
    except OSError:
        return []
    return found


def lineage(records: Iterable[Record]) -> list[Record]:
    """Those of the steps that the run's weights have gone through, in the order of their steps:
    where it went back to an earlier step, what it tells from there on replaces what it told before.
    """
    kept: list[Record] = []
    for record in records:
        step = number(record, "step")
        if step is None:
            continue
        while kept and kept[-1]["step"] >= step:
            kept.pop()
        kept.append(record)
    return kept


def number(record: Record, name: str) -> float | None:
    """A finite number of a record; None where it has none of that name."""
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) < float("inf") else None  # nan is not less, either


def series(records: Sequence[Record], x: str, y: str) -> tuple[list[float], list[float]]:
    """Two columns of the records that have both."""
    pairs = [(number(record, x), number(record, y)) for record in records]
    whole = [(a, b) for a, b in pairs if a is not None and b is not None]
    return [a for a, _ in whole], [b for _, b in whole]
