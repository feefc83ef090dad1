"""What a run folder tells of its run, read once and understood by nobody else.

Nothing is required but the folder's config.json: a run that is young, was killed, or is of an older
version tells less.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from safetensors import SafetensorError

from engine.config import UserError
from engine.json_text import MOST_BYTES, parse_json
from engine.lease import DEAD_S
from engine.report.records import (
    Record,
    lineage,
    number,
    opened,
    read_object,
    read_records,
    too_large,
)
from engine.report.spans import Span, students_spans, teachers_spans, waits
from engine.tensor_files import open_tensors

__all__ = ["Facts", "Probes", "Skip", "State", "read_facts"]

State = Literal["ended", "running", "failed", "drained", "interrupted", "broken off"]
_COLUMNS = ("shard", "position", "teacher", "teacher_p", "student", "student_p", "entropy")


class Skip(NamedTuple):
    """A sample that was left out."""

    reason: str
    shard: int
    position: int


@dataclass(frozen=True)
class Probes:
    """Samples with both answers: columns of one length, in the order of steps. Classes are int64,
    probabilities and the teacher's entropy (nats) float64."""

    step: np.ndarray
    shard: np.ndarray
    position: np.ndarray
    teacher: np.ndarray
    teacher_p: np.ndarray
    student: np.ndarray
    student_p: np.ndarray
    entropy: np.ndarray

    def __len__(self) -> int:
        return len(self.step)


@dataclass(frozen=True)
class Facts:
    """A run, as its folder tells it."""

    folder: Path
    name: str
    state: State
    why: str  # it has not ended, where somebody said so
    config: dict[str, Any]  # resolved, as config.json has it
    lives: list[dict[str, Any]]
    summary: dict[str, Any]  # of a run that has ended, else empty
    ledger: dict[str, Any]
    train: list[Record]  # the steps that the weights have gone through
    notices: list[tuple[float, str]]
    rollbacks: int
    students: list[Span]
    teachers: list[Span]
    probes: Probes
    skipped: list[Skip]
    classes: tuple[str, ...]  # empty where their names are not known
    large: int  # files of records that were read in part

    @property
    def wall_s(self) -> float | None:
        """From the start of the first life on; of a run that has not ended, to its last record."""
        if (told := number(self.summary, "wall_s")) is not None:
            return told
        started = number(self.lives[0], "started") if self.lives else None
        last = number(self.train[-1], "time") if self.train else None
        return last - started if started and last else None

    @property
    def images_per_second(self) -> float | None:
        """Of training; before its end, over what it has told so far."""
        if (told := number(self.summary, "images_per_second")) is not None:
            return told
        rates = [number(record, "images_per_second") for record in self.train]
        sound = [rate for rate in rates if rate and rate > 0]
        return len(sound) / sum(1 / rate for rate in sound) if sound else None

    def last(self, name: str) -> float | None:
        """A number of the newest training record."""
        return number(self.train[-1], name) if self.train else None

    def class_name(self, number: int) -> str:
        return self.classes[number] if 0 <= number < len(self.classes) else f"class {number}"


def read_facts(folder: Path) -> Facts:
    """Raises UserError for what is no run folder of a distillation."""
    config = read_object(folder / "config.json")
    if not config:
        raise UserError(f"what: {folder} is no run folder: it has no config.json that can be read")
    if not isinstance(config.get("student"), dict):
        raise UserError(f"what: {folder} is no distillation: no section student in config.json")
    lives = [life for life in _list(config.pop("lives", None)) if isinstance(life, dict)]
    # Older runs have one life, which they do not list.
    first = {name: config.pop(name, None) for name in ("versions", "git_sha")}
    lives = lives or [{name: value for name, value in first.items() if value}]
    records = [*read_records(folder / "metrics.jsonl")]
    summary = read_object(folder / "summary.json")
    telemetry = folder / "telemetry"
    train = [record for record in records if record.get("kind") == "train"]
    state, why = _state(folder, records, bool(summary))
    return Facts(
        folder=folder,
        name=str(config.get("name") or folder.name),
        state=state,
        why=why,
        config=config,
        lives=lives,
        summary=summary,
        ledger=read_object(folder / "ledger.json"),
        train=lineage(train),
        notices=[
            (number(record, "time") or 0.0, str(record.get("text")))
            for record in records
            if record.get("kind") in ("notice", "resumed")
        ],
        rollbacks=len(_rollbacks(folder)),
        students=students_spans(telemetry) or waits(train),
        teachers=teachers_spans(telemetry),
        probes=_probes(lineage(read_records(telemetry / "probes.jsonl"))),
        skipped=_skipped(telemetry),
        classes=_classes(folder),
        large=sum(
            too_large(files)
            for files in (
                [folder / "metrics.jsonl"],
                [telemetry / "probes.jsonl"],
                [telemetry / "teachers.jsonl"],
                [*telemetry.glob("worker-*.jsonl")],
            )
        ),
    )


def _state(folder: Path, records: Sequence[Record], ended: bool) -> tuple[State, str]:
    if ended:
        return "ended", ""
    newest = next((one for one in reversed(records) if one.get("kind") != "notice"), {})
    if newest.get("kind") == "end":
        for state in ("failed", "drained", "interrupted"):
            if newest.get("state") == state:
                return state, str(newest.get("text") or "")
    try:
        still_s = time.time() - (folder / "lease.json").stat().st_mtime
    except OSError:
        return "broken off", ""
    return ("running" if still_s < DEAD_S else "broken off"), ""


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _rollbacks(folder: Path) -> list[Any]:
    try:
        with opened(folder / "rollbacks.json") as text:
            return _list(parse_json(text.read(MOST_BYTES + 1)))
    except (OSError, ValueError):
        return []


def _probes(records: Sequence[Record]) -> Probes:
    columns: dict[str, list[float]] = {name: [] for name in ("step", *_COLUMNS)}
    for record in records:
        if not _is_number(record["step"]):
            continue
        told = [_list(record.get(name)) for name in _COLUMNS]
        rows = [row for row in zip(*told, strict=False) if all(map(_is_number, row))]
        columns["step"] += [record["step"]] * len(rows)
        for name, column in zip(_COLUMNS, zip(*rows, strict=True), strict=False):
            columns[name] += column
    floats = ("teacher_p", "student_p", "entropy")
    return Probes(
        **{
            name: np.array(column, np.float64 if name in floats else np.int64)
            for name, column in columns.items()
        }
    )


def _is_number(value: Any) -> bool:
    return number({"": value}, "") is not None and abs(value) < 2**62


def _skipped(telemetry: Path) -> list[Skip]:
    """Each sample once for a reason, though every pass may tell of it."""
    found: dict[Skip, None] = {}
    for file in sorted(telemetry.glob("skipped-*.jsonl")):
        for record in read_records(file):
            place = number(record, "shard"), number(record, "position")
            if None not in place and isinstance(record.get("reason"), str):
                found[Skip(record["reason"], int(place[0] or 0), int(place[1] or 0))] = None
    return list(found)


def _classes(folder: Path) -> tuple[str, ...]:
    """Their names, of the class vectors that every run folder has."""
    try:
        opened(folder / "class_vectors.safetensors").close()
        with open_tensors(folder / "class_vectors.safetensors", "np") as file:
            told = parse_json((file.metadata() or {})["class_vectors"])
        return tuple(map(str, told["names"]))
    except (SafetensorError, KeyError, TypeError, ValueError, OSError):
        return ()
