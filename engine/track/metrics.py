"""What trackers are told: the records of a run as numbers with names, over its steps."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

__all__ = ["EACH", "METRICS", "Point", "Reader"]

EACH = 16  # most workers, teachers and reasons that are told one by one
_SHORTEST_S = 1e-3
_GPU = {
    "gpu_utilisation": "of its GPU, 0 to 1",
    "gpu_memory_bytes": "in use on its GPU",
    "gpu_power_w": "of its GPU, in watts",
}
_TRAIN = {
    "loss": "mean over images since the last record, as are kl and agreement",
    "kl": "of the student from the teacher, in nats",
    "agreement": "share of images whose highest class is the teacher's",
    "images_per_second": "trained by all workers",
    "lr": "learning rate",
    "not_finite": "steps whose loss or gradients were not, since the last record",
    "pass": "traversal of the corpus, from 1",
    "progress": "share of the run's steps, 0 to 1",
}
_STUDENT = {
    "images_per_second": "trained by a worker",
    "waited_labels": "share of a worker's time, 0 to 1",
    "waited_data": "share of a worker's time, 0 to 1",
    **_GPU,
}
_TEACHER = {
    "busy": "share of a teacher's time, 0 to 1: the largest of read, decode, forward and write",
    "read": "share of a teacher's time",
    "decode": "share of a teacher's time",
    "forward": "share of a teacher's time",
    "write": "share of a teacher's time",
    "queue": "requests that a teacher has",
    "images_per_second": "labelled by a teacher",
    **_GPU,
}
# What each is. That of one worker is told as student/3/waited_labels, the mean over all of them as
# students/waited_labels; likewise of teachers, and of skipped by reason.
METRICS = {"skipped": "samples that could not be used, of the run so far"} | {
    f"{group}/{name}": what
    for group, names in {
        "train": _TRAIN,
        "student": _STUDENT,
        "students": _STUDENT,
        "teacher": _TEACHER,
        "teachers": _TEACHER,
    }.items()
    for name, what in names.items()
}
_SCORES = ("student_before", "student_after", "teacher")
_FINAL = ("images_per_second", "steps", "samples", "train_s", "wall_s")


class Point(NamedTuple):
    """Numbers of one moment. `again`: the run has come to this step anew, from a checkpoint, and
    what was told of this and later steps is void."""

    step: int
    time_s: float
    values: dict[str, float]
    text: str = ""
    again: bool = False


class Reader:
    """Turns the records of one run, in their order, into points."""

    def __init__(self) -> None:
        self._step = 0
        self._known: dict[str, set[str]] = {"student": set(), "teacher": set(), "skipped": set()}
        # By name, since the last mean: it is taken as soon as one tells again.
        self._round: dict[str, dict[str, dict[str, float]]] = {"student": {}, "teacher": {}}
        self._skipped: dict[int, dict[str, int]] = {}  # by rank and reason

    def read(self, record: Mapping[str, Any]) -> list[Point]:
        """What a record of metrics.jsonl or telemetry/ comes to; nothing, for some kinds."""
        kind, time_s = record["kind"], record["time"]
        if kind == "started":
            self._step, self._skipped = record["step"], {}
            return [Point(self._step + 1, time_s, {}, again=True)]
        if kind == "train":
            self._step = record["step"]
            place = {"pass": record["pass_"] + 1, "progress": self._step / record["steps"]}
            told = _named("train", _numbers({**record, **place}, _TRAIN))
            return [Point(self._step, time_s, told | self._all_skipped())]
        if kind == "worker":
            self._skipped[record["rank"]] = record.get("skipped", {})
            told = _worker(record)
            return self._of_one("student", record["rank"], told, record["step"], time_s)
        if kind == "teacher":
            told = _teacher(record)
            return self._of_one("teacher", record["teacher"], told, self._step, time_s)
        if kind == "pass":
            scores = _named("evaluation", _numbers(record["student"]))
            return [Point(self._step, time_s, scores)]
        if kind in ("notice", "resumed"):
            return [Point(self._step, time_s, {}, text=record["text"])]
        return []

    def end(self, summary: Mapping[str, Any], time_s: float) -> list[Point]:
        """What is left, and the numbers of summary.json; it is empty for a run that has none."""
        values = self._means("student") | self._means("teacher")
        values |= _named("final", _numbers(summary, _FINAL))
        for part in (*_SCORES, "wait_fraction", "skipped"):
            values |= _named(f"final/{part}", _numbers(summary.get(part, {})))
        return [Point(self._step, time_s, values)] if values else []

    def _of_one(
        self, group: str, who: int | str, told: dict[str, float], step: int, time_s: float
    ) -> list[Point]:
        name = _plain(who)
        values = self._means(group) if name in self._round[group] else {}
        self._round[group][name] = told
        if self._is_told(group, name):
            values |= _named(f"{group}/{name}", told)
        return [Point(step, time_s, values)] if values else []

    def _is_told(self, group: str, name: str) -> bool:
        """Whether it is one of the first of its group."""
        known = self._known[group]
        if len(known) < EACH:
            known.add(name)
        return name in known

    def _all_skipped(self) -> dict[str, float]:
        total: Counter[str] = Counter()
        for told in self._skipped.values():
            for reason, count in told.items():
                plain = _plain(reason)
                total[plain if self._is_told("skipped", plain) else "other"] += count
        return _named("skipped", total)

    def _means(self, group: str) -> dict[str, float]:
        """Over all that have told since the last time."""
        columns: dict[str, list[float]] = {}
        for told in self._round[group].values():
            for name, value in told.items():
                columns.setdefault(name, []).append(value)
        self._round[group] = {}
        return _named(f"{group}s", {name: sum(c) / len(c) for name, c in columns.items()})


def _plain(name: int | str) -> str:
    """A name as a part of another."""
    return str(name).replace("/", "-")


def _worker(record: Mapping[str, Any]) -> dict[str, float]:
    span_s = max(record["span_s"], _SHORTEST_S)
    return {
        "images_per_second": record.get("images", 0) / span_s,
        **{f"waited_{side}": record[f"{side}_s"] / span_s for side in ("labels", "data")},
        **_numbers(record, _GPU),
    }


def _teacher(record: Mapping[str, Any]) -> dict[str, float]:
    span_s = max(record["span_s"], _SHORTEST_S)
    shares = {name: record[f"{name}_s"] / span_s for name in ("read", "decode", "forward", "write")}
    return {
        "busy": max(shares.values()),  # they overlap
        **shares,
        "queue": record["queue"],
        "images_per_second": record["images"] / span_s,
        **_numbers(record, _GPU),
    }


def _numbers(values: Mapping[str, Any], names: Iterable[str] | None = None) -> dict[str, float]:
    """Those that are there; of these names, if given."""
    wanted = values if names is None else [name for name in names if name in values]
    return {n: values[n] for n in wanted if type(values[n]) in (int, float)}


def _named(group: str, values: Mapping[str, float]) -> dict[str, float]:
    return {f"{group}/{name}": value for name, value in values.items()}
