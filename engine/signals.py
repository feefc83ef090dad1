"""Signals to a driver: at the first, its runs are drained, so that no step of them is lost."""

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

from engine.config import Drained
from engine.lease import Lease
from engine.progress import leave_terminal, say

__all__ = ["Signals"]

_GRACE_S = 20.0  # after SIGTERM, for workers to commit and leave; with what follows, less than 30
_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
_DRAINING = "finishing the step and writing a checkpoint; {} again stops at once"


class Signals:
    """Hears Ctrl-C and SIGTERM in the main thread, from listen() on and while it is entered.

    While there are workers() they are asked to commit and leave, and the run ends by that; where
    they take too long after SIGTERM, Drained is raised. A second Ctrl-C raises KeyboardInterrupt, a
    second SIGTERM ends the process at once. So does either once the run is being left. Where no
    worker is at work, the first Ctrl-C or SIGTERM raises KeyboardInterrupt or Drained.
    """

    def __init__(self) -> None:
        self.heard: signal.Signals | None = None  # the first
        self._leases: list[Lease] = []
        self._at_work: Callable[[], bool] = lambda: False
        self._leaving: KeyboardInterrupt | None = None
        self._main = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> "Signals":
        heard = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
        self._before = [(number, signal.getsignal(number)) for number in heard]
        self.listen()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._main:
            for number, handler in self._before:
                signal.signal(number, handler)
        if self._leaving and isinstance(error, KeyboardInterrupt):
            # Ray makes a plain one of what is raised while it waits.
            raise self._leaving from None
        if isinstance(error, SystemExit):  # Ray's answer to SIGTERM while it starts
            raise self.drained(", with no student at work") from None

    def listen(self) -> None:
        """Again, after somebody else may have set handlers of his own."""
        if self._main:
            signal.signal(signal.SIGINT, self._hear)
            signal.signal(signal.SIGTERM, self._hear)
            signal.signal(signal.SIGALRM, self._give_up)

    @contextmanager
    def workers(self, leases: Iterable[Lease], at_work: Callable[[], bool]) -> Iterator[None]:
        """While runs of these leases have workers; `at_work` tells whether any of them learns yet,
        before which Ctrl-C has nothing to wait for."""
        self._leases, self._at_work = list(leases), at_work
        try:
            yield
        finally:
            self._leases = []
            if self._main:
                signal.setitimer(signal.ITIMER_REAL, 0)

    def drained(self, what: str) -> Drained:
        """That a signal has ended a run, with `what` has become of it."""
        number = self.heard or signal.SIGTERM
        return Drained(f"ended by {_NAMES[number]}{what}", 128 + number)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        number, again = signal.Signals(number), self.heard is not None
        if self._leaving or (again and (number == signal.SIGTERM or not self._leases)):
            leave_terminal()
            os._exit(128 + number)
        self.heard = self.heard or number
        if again:
            self._leave(KeyboardInterrupt("stopped; --resume goes on from the newest checkpoint"))
        if number == signal.SIGINT and not (self._leases and self._at_work()):
            self._leave(KeyboardInterrupt())
        if not self._leases:
            self._leave(self.drained(", with no student at work"))
        if number == signal.SIGTERM:
            signal.setitimer(signal.ITIMER_REAL, _GRACE_S)
        failures = []
        for lease in self._leases:  # before a word of it, for which a stopped terminal would wait
            try:
                lease.drain()
            except OSError as error:
                failures.append(error)
        say(f"{_NAMES[number]}: {_DRAINING.format(_NAMES[number])}")
        for failure in failures:
            say(f"warning: {failure}: its workers are not asked to leave")

    def _give_up(self, number: int, frame: FrameType | None) -> None:
        self._leave(self.drained(f"; student workers did not leave within {_GRACE_S:.0f} s"))

    def _leave(self, how: KeyboardInterrupt) -> None:
        self._leaving = how
        raise how
