"""How far a run is: a live view on a terminal, plain lines elsewhere."""

import contextlib
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.live import Live
from rich.progress import track as rich_track

from engine.live import Record, Run, State, line, told, view

__all__ = ["Sink", "Watch", "leave_terminal", "say", "track"]

T = TypeVar("T")
Sink = Callable[[str, Record], None]  # of a run, by its name, a record
_LOOK_S = 1.0
_QUIET_S, _CI_QUIET_S = 10.0, 60.0  # between plain lines
_STILL_S = 120.0  # without a step, of which it is told
_LONGEST = 1 << 20  # bytes of a record
_MOST_WAITING = 10_000  # records, for a sink
_END_S = 10.0  # for a sink to take the last ones


class _Console(Console):
    """A screen that may go away, as that of `| tee` does at Ctrl-C, without ending the process."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


_console = _Console(stderr=True, highlight=False)
_listeners: list[Callable[[str], None]] = []  # the last counts


def say(message: str) -> None:
    """A line for the user; standard output is left to results. Raises nothing where nobody can
    read it any more: no run ends of that."""
    if _listeners:
        _listeners[-1](message)
        return
    with contextlib.suppress(OSError):  # a full disk behind standard error
        _console.print(message, markup=False, soft_wrap=True)


def hand_over(listener: Callable[[str], None]) -> None:
    """From now on, what this process says goes to a listener: of a worker, whose own output nobody
    reads."""
    _listeners.append(listener)


def leave_terminal() -> None:
    """Before a process ends that cannot tidy up: a live view hides the cursor."""
    _console.show_cursor(True)


def track(items: Iterable[T], what: str) -> Iterable[T]:
    """The items, with a bar on a terminal; it pulses where their number is not known."""
    return rich_track(items, what, console=_console, disable=not sys.stderr.isatty())


class Watch:
    """Follows the metrics.jsonl of one or several runs, by name, and the telemetry/ beside it,
    while the caller waits for them; hands each new record to the sinks.

    On a terminal it draws a view of them; elsewhere, and where the environment has CI, it prints a
    line for each run at most every `quiet_s` seconds: 10, or 60 under CI.

    A sink that raises is told of, and gets nothing more; one that is slow keeps nobody waiting.
    """

    def __init__(
        self, files: Mapping[str, Path], sinks: Sequence[Sink] = (), quiet_s: float | None = None
    ) -> None:
        self._files, self._sinks = files, [_Sunk(sink) for sink in sinks]
        ci = os.environ.get("CI", "").lower() not in ("", "0", "false")
        self._draws = sys.stderr.isatty() and not _console.is_dumb_terminal and not ci
        self._quiet_s = quiet_s or (_CI_QUIET_S if ci else _QUIET_S)
        # Of the files that are there, what is written from now on.
        there = [file for metrics in files.values() for file in _beside(metrics)]
        self._ends = {file: _end(file) for file in there}
        self._tails = {file: _Tail(file, end) for file, end in self._ends.items()}
        self._state = State({name: Run() for name in files})
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
        deadline = time.monotonic() + _END_S
        for sunk in self._sinks:
            sunk.close(deadline)

    def at_work(self) -> bool:
        """Whether the workers of any run have begun to train. What is shown may be a second behind,
        so that the files are asked where it knows of none."""
        shown = any(run.began for run in self._state.runs.values())
        tails = (_Tail(file, self._ends[file]) for file in self._files.values())
        return shown or any(one["kind"] == "started" for tail in tails for one in tail.read())

    def _follow(self) -> None:
        if self._draws:
            self._draw()
        else:
            self._print_lines()

    def _draw(self) -> None:
        size, done = _console.size, False
        drawing = Live(console=_console, auto_refresh=False, transient=True, redirect_stdout=False)
        with drawing:
            while not done:
                done = self._done.wait(_LOOK_S)
                self._look()
                if size != _console.size:  # what was drawn may lie in other lines now
                    size = _console.size
                    _console.clear()
                drawing.update(view(self._state, time.time(), *size), refresh=True)

    def _print_lines(self) -> None:
        told_s = step_s = time.monotonic()
        still_s, done = 0.0, False
        fresh: set[str] = set()
        while not done:
            done = self._done.wait(min(_LOOK_S, self._quiet_s))
            trained, now_s = self._look(), time.monotonic()
            if trained:
                fresh |= trained
                step_s, still_s = now_s, 0.0
            if fresh and (done or now_s - told_s >= self._quiet_s):
                for name in sorted(fresh):
                    say(f"{self._named(name)}{line(self._state.runs[name], time.time())}")
                fresh.clear()
                told_s = now_s
            if now_s - step_s >= still_s + _STILL_S:
                still_s = now_s - step_s
                say(f"no step in the last {still_s:.0f} s")

    def _look(self) -> set[str]:
        """Takes in the new records, and hands them on; names the runs that have trained."""
        trained = set()
        for name, metrics in self._files.items():
            for file in _beside(metrics):
                tail = self._tails.setdefault(file, _Tail(file, 0))
                for record in tail.read():
                    self._hear(name, record)
                    self._state = told(self._state, name, record)
                    for sunk in self._sinks:
                        sunk.take(name, record)
                    if record["kind"] == "train":
                        trained.add(name)
        return trained

    def _hear(self, name: str, record: Record) -> None:
        if record["kind"] == "notice":
            self._say_once(name, f"{self._named(name)}{record['text']}")
        if "no_gpu" in record:
            self._say_once("", f"no GPU metrics: {record['no_gpu']}")

    def _say_once(self, name: str, text: str) -> None:
        """Workers may have the same to say."""
        if (name, text) not in self._said:
            self._said.add((name, text))
            say(text)

    def _named(self, name: str) -> str:
        return f"{name}: " if len(self._files) > 1 else ""


def _beside(metrics: Path) -> list[Path]:
    """The file itself, and those of workers and teachers."""
    telemetry = metrics.parent / "telemetry"
    return [metrics, *sorted(telemetry.glob("worker-*.jsonl")), telemetry / "teachers.jsonl"]


def _end(file: Path) -> int:
    """Of the whole records of a file: a part of one is going to be cut off."""
    if not file.exists():
        return 0
    with open(file, "rb") as opened:
        size = opened.seek(0, os.SEEK_END)
        opened.seek(max(0, size - _LONGEST))
        tail = opened.read()
    return size - len(tail) + tail.rfind(b"\n") + 1


class _Tail:
    """The whole records of a file from `offset` on."""

    def __init__(self, file: Path, offset: int) -> None:
        self._file, self._offset = file, offset

    def read(self) -> list[Record]:
        """Those written since the last time."""
        try:
            if self._file.stat().st_size <= self._offset:
                return []
            with open(self._file, "rb") as file:
                file.seek(self._offset)
                text = file.read()
        except OSError:  # it is not there yet, or its server is away
            return []
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [told for one in whole.splitlines() if (told := _record(one))]


def _record(text: bytes) -> Record | None:
    """None of what is none: two records in one line, where a disk was full for a while, or where
    hosts append over a network."""
    try:
        told = json.loads(text)
    except ValueError:
        return None
    return told if isinstance(told, dict) and {"time", "kind"} <= told.keys() else None


class _Sunk:
    """A sink, which takes its records in a thread of its own."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._name = getattr(sink, "__name__", type(sink).__name__)
        self._waiting: queue.Queue[tuple[str, Record] | None] = queue.Queue()
        self._off = self._late = False
        self._thread = threading.Thread(target=self._run, name="sink", daemon=True)
        self._thread.start()

    def take(self, name: str, record: Record) -> None:
        if self._off:
            return
        if self._waiting.qsize() < _MOST_WAITING:
            self._waiting.put((name, record))
        elif not self._late:
            self._late = True
            say(f"warning: {self._name} is slow, and misses records: {_MOST_WAITING} wait")

    def close(self, deadline: float) -> None:
        """Waits until it has taken what it was handed, up to a `deadline` of time.monotonic()."""
        if not self._off:
            self._waiting.put(None)
            self._thread.join(max(0.0, deadline - time.monotonic()))
            if self._thread.is_alive():
                self._drop("it is too slow for the last of them")

    def _run(self) -> None:
        while not self._off and (one := self._waiting.get()):
            try:
                self._sink(*one)
            except Exception as error:  # a broken tracker stops no run
                self._drop(f"{type(error).__name__}: {error}")

    def _drop(self, why: str) -> None:
        self._off = True
        say(f"warning: {self._name} gets no more records: {why}")
