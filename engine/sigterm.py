"""SIGTERM in a driver: its runs are drained, so that no step of them is lost."""

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

from engine.config import Drained
from engine.lease import Lease
from engine.progress import say

__all__ = ["Sigterm"]

_GRACE_S = 20.0  # for workers to commit and leave; with what follows, less than 30


class Sigterm:
    """Hears SIGTERM in the main thread, from listen() on and while it is entered.

    It raises Drained in the main thread; while there are workers(), it first asks them to commit
    and leave, and only raises if they take too long. A second SIGTERM ends the process at once.
    """

    def __init__(self) -> None:
        self.asked = False
        self._leases: list[Lease] = []
        self._word = "ended by SIGTERM, with no student at work"
        self._main = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> "Sigterm":
        self._before = [(n, signal.getsignal(n)) for n in (signal.SIGTERM, signal.SIGALRM)]
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
        if self.asked and isinstance(error, KeyboardInterrupt):
            # Ray makes a plain KeyboardInterrupt of what is raised while it waits.
            raise Drained(self._word) from None

    def listen(self) -> None:
        """Again, after somebody else may have set handlers of his own."""
        if self._main:
            signal.signal(signal.SIGTERM, self._hear)
            signal.signal(signal.SIGALRM, self._give_up)

    @contextmanager
    def workers(self, leases: Iterable[Lease]) -> Iterator[None]:
        """While runs of these leases have workers."""
        self._leases = list(leases)
        try:
            yield
        finally:
            self._leases = []
            if self._main:
                signal.setitimer(signal.ITIMER_REAL, 0)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            os._exit(128 + signal.SIGTERM)
        self.asked = True
        if not self._leases:
            raise Drained(self._word)
        signal.setitimer(signal.ITIMER_REAL, _GRACE_S)
        say("SIGTERM: the student workers finish their step and commit it; again: at once")
        for lease in self._leases:
            try:
                lease.drain()
            except OSError as error:
                say(f"warning: {error}: its workers are not asked to leave")

    def _give_up(self, number: int, frame: FrameType | None) -> None:
        self._word = f"ended by SIGTERM; student workers did not leave within {_GRACE_S:.0f} s"
        raise Drained(self._word)
