"""How far a run is: one live line on a terminal, plain lines elsewhere."""

import json
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.progress import track as rich_track

__all__ = ["Watch", "say", "track"]

T = TypeVar("T")

_console = Console(stderr=True, highlight=False)


def say(message: str) -> None:
    """A line for the user; standard output is left to results."""
    _console.print(message, markup=False, soft_wrap=True)


def track(items: Iterable[T], what: str) -> Iterable[T]:
    """The items, with a bar on a terminal; it pulses where their number is not known."""
    return rich_track(items, what, console=_console, disable=not sys.stderr.isatty())


class Watch:
    """Follows a run's metrics.jsonl while the caller waits for the run.

    On a terminal it draws a bar; elsewhere it prints a line at most every `quiet_s` seconds.
    """

    def __init__(self, metrics: Path, quiet_s: float = 10.0) -> None:
        self._metrics, self._quiet_s = metrics, quiet_s
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="watch", daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()

    def _follow(self) -> None:
        if not sys.stderr.isatty():
            self._print_lines()
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[told]}"),
        )
        with Progress(*columns, console=_console, transient=True) as bar:
            task = bar.add_task("waiting for the first step", total=None, told="")
            offset = 0
            while not self._done.wait(0.5):
                record, offset = self._newest(offset)
                if record:
                    bar.update(
                        task,
                        description="training",
                        completed=record["step"],
                        total=record["steps"],
                        told=_told(record),
                    )

    def _print_lines(self) -> None:
        offset, done = 0, False
        while not done:
            done = self._done.wait(self._quiet_s)
            record, offset = self._newest(offset)
            if record:
                say(f"step {record['step']}/{record['steps']} · {_told(record)}")

    def _newest(self, offset: int) -> tuple[dict[str, Any] | None, int]:
        """The last whole training record written after `offset`, and where to read on."""
        if not self._metrics.exists():
            return None, offset
        with open(self._metrics) as file:
            file.seek(offset)
            text = file.read()
        whole = text[: text.rfind("\n") + 1]
        records = [json.loads(line) for line in whole.splitlines()]
        for record in records:
            if record["kind"] == "notice":
                say(record["text"])
        train = [record for record in records if record["kind"] == "train"]
        return (train[-1] if train else None), offset + len(whole.encode())


def _told(record: dict[str, Any]) -> str:
    right = "agreement" if "agreement" in record else "accuracy"
    return (
        f"pass {record['pass_'] + 1} · {record['images_per_second']:,.0f} img/s · "
        f"loss {record['loss']:.3f} · {right} {100 * record[right]:.1f} %"
    )
