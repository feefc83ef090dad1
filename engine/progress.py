"""How far a run is: one live line on a terminal, plain lines elsewhere."""

import json
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.progress import track as rich_track

__all__ = ["Watch", "say", "track"]

T = TypeVar("T")
_STILL_S = 120.0  # without a step, of which it is told

_console = Console(stderr=True, highlight=False)
_listeners: list[Callable[[str], None]] = []  # the last counts


def say(message: str) -> None:
    """A line for the user; standard output is left to results."""
    if _listeners:
        _listeners[-1](message)
    else:
        _console.print(message, markup=False, soft_wrap=True)


def hand_over(listener: Callable[[str], None]) -> None:
    """From now on, what this process says goes to a listener: of a worker, whose own output nobody
    reads."""
    _listeners.append(listener)


def track(items: Iterable[T], what: str) -> Iterable[T]:
    """The items, with a bar on a terminal; it pulses where their number is not known."""
    return rich_track(items, what, console=_console, disable=not sys.stderr.isatty())


class Watch:
    """Follows the metrics.jsonl of one or several runs, by name, while the caller waits for them.

    On a terminal it draws a bar each; elsewhere it prints lines at most every `quiet_s` seconds.
    """

    def __init__(self, metrics: Mapping[str, Path], quiet_s: float = 10.0) -> None:
        self._tails = {name: _Tail(file) for name, file in metrics.items()}
        self._quiet_s = quiet_s
        self._said: set[tuple[str, str]] = set()
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
            waits = "waiting for the first step"
            tasks = {name: bar.add_task(waits, total=None, told="") for name in self._tails}
            while not self._done.wait(0.5):
                for name, record in self._news():
                    bar.update(
                        tasks[name],
                        description=f"{self._named(name)}training",
                        completed=record["step"],
                        total=record["steps"],
                        told=_told(record),
                    )

    def _print_lines(self) -> None:
        done, still_s, told_s = False, 0.0, 0.0
        while not done:
            done = self._done.wait(self._quiet_s)
            still_s += self._quiet_s
            for name, record in self._news():
                say(f"{self._named(name)}step {record['step']}/{record['steps']} · {_told(record)}")
                still_s = told_s = 0.0
            if still_s >= told_s + _STILL_S:
                told_s = still_s
                say(f"no step in the last {still_s:.0f} s")

    def _news(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The newest training record of each run that has one; says what the runs have to say."""
        for name, tail in self._tails.items():
            records = tail.read()
            for record in records:
                # Workers may have the same to say.
                if record["kind"] == "notice" and (name, record["text"]) not in self._said:
                    self._said.add((name, record["text"]))
                    say(f"{self._named(name)}{record['text']}")
            if train := [record for record in records if record["kind"] == "train"]:
                yield name, train[-1]

    def _named(self, name: str) -> str:
        return f"{name}: " if len(self._tails) > 1 else ""


class _Tail:
    """The records that are written to a file from now on."""

    def __init__(self, file: Path) -> None:
        self._file, self._offset = file, file.stat().st_size if file.exists() else 0

    def read(self) -> list[dict[str, Any]]:
        """The whole records written since the last time."""
        if not self._file.exists():
            return []
        with open(self._file) as file:
            file.seek(self._offset)
            text = file.read()
        whole = text[: text.rfind("\n") + 1]
        self._offset += len(whole.encode())
        return [json.loads(line) for line in whole.splitlines()]


def _told(record: dict[str, Any]) -> str:
    right = "agreement" if "agreement" in record else "accuracy"
    return (
        f"pass {record['pass_'] + 1} · {record['images_per_second']:,.0f} img/s · "
        f"loss {record['loss']:.3f} · {right} {100 * record[right]:.1f} %"
    )
