"""Who teaches now, and what students report: an actor between driver and students.

It imports next to nothing, so that its process starts at once and stays small.
"""

import time
from typing import Any

__all__ = ["Roster"]


class Roster:
    """Holds the handles of teachers, or why there are none, what they are to do, and the newest
    numbers of each student worker."""

    def __init__(self) -> None:
        self._teachers: list[Any] = []
        self._trouble = ""
        self._assignment: tuple[Any, ...] = ()
        self._reports: dict[str, tuple[float, dict[str, float]]] = {}

    def set(self, teachers: list[Any], trouble: str, assignment: tuple[Any, ...]) -> None:
        """`assignment` is a reference to what teachers are to do."""
        self._teachers, self._trouble, self._assignment = teachers, trouble, assignment

    def assignment(self) -> tuple[Any, ...]:
        return self._assignment

    def report(self, who: str, numbers: dict[str, float]) -> tuple[list[Any], str]:
        """Takes a student worker's numbers; gives the teachers to ask, and why there will be
        none."""
        self._reports[who] = time.monotonic(), numbers
        return self._teachers, self._trouble

    def reports(self) -> dict[str, tuple[float, dict[str, float]]]:
        """By worker: the age of its report in seconds, and its numbers."""
        now = time.monotonic()
        return {who: (now - at, numbers) for who, (at, numbers) in self._reports.items()}
