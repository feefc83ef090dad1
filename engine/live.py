"""What is known of runs at work, and how it looks on a terminal: pure functions of records."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import exp
from typing import Any, NamedTuple

from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

__all__ = ["Record", "Run", "State", "line", "told", "view"]

Record = Mapping[str, Any]
_MEMORY_S = 60.0  # that the pace is a mean over, roughly
_SILENT_S = 60.0  # after which a teacher that is not heard of is left out
_STILL_S = 120.0  # without a record, of which it is told
_MOST_ROWS = 8  # of students, and of teachers
_GAP = 2


@dataclass(frozen=True)
class Run:
    """One run, as far as its records have told."""

    began: Record = field(default_factory=dict)  # the newest life of its workers
    last: Record = field(default_factory=dict)  # training record
    at: tuple[float, int] | None = None  # when it came to which step
    paces: int = 0  # steps that were timed in this life
    pace_s: float | None = None  # of a step, lately
    gap_s: float = 0.0  # between the last two
    images: float = 0.0  # trained since the first record,
    span_s: float = 0.0  # in so many seconds
    workers: Mapping[int, Record] = field(default_factory=dict)  # the newest of each rank

    def left_s(self, now: float) -> float | None:
        """Seconds until the last step, at the pace of late."""
        if self.pace_s is None or not self.last:
            return None
        at_record_s = self.pace_s * (self.last["steps"] - self.last["step"])
        return max(0.0, at_record_s - (now - self.last["time"]))

    def skipped(self) -> Counter[str]:
        """Samples by reason, of all workers, as they last told."""
        total: Counter[str] = Counter()
        for record in self.workers.values():
            total.update(record["skipped"])
        return total


@dataclass(frozen=True)
class State:
    """Runs by name, and the teachers that they share."""

    runs: Mapping[str, Run]
    teachers: Mapping[str, Record] = field(default_factory=dict)  # the newest of each


def told(state: State, name: str, record: Record) -> State:
    """The state after a record of the run `name`."""
    if record["kind"] == "teacher":
        return replace(state, teachers={**state.teachers, record["teacher"]: record})
    run = state.runs[name]
    if record["kind"] == "worker":
        run = replace(run, workers={**run.workers, record["rank"]: record})
    elif record["kind"] == "started":
        run = replace(run, began=record, at=(record["time"], record["step"]), paces=0)
    elif record["kind"] == "train":
        run = _trained(run, record)
    return replace(state, runs={**state.runs, name: run})


def _trained(run: Run, record: Record) -> Run:
    now = replace(run, last=record, at=(record["time"], record["step"]))
    if run.at is None or record["step"] <= run.at[1]:
        return now
    span_s = record["time"] - run.at[0]
    pace_s = span_s / (record["step"] - run.at[1])
    if run.paces > 1 and run.pace_s is not None:  # the first steps of a life may be slow
        pace_s = run.pace_s + (1 - exp(-span_s / _MEMORY_S)) * (pace_s - run.pace_s)
    images = record["images_per_second"] * span_s
    return replace(
        now,
        paces=run.paces + 1,
        pace_s=pace_s,
        gap_s=span_s,
        images=run.images + images,
        span_s=run.span_s + span_s,
    )


def line(run: Run, now: float) -> str:
    """A run that has trained, in a line."""
    return " · ".join(_parts(run, now))


def view(state: State, now: float, width: int, height: int) -> RenderableType:
    """All runs on a terminal of that size, of which no line is wrapped; `now` as records have it:
    seconds since 1970."""
    heads: list[RenderableType] = []
    lines = 0
    for name, run in state.runs.items():
        parts = _parts(run, now) if run.last else ["waiting for the first step"]
        if weight := run.began.get("effective_weight"):
            parts.append(f"effective weight {weight:g}")
        skipped = [f"{reason} {count:,}" for reason, count in run.skipped().most_common()]
        if skipped:
            skipped[0] = f"skipped so far: {skipped[0]}"
        texts = [*_flow(parts, width), *_flow(skipped, width)]
        heads += [_bar(name, run, now, width), *(_unwrapped(text) for text in texts)]
        lines += 1 + len(texts)
    one, widest = len(state.runs) == 1, _widest(width)
    students = [
        _student(f"student {rank}" if one else _cut(name, f"/{rank}", widest), record)
        for name, run in state.runs.items()
        for rank, record in sorted(run.workers.items())
    ]
    heard = {n: one for n, one in state.teachers.items() if now - one["time"] < _SILENT_S}
    teachers = [_teacher(f"teacher {name}", heard[name]) for name in sorted(heard, key=int)]
    room = (height - lines - 3) // (2 if students and teachers else 1)
    most = min(_MOST_ROWS, max(1, room))
    rows = [*_shown(students, most), *_shown(teachers, most)]
    return Group(*heads, *([_table(rows, width)] if rows else []))


# -------------------------------------------------------------------- a run


def _parts(run: Run, now: float) -> list[str]:
    """What to tell of a run, in a few words each."""
    last = run.last
    passes = f"/{run.began['passes']}" if run.began else ""
    parts = [f"step {last['step']}/{last['steps']}", f"pass {last['pass_'] + 1}{passes}"]
    if (left_s := run.left_s(now)) is not None:
        parts.append(f"ETA {_clock(left_s)}")
    mean = f", mean {run.images / run.span_s:,.0f}" if run.span_s else ""
    right = "agreement" if "agreement" in last else "accuracy"
    parts += [
        f"{last['images_per_second']:,.0f} img/s{mean}",
        f"loss {last['loss']:.3f}",
        f"{right} {100 * last[right]:.1f} %",
    ]
    if (still_s := now - last["time"]) > max(_STILL_S, 3 * run.gap_s):
        parts.append(f"no word for {_clock(still_s)}")
    return parts


def _bar(name: str, run: Run, now: float, width: int) -> Table:
    done, steps = run.last.get("step", 0), run.last.get("steps") or run.began.get("steps")
    share = f"{100 * done / steps:.0f} %" if steps else ""
    grid = Table.grid(padding=(0, 1))
    grid.add_column(no_wrap=True, overflow="ellipsis", max_width=width // 3, style="bold")
    grid.add_column(width=width - min(cell_len(name), width // 3) - 7)
    grid.add_column(no_wrap=True, width=5, justify="right")
    bar = ProgressBar(steps, done, pulse=not steps, animation_time=now)
    grid.add_row(Text(name), bar, share)
    return grid


def _clock(seconds: float) -> str:
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (f"{days} d " if days else "") + f"{hour}:{minute:02}:{second:02}"


def _flow(parts: Iterable[str], width: int) -> list[str]:
    """Lines of parts, as many in each as fit."""
    lines: list[str] = []
    for part in parts:
        if lines and len(longer := f"{lines[-1]} · {part}") <= width:
            lines[-1] = longer
        else:
            lines.append(part)
    return lines


def _unwrapped(text: str) -> Text:
    return Text(text, no_wrap=True, overflow="ellipsis")


# -------------------------------------------------------------------- who works


Row = Mapping[str, Any]  # by column


def _widest(width: int) -> int:
    """Columns for the names of rows."""
    return max(len("and 99 more"), width // 5)


def _cut(name: str, end: str, width: int) -> str:
    room = width - len(end)
    return (name if len(name) <= room else f"{name[: room - 1]}…") + end


def _share(value: float) -> str:
    return f"{100 * value:.0f} %"


class _Column(NamedTuple):
    """`title` in two lines; of the columns that do not fit, the highest `rank` goes first."""

    key: str
    title: str
    rank: int
    shown: Callable[[Any], str]


_COLUMNS = (
    _Column("name", "", 0, str),
    _Column("host", "host", 9, str),
    _Column("busy", "busy", 1, _share),
    _Column("labels", "waits\nlabels", 2, _share),
    _Column("data", "waits\ndata", 5, _share),
    _Column("queue", "queue", 4, lambda value: f"{value:.0f}"),
    _Column("images", "img/s", 3, lambda value: f"{value:,.0f}"),
    _Column("gpu_utilisation", "GPU", 6, _share),
    _Column("gpu_memory_bytes", "GPU\nmemory", 7, lambda value: f"{value / 2**30:.1f} GiB"),
    _Column("gpu_power_w", "GPU\npower", 8, lambda value: f"{value:.0f} W"),
)


def _student(name: str, record: Record) -> Row:
    labels, data = (record[key] / record["span_s"] for key in ("labels_s", "data_s"))
    busy = max(0.0, 1 - labels - data)
    return _row(name, record) | {"busy": busy, "labels": labels, "data": data}


def _teacher(name: str, record: Record) -> Row:
    """Its steps overlap: the longest tells how busy it is."""
    busy = max(record[f"{step}_s"] for step in ("read", "decode", "forward", "write"))
    return _row(name, record) | {"busy": busy / record["span_s"], "queue": record["queue"]}


def _row(name: str, record: Record) -> dict[str, Any]:
    gpu = {key: value for key, value in record.items() if key in _GPU}
    per_second = record["images"] / record["span_s"]
    return {"name": name, "host": record["host"], "images": per_second, **gpu}


_GPU = {column.key for column in _COLUMNS if column.key.startswith("gpu_")}


def _shown(rows: Sequence[Row], most: int) -> list[Row]:
    """At most so many rows; the last one may tell of many, by their mean."""
    if len(rows) <= most:
        return list(rows)
    others = rows[most - 1 :]
    told = f"and {len(others)} more" if most > 1 else f"{len(others)} of them"
    mean: dict[str, Any] = {"name": told}
    for column in _COLUMNS[2:]:
        if values := [row[column.key] for row in others if column.key in row]:
            mean[column.key] = sum(values) / len(values)
    return [*rows[: most - 1], mean]


def _table(rows: Sequence[Row], width: int) -> Table:
    """Of the columns that have something to tell, and fit."""
    widest = {"name": _widest(width), "host": 20}
    cells = {
        column: [column.shown(row[column.key]) if column.key in row else "" for row in rows]
        for column in _COLUMNS
    }
    widths = {
        column: min(
            widest.get(column.key, width),
            max(len(text) for text in (*column.title.split("\n"), *cells[column])),
        )
        for column in _COLUMNS
        if any(cells[column])
    }
    while sum(widths.values()) + _GAP * (len(widths) - 1) > width and len(widths) > 1:
        del widths[max(widths, key=lambda column: column.rank)]
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="dim")
    for column, size in widths.items():
        left = column.key in ("name", "host")
        table.add_column(
            column.title,
            width=size,
            no_wrap=True,
            overflow="ellipsis",
            justify="left" if left else "right",
        )
    for number in range(len(rows)):
        table.add_row(*(Text(cells[column][number]) for column in widths))
    return table
