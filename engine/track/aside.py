"""A tracker's own thread: what it does, or fails to do, neither stops nor slows a run."""

import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from engine.progress import say
from engine.track.metrics import Point

__all__ = ["Aside", "Tracker"]

_MOST = 1000  # points that wait
_TICK_S = 5.0


class Tracker(Protocol):
    """Where points go. It may raise, or never return."""

    def log(self, point: Point) -> None: ...

    def tick(self) -> None:
        """Called about every five seconds: what is told is to be seen from then on."""

    def close(self, finished: bool) -> None:
        """Nothing more comes; `finished`: the run has come to its end."""

    def give_up(self) -> None:
        """Called by another thread, where close() does not return."""


class Aside:
    """Makes a tracker, and has it work, in a thread of its own.

    Points that it cannot keep up with are dropped, and it is left alone once it raises; either is
    told in one line, with its name.
    """

    def __init__(self, name: str, make: Callable[[], Tracker]) -> None:
        self._name, self._make = name, make
        self._queue: queue.Queue[Point | None] = queue.Queue(_MOST)
        self._tracker: Tracker | None = None
        self._dropped, self._finished, self._left = 0, False, False
        self._thread = threading.Thread(target=self._work, name=f"track {name}", daemon=True)
        self._thread.start()

    def put(self, point: Point) -> None:
        """Returns at once."""
        if not self._thread.is_alive():
            return
        try:
            self._queue.put_nowait(point)
        except queue.Full:
            self._dropped += 1
            if self._dropped == 1:
                say(f"warning: {self._name} does not keep up; some of what it is told is dropped")

    def end(self, finished: bool) -> None:
        """Nothing more will be put; returns at once."""
        self._finished = finished
        while True:
            with suppress(queue.Full):
                self._queue.put_nowait(None)
                return
            with suppress(queue.Empty):
                self._queue.get_nowait()

    def join(self, timeout_s: float) -> None:
        """After end(): waits so long, and then gives the tracker up."""
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._left = True
            if self._tracker:
                self._tracker.give_up()
            say(f"warning: {self._name} has not ended in time; the run goes on without it")

    def _work(self) -> None:
        try:
            tracker = self._tracker = self._make()
            next_tick = time.monotonic() + _TICK_S
            while True:
                with suppress(queue.Empty):
                    point = self._queue.get(timeout=max(0.0, next_tick - time.monotonic()))
                    if point is None:
                        break
                    tracker.log(point)
                if time.monotonic() >= next_tick:
                    tracker.tick()
                    next_tick = time.monotonic() + _TICK_S
            tracker.close(self._finished)
        except Exception as error:  # of a library that others have written
            if not self._left:
                told = str(error) or type(error).__name__
                say(f"warning: nothing more is told to {self._name}: {told}")
