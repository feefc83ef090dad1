"""Which teacher a worker asks for a label: pure, and one look at every teacher a label."""

from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from typing import Generic, TypeVar

__all__ = ["Choice"]

_SMOOTH, _SLOWEST = 0.7, 4.0  # of the past in a teacher's pace; the most it counts for, as a ratio

Teacher = TypeVar("Teacher")


class Choice(Generic[Teacher]):
    """What a worker, `who`, has seen of its teachers, whom `name` tells apart everywhere alike.

    `shared`: other students ask the same teachers for the same labels, so each label has a teacher
    that all prefer.
    """

    def __init__(self, who: str, name: Callable[[Teacher], str], shared: bool) -> None:
        self._who, self._name, self._shared = who, name, shared
        self._known: dict[Teacher, tuple[str, bytes]] = {}  # its name, and its rank for this worker
        self._pace_s: dict[Teacher, float] = {}  # of a teacher, for a block, as it seems here
        self._turns: dict[Teacher, int] = {}  # when each was asked last
        self._turn = 0

    def of(
        self, wanted: object, teachers: Sequence[Teacher], owed: Mapping[Teacher, int], slack: int
    ) -> Teacher:
        """The teacher that will answer the soonest, by what each has `owed` to this worker.

        Among like ones, who was asked longest ago comes first, and workers begin with different
        ones. Of a shared label, the preferred one, unless it owes more than `slack` more.
        """
        for new in [one for one in teachers if one not in self._known]:
            name = self._name(new)
            self._known[new] = name, _rank(self._who, name)
        paces = self._pace_s.values()
        usual_s = sum(paces) / len(paces) if paces else 1.0
        # A teacher that was slow once is asked now and then, and may be fast again.
        most_s = _SLOWEST * min(paces, default=1.0)

        def cost(one: Teacher) -> tuple[float, int, bytes]:
            pace_s = min(self._pace_s.get(one, usual_s), most_s)
            return (owed.get(one, 0) + 1) * pace_s, self._turns.get(one, 0), self._known[one][1]

        chosen = min(teachers, key=cost)
        if self._shared:
            told = str(wanted)
            preferred = max(teachers, key=lambda one: _rank(told, self._known[one][0]))
            if owed.get(preferred, 0) <= owed.get(chosen, 0) + slack:
                chosen = preferred
        self._turns[chosen] = self._turn = self._turn + 1
        return chosen

    def answered(self, teacher: Teacher, took_s: float, behind: int) -> None:
        """It took so long for a label, which came after `behind` others of this worker."""
        pace_s = took_s / (behind + 1)
        before_s = self._pace_s.get(teacher, pace_s)
        self._pace_s[teacher] = _SMOOTH * before_s + (1 - _SMOOTH) * pace_s

    def keep(self, teachers: Sequence[Teacher]) -> None:
        """The others are gone: what they were like is forgotten."""
        for seen in (self._known, self._pace_s, self._turns):
            for gone in seen.keys() - set(teachers):
                del seen[gone]

    def failed(self, teacher: Teacher) -> None:
        """A teacher that fails at once is not fast."""
        self._pace_s[teacher] = _SLOWEST * min(self._pace_s.values(), default=1.0)


def _rank(wanted: str, teacher: str) -> bytes:
    """A teacher's place in everybody's preference for something (rendezvous hashing, Thaler and
    Ravishankar 1998)."""
    return blake2b(f"{wanted} {teacher}".encode(), digest_size=8).digest()
