"""The pool of teachers as the driver keeps it: where they are placed, and how many there are."""

import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, RayActorError, RayError

from engine.config import UserError
from engine.labels.assignment import Assignment
from engine.labels.pool import start_teacher
from engine.labels.roster import Roster
from engine.labels.statements import Statement, Statements
from engine.progress import say

__all__ = ["Node", "Pool", "decided", "placed"]

_PERIOD_S = 2.0
_PATIENCE_S = 30.0  # for an answer of the roster, and of teachers at the end
_SETTLED_S = 10.0  # between two changes of the number of teachers
_STARVED, _FED, _BUSY = 0.1, 0.02, 0.8  # shares of the time, see decided()
_SILENT_S = 10.0  # of waiting for a label, from which the user is told
_STALE_S = 10.0  # age of a report that counts no more
_STILLBORN = 3  # teachers that may fail to start, before any has, until the run is given up


class Node(NamedTuple):
    """A machine of the cluster."""

    id: str
    size: float  # GPUs or CPUs, of whichever the teachers take


def placed(nodes: Sequence[Node], taken: Counter[str]) -> str:
    """The node for one more teacher, where `taken` says how many each has: teachers are spread in
    proportion to the size of nodes, so that every student has some near, who read the same blocks
    through one cache."""
    return min(nodes, key=lambda node: ((taken[node.id] + 1) / node.size, node.id)).id


def decided(now: int, least: int, most: int, waiting: float, busy: float) -> int:
    """How many teachers there are to be. `waiting`: share of the time that students wait for
    labels; `busy`: share of the time that a teacher's slowest thread works."""
    if waiting > _STARVED and now < most:
        return now + 1
    if waiting < _FED and now > least and busy * now / (now - 1) < _BUSY:
        return now - 1
    return now


class _Seen(NamedTuple):
    """Numbers at one moment."""

    at_s: float
    waited_s: dict[str, float]  # by worker
    busy_s: dict[str, float]  # by teacher


class Pool:
    """Starts teachers, keeps their number, tells the roster who is ready, the user what they say,
    and the `folders` of the runs that share them what they do. One thread of the driver's."""

    def __init__(self, assignment: Assignment, folders: Sequence[Path] = ()) -> None:
        told = assignment.config.teacher
        self._assignment, self._sent = assignment, ray.put(assignment)
        self._least = max(told.actors, 1)
        self._most = max(told.max_actors, self._least)
        roster: Any = ray.remote(Roster).options(num_cpus=0, max_restarts=-1, max_task_retries=-1)
        self.roster: ActorHandle = roster.remote()
        self._places: dict[ActorHandle, str] = {}
        self._ready: set[ActorHandle] = set()
        self._published: list[ActorHandle] = []
        self._list = ray.put(self._published)
        self._asked: dict[ray.ObjectRef, ActorHandle] = {}  # what they have done
        self._statements: dict[str, dict[str, float]] = {}
        self._records = Statements(folders)
        self._past: list[dict[str, float]] = []  # what those said that are gone
        self._said: set[str] = set()
        self._stillborn, self._trouble = 0, ""
        self._before: _Seen | None = None
        self._told_waiting_s = 0.0
        self._most_at_once = 0
        for _ in range(self._least):
            self._start()
        self._publish()  # they wait for it; the roster may take its time to start
        self._lock = threading.Lock()  # of all the above
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pool", daemon=True)
        self._thread.start()

    def statement(self) -> dict[str, float]:
        """What all teachers have done together, those that are gone too, and how many there were
        at most (`teachers`). Waits a little for those that are busy."""
        with self._lock:
            if self._asked:  # by now, that answer may be an old one
                self._ask_teachers(_PATIENCE_S)
            self._ask_teachers(_PATIENCE_S)
            total: Counter[str] = Counter()
            for told in (*self._past, *self._statements.values()):
                total.update(told)
            return {**total, "teachers": self._most_at_once}

    def close(self) -> None:
        """Ends the thread, then the teachers."""
        self._stop.set()
        self._thread.join()
        self._records.close()
        for actor in (*self._places, self.roster):
            ray.kill(actor)

    def _start(self) -> None:
        resource = "GPU" if self._assignment.config.device == "cuda" else "CPU"
        own = self._assignment.config.teacher.resource or resource
        nodes = [
            Node(node["NodeID"], node["Resources"][resource])
            for node in ray.nodes()
            if node["Alive"] and node["Resources"].get(resource) and node["Resources"].get(own)
        ]
        if not nodes:
            raise UserError(
                f"teacher.resource: no node of the cluster has both {own} and {resource}"
            )
        where = placed(nodes, Counter(self._places.values()))
        self._places[start_teacher(self._assignment.config.teacher, self.roster, where)] = where
        self._most_at_once = max(self._most_at_once, len(self._places))

    def _publish(self) -> None:
        """Those that are ready; one that still loads would keep who asks it waiting. Calls of the
        roster come in their order, so that nobody waits for this one."""
        teachers = [one for one in self._places if one in self._ready] or list(self._places)
        if teachers != self._published:
            self._published, self._list = teachers, ray.put(teachers)
        self.roster.set.remote((self._list,), self._trouble, (self._sent,))

    def _run(self) -> None:
        while not self._stop.wait(_PERIOD_S):
            try:
                with self._lock:
                    self._look()
            except RayError as error:  # the roster is on its way back
                self._say_once(f"the roster of teachers does not answer: {_last_line(error)}")
            except Exception as error:  # teachers are to be looked after as long as there is a run
                self._say_once(f"warning: teachers: {type(error).__name__}: {error}")

    def _look(self) -> None:
        while len(self._places) < self._least and self._stillborn < _STILLBORN:
            self._start()  # where there was no node for it before
        self._ask_teachers(_PERIOD_S)
        self._publish()  # some are ready by now, and the roster may have been restarted
        told = ray.get(self.roster.reports.remote(), timeout=_PATIENCE_S)
        reports = {
            who: numbers for who, (age_s, numbers) in told.items() if numbers and age_s < _STALE_S
        }
        self._tell(reports)
        if self._most > self._least and reports and len(self._ready) == len(self._places):
            self._scale(reports)

    # ------------------------------------------------------------ teachers

    def _ask_teachers(self, timeout_s: float) -> None:
        """Hears what they have done, of those that answer in time."""
        waiting = set(self._asked.values())
        for teacher in self._places:
            if teacher not in waiting:
                self._asked[teacher.statement.remote()] = teacher
        if not self._asked:
            return
        refs = list(self._asked)
        ready, _ = ray.wait(refs, num_returns=len(refs), timeout=timeout_s)
        for ref in ready:
            teacher = self._asked.pop(ref)
            if teacher not in self._places:
                continue  # it has been retired
            try:
                self._hear(teacher, ray.get(ref))
            except ActorUnavailableError:
                self._ready.discard(teacher)
            except RayActorError as error:
                self._replace(teacher, error)

    def _hear(self, teacher: ActorHandle, stated: Statement) -> None:
        who = teacher._actor_id.hex()
        before = self._statements.get(who)
        if before and before["labelled"] > stated.done["labelled"]:  # it has been restarted
            self._past.append(before)
        self._statements[who] = stated.done
        self._records.hear(who, stated)
        if teacher not in self._ready:
            self._ready.add(teacher)
            say(f"{len(self._ready)} of {len(self._places)} teachers are ready")
        for line in stated.news:
            self._say_once(f"teacher: {line}")

    def _replace(self, teacher: ActorHandle, error: RayActorError) -> None:
        """Of one that is gone for good; Ray restarts those that die at work."""
        why, was_ready = _last_line(error), teacher in self._ready
        self._remove(teacher)
        self._say_once(f"a teacher is gone: {why}")
        if not was_ready and not self._statements:
            self._stillborn += 1
        if self._stillborn < _STILLBORN:
            self._start()
        else:
            self._trouble = f"teachers fail to start: {why}"

    def _remove(self, teacher: ActorHandle) -> None:
        del self._places[teacher]
        self._ready.discard(teacher)
        if told := self._statements.pop(teacher._actor_id.hex(), None):
            self._past.append(told)

    # ------------------------------------------------------------ students

    def _tell(self, reports: Mapping[str, Mapping[str, float]]) -> None:
        """Says where students have waited for long, once in so long."""
        waiting_s = max((told["waiting_s"] for told in reports.values()), default=0.0)
        if waiting_s < _SILENT_S:
            self._told_waiting_s = 0.0
        elif waiting_s > self._told_waiting_s + _SILENT_S:
            self._told_waiting_s = waiting_s
            say(
                f"a student has waited {waiting_s:.0f} s for a label; {len(self._ready)} of "
                f"{len(self._places)} teachers have answered so far"
            )

    def _scale(self, reports: Mapping[str, Mapping[str, float]]) -> None:
        seen = _Seen(
            time.monotonic(),
            {who: told["waited_s"] + told["waiting_s"] for who, told in reports.items()},
            {
                who: max(value for key, value in told.items() if key.endswith("_s"))
                for who, told in self._statements.items()
            },
        )
        if self._before is None:
            self._before = seen
            return
        past_s = seen.at_s - self._before.at_s
        if past_s < _SETTLED_S:
            return
        waiting = _share(seen.waited_s, self._before.waited_s, past_s)
        busy = _share(seen.busy_s, self._before.busy_s, past_s)
        self._before = seen
        if waiting is None or busy is None:
            return
        number = decided(len(self._places), self._least, self._most, waiting, busy)
        if number > len(self._places):
            say(f"students wait {100 * waiting:.0f} % of the time: one more teacher, {number}")
            self._start()
        elif number < len(self._places):
            say(f"teachers work {100 * busy:.0f} % of the time: one less, {number}")
            teacher = list(self._places)[-1]  # what it still owes is asked of others
            self._remove(teacher)
            self._publish()
            ray.kill(teacher)

    def _say_once(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            say(line)


def _share(now: Mapping[str, float], before: Mapping[str, float], past_s: float) -> float | None:
    """The mean share of the time, over those that were there all along; None where there is none,
    or one that began anew."""
    gained = [now[who] - before[who] for who in now.keys() & before.keys()]
    if not gained or min(gained) < 0:
        return None
    return sum(gained) / len(gained) / past_s


def _last_line(error: BaseException) -> str:
    """What Ray's long texts end with: the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
