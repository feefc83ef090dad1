"""What the teachers of a pool state of themselves, as records in the folders of their runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from engine.telemetry import Recorder

__all__ = ["Statement", "Statements"]

_PERIOD_S = 5.0
_BUSY = ("read_s", "decode_s", "forward_s", "write_s")


class Statement(NamedTuple):
    """A teacher's, of its life so far."""

    done: dict[str, float]  # sums, to be added up over teachers
    now: dict[str, Any]  # host, alive_s, queue (requests that it has), and means of its GPU
    news: list[str]  # what it has said since the last one


class Statements:
    """Writes `telemetry/teachers.jsonl` of the runs that share a pool: of each teacher, at most
    every five seconds, what it did since the last one."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._recorders = [Recorder(folder / "telemetry" / "teachers.jsonl") for folder in folders]
        self._names: dict[str, str] = {}
        self._heard: dict[str, Statement] = {}
        self._told: dict[str, Statement] = {}

    def hear(self, who: str, stated: Statement) -> None:
        self._heard[who] = stated
        if self._span_s(who) >= _PERIOD_S:
            self._tell(who)

    def close(self) -> None:
        """Tells what has not been told."""
        for who in self._heard:
            if self._span_s(who) > 0:
                self._tell(who)
        for recorder in self._recorders:
            recorder.close()

    def _span_s(self, who: str) -> float:
        return self._heard[who].now["alive_s"] - self._past(who).now["alive_s"]

    def _past(self, who: str) -> Statement:
        """What was told of it; nothing, where it has begun a new life since."""
        told = self._told.get(who)
        heard = self._heard[who]
        same = told and told.now["alive_s"] <= heard.now["alive_s"]
        if told and same and told.done["labelled"] <= heard.done["labelled"]:
            return told
        return Statement({}, {"alive_s": 0.0}, [])

    def _tell(self, who: str) -> None:
        done, now, _ = self._heard[who]
        before = self._past(who).done
        gained = {key: done[key] - before.get(key, 0) for key in ("labelled", *_BUSY)}
        record = {
            "teacher": self._names.setdefault(who, str(len(self._names))),
            **{key: value for key, value in now.items() if key != "alive_s"},
            "span_s": self._span_s(who),
            **{key: gained[key] for key in _BUSY},
            "images": gained["labelled"],
        }
        for recorder in self._recorders:
            recorder.record("teacher", **record)
        self._told[who] = self._heard[who]
