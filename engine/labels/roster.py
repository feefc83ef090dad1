"""Who teaches now, and what students report: an actor between driver and students.

It imports next to nothing, so that its process starts at once and stays small. Handles of teachers
pass through it by reference: Ray imports the class of a handle where it arrives, and with it torch.
"""

import time
import uuid
from typing import Any, NamedTuple

__all__ = ["News", "Roster"]


class News(NamedTuple):
    """What the roster tells a student worker."""

    version: str  # of the list of teachers
    teachers: tuple[Any, ...] | None  # a reference to whom to ask; None: those that it knows
    trouble: str  # why there will be none


class Roster:
    """Holds who teaches, or why nobody does, what teachers are to do, and the newest numbers of
    each student worker."""

    def __init__(self) -> None:
        self._teachers: tuple[Any, ...] = ()
        self._version = uuid.uuid4().hex  # another one after a restart
        self._trouble = ""
        self._assignment: tuple[Any, ...] = ()
        self._reports: dict[str, tuple[float, dict[str, float]]] = {}

    def set(self, teachers: tuple[Any, ...], trouble: str, assignment: tuple[Any, ...]) -> None:
        """References, one each: to a list of teachers, and to what they are to do."""
        if teachers != self._teachers:
            self._teachers, self._version = teachers, uuid.uuid4().hex
        self._trouble, self._assignment = trouble, assignment

    def assignment(self) -> tuple[Any, ...]:
        return self._assignment

    def report(self, who: str, numbers: dict[str, float], seen: str) -> News:
        """Takes a student worker's numbers; `seen` is the version of the teachers that it knows.

        Only a list that it does not know is sent: every worker reports every few seconds.
        """
        self._reports[who] = time.monotonic(), numbers
        known = seen == self._version
        return News(self._version, None if known else self._teachers, self._trouble)

    def reports(self) -> dict[str, tuple[float, dict[str, float]]]:
        """By worker: the age of its report in seconds, and its numbers."""
        now = time.monotonic()
        return {who: (now - at, numbers) for who, (at, numbers) in self._reports.items()}
