"""Several runs beside one another: what differs in their settings, and what became of it."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from engine import durable
from engine.config import UserError
from engine.progress import say
from engine.report import words
from engine.report.charts import curves
from engine.report.facts import Facts, read_facts
from engine.report.page import clock, environment
from engine.report.records import read_object
from engine.report.spans import WAITS, mean_shares
from engine.storage.access import public

__all__ = ["Line", "compared", "differences", "folders", "named", "write"]

_HIDDEN = ("name", "runs_dir", "overwrite")  # settings that say nothing of a run


class Line(NamedTuple):
    """What is told of a run beside others."""

    name: str
    state: str
    images_per_second: float | None
    wall_s: float | None
    agreement: float | None  # percent; of held-out images, or of the latest that were trained
    base: float | None
    novel: float | None
    hm: float | None
    all: float | None
    waited_labels: float | None  # shares of the time
    waited_data: float | None


def folders(named: Sequence[str]) -> list[Path]:
    """The run folders that these are, or hold, as one of several seeds or students does; what else
    they hold, such as runs of stage I, is left out. Raises UserError for what is, and holds, none.
    """
    found = []
    for name in named:
        folder = Path(name)
        if (folder / "config.json").exists():
            found.append(folder)
            continue
        inner = sorted(file.parent for file in folder.glob("*/config.json"))
        ours = [one for one in inner if _is_distillation(one)]
        if not ours:
            why = "no config.json of a distillation"
            raise UserError(f"what: {folder} is no run folder, and holds none: {why}")
        if others := [one.name for one in inner if one not in ours]:
            say(f"{folder}: left out, being no distillations: {', '.join(others)}")
        found += ours
    return list(dict.fromkeys(found))


def compared(runs: Mapping[str, Facts]) -> list[Line]:
    """A line for each run."""
    lines = []
    for name, facts in runs.items():
        scores = words.scores_of(facts.summary, "student_after")
        latest, waits = facts.last("agreement"), mean_shares(facts.students, WAITS)
        trained = None if latest is None else 100 * latest
        agrees = trained if scores["agreement"] is None else scores["agreement"]
        lines.append(
            Line(
                name,
                facts.state,
                facts.images_per_second,
                facts.wall_s,
                agrees,
                *(scores[column] for column in ("base", "novel", "hm", "all")),
                *(waits.get(part) for part in WAITS),
            )
        )
    return lines


def differences(runs: Mapping[str, Facts]) -> dict[str, list[str]]:
    """Settings that are not the same in all runs, by dotted field: of each run its value."""
    flat = [_flat(facts.config) for facts in runs.values()]
    names = dict.fromkeys(name for one in flat for name in one)
    values = {name: [_told(one.get(name)) for one in flat] for name in names}
    return {
        name: told
        for name, told in values.items()
        if len(set(told)) > 1 and name.split(".")[0] not in _HIDDEN
    }


def named(found: Sequence[Path]) -> dict[str, Facts]:
    """Runs by name; by their folders where names repeat."""
    facts = [read_facts(folder) for folder in found]
    names = [one.name for one in facts]
    return {one.name if names.count(one.name) == 1 else str(one.folder): one for one in facts}


def write(runs: Mapping[str, Facts], out: Path) -> None:
    """Writes the page that compares them. Raises OSError."""
    text = (
        environment()
        .get_template("compare.html")
        .render(
            made=clock(time.time()),
            names=list(runs),
            lines=compared(runs),
            curves=curves(runs),
            differences=differences(runs),
        )
    )
    durable.replace(out, text.encode(errors="replace"))


def _is_distillation(folder: Path) -> bool:
    return isinstance(read_object(folder / "config.json").get("student"), dict)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def _told(value: Any) -> str:
    value = public(value)
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    return "-" if value is None or value == "" else str(value)
