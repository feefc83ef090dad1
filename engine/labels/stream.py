"""The target source that streams from a pool of teachers.

The student pulls: a bounded number of requests is outstanding, each sent to the teacher that owes
it the least of its time. A label that is late is asked of another teacher too: labels are pure, so
the first will do.
"""

import time
from collections import Counter, OrderedDict, deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import ray
import torch
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError

from engine.config import UserError
from engine.data.loader import Batch
from engine.data.order import Blocks
from engine.labels.choice import Choice
from engine.labels.roster import News
from engine.labels.targets import (
    BlockView,
    Form,
    SoftTargets,
    Targets,
    exact,
    finite,
    gathered,
)
from engine.progress import say

__all__ = ["StreamSource"]

_TRIES = 3  # requests of a label that a teacher answers with an error
_REPORT_S = 2.0  # between reports to the roster
_LATE_S, _LATE = 5.0, 10.0  # a label is late after so long, and so many times the usual time
_EACH = 4  # requests outstanding for each teacher, over all workers, unless told otherwise


class _Asked(NamedTuple):
    wanted: BlockView
    teacher: ActorHandle
    behind: int  # how many other requests of this worker
    at_s: float


class StreamSource:
    """Target source over the teachers of a roster.

    `who` names this worker to the roster. `outstanding` bounds the requests that are not answered;
    None: `_EACH` for each teacher, over the `workers` of this student. `kept_samples` bounds the
    labels held, in samples. `shared`: other students ask the same teachers for the same labels, so
    each label has a teacher that all prefer. `waited_s` is the time spent waiting for labels.

    Raises RuntimeError for a label that is needed and does not come within `timeout_s`, or that
    teachers repeatedly fail to make; that is not finite, or of a wrong shape; or that was made by
    another teacher, under another view policy, or of another corpus, than this run's. A UserError
    of a teacher's it raises at once.
    """

    def __init__(
        self,
        roster: ActorHandle,
        who: str,
        fingerprints: Mapping[str, str],
        blocks: Mapping[str, Blocks],
        form: Form,
        width: int,
        device: torch.device,
        outstanding: int | None,
        workers: int,
        timeout_s: float,
        kept_samples: int,
        shared: bool,
    ) -> None:
        self.waited_s = 0.0
        self._roster, self._who = roster, who
        self._choice = Choice[ActorHandle](who, lambda one: one._actor_id.hex(), shared)
        self._fingerprints, self._blocks = fingerprints, blocks
        self._form, self._width, self._device = form, width, device
        self._told_outstanding, self._workers, self._timeout_s = outstanding, workers, timeout_s
        self._queue: deque[BlockView] = deque()
        self._asked: dict[ray.ObjectRef, _Asked] = {}
        self._kept: OrderedDict[BlockView, SoftTargets] = OrderedDict()
        self._kept_samples = kept_samples
        self._said: set[str] = set()  # kinds of trouble
        self._trouble = ""  # for which there will be no teachers
        self._failed: dict[BlockView, list[ActorHandle]] = {}  # who has failed to label it
        self._given_up: dict[BlockView, str] = {}  # and why
        self._took_s: deque[float] = deque(maxlen=32)
        self._answered = self._again = self._bytes = 0
        self._lost_kl = 0.0
        self._reported_s = 0.0
        self._report: ray.ObjectRef | None = None
        self._teachers: list[ActorHandle] = []
        self._seen = ""  # which list of teachers
        self._hear(ray.get(roster.report.remote(who, {}, self._seen)))

    def request(self, wanted: Sequence[BlockView]) -> None:
        known = {*self._queue, *self._kept, *(asked.wanted for asked in self._asked.values())}
        for block in wanted:
            self._given_up.pop(block, None)  # it has a new chance
            if block in self._kept:
                self._kept.move_to_end(block)
        self._queue.extend(block for block in wanted if block not in known)
        self._talk(0.0)
        self._pump()

    def targets(self, batch: Batch) -> Targets:
        work = batch.work
        # What the student itself could not read or decode needs no label.
        blocks = np.unique(work.share.blocks[batch.valid_B])
        needed = [BlockView(work.corpus, int(block), work.view) for block in blocks]
        answers = {wanted.block: label for wanted, label in self.labels(needed).items()}
        return gathered(answers, batch, self._form, self._width, self._device)

    def labels(self, needed: Sequence[BlockView]) -> dict[BlockView, SoftTargets]:
        """Waits for some labels; raises as targets() does."""
        started = time.perf_counter()
        self._collect(0)
        asked = {asked.wanted for asked in self._asked.values()}
        missing = [w for w in needed if w not in self._kept and w not in self._given_up]
        for wanted in reversed([m for m in missing if m not in asked]):
            if wanted in self._queue:
                self._queue.remove(wanted)
            self._queue.appendleft(wanted)
        self._pump()
        while late := [wanted for wanted in needed if wanted not in self._kept]:
            waited_s = time.perf_counter() - started
            for wanted in needed:
                if wanted in self._given_up:
                    raise RuntimeError(f"no label of {wanted}: {self._given_up[wanted]}")
            if self._trouble and not self._asked:
                raise RuntimeError(f"no label of {late[0]}: {self._trouble}")
            if waited_s > self._timeout_s:
                raise RuntimeError(
                    f"targets.timeout_s: no label of {late[0]} after {self._timeout_s:.0f} s; "
                    f"{len(self._asked)} requests are with {len(self._teachers)} teachers"
                )
            self._collect(min(_REPORT_S, max(0.0, self._timeout_s - waited_s)))
            self._ask_others(late)
            self._talk(waited_s)
            self._pump()  # there may be a teacher again
        self.waited_s += time.perf_counter() - started
        answers = {wanted: self._kept[wanted] for wanted in needed}
        self._evict()
        return answers

    def statement(self) -> dict[str, float]:
        """Images whose labels came, and came again; bytes; and the KL they have lost, summed."""
        return {
            "received": self._answered,
            "received_again": self._again,
            "received_bytes": self._bytes,
            "lost_kl_sum": self._lost_kl,
        }

    def close(self) -> None:
        for ref in self._asked:
            ray.cancel(ref)

    # ------------------------------------------------------------ asking

    @property
    def _outstanding(self) -> int:
        return self._told_outstanding or max(
            _EACH, -(-_EACH * len(self._teachers) // self._workers)
        )

    def _pump(self) -> None:
        while self._queue and self._teachers and len(self._asked) < self._outstanding:
            self._ask(self._queue.popleft(), self._teachers)

    def _ask(self, wanted: BlockView, teachers: Sequence[ActorHandle]) -> None:
        failed = self._failed.get(wanted, ())
        teachers = [one for one in teachers if one not in failed] or teachers
        owed = Counter(asked.teacher for asked in self._asked.values())
        teacher = self._choice.of(wanted, teachers, owed, max(1, self._outstanding // 2))
        ref = teacher.label.remote(wanted)
        self._asked[ref] = _Asked(wanted, teacher, owed[teacher], time.perf_counter())

    def _ask_others(self, late: Sequence[BlockView]) -> None:
        """Asks another teacher for what one has been asked for too long ago."""
        usual_s = sorted(self._took_s)[len(self._took_s) // 2] if self._took_s else float("inf")
        limit_s = max(_LATE_S, _LATE * usual_s)
        for wanted in late:
            asked = [asked for asked in self._asked.values() if asked.wanted == wanted]
            busy = {one.teacher for one in asked}
            others = [teacher for teacher in self._teachers if teacher not in busy]
            newest_s = max((one.at_s for one in asked), default=float("inf"))
            if others and time.perf_counter() - newest_s > limit_s:
                self._say_once("late", f"label of {wanted} is late: asking another teacher")
                self._ask(wanted, others)

    def _talk(self, waiting_s: float) -> None:
        """Reports to the roster, and hears which teachers there are, now and then; waits for
        nobody."""
        now = time.perf_counter()
        if self._report is not None:
            ready, _ = ray.wait([self._report], timeout=0)
            if not ready:
                return
            try:
                self._hear(ray.get(self._report))
            except RayError as error:
                self._say_once("roster", f"the roster of teachers is gone ({error}): going on")
            self._report = None
        if now - self._reported_s > _REPORT_S:
            told = {"waited_s": self.waited_s, "waiting_s": waiting_s}
            self._report = self._roster.report.remote(self._who, told, self._seen)
            self._reported_s = now

    def _hear(self, told: News) -> None:
        self._trouble = told.trouble
        # An empty roster has just been restarted, and will be told anew.
        if told.teachers:
            self._teachers, self._seen = ray.get(told.teachers[0], timeout=_REPORT_S), told.version
            self._choice.keep(self._teachers)

    # ------------------------------------------------------------ answers

    def _collect(self, timeout_s: float) -> None:
        """Takes in the answers that have come; waits for one at most `timeout_s`."""
        if not self._asked:
            time.sleep(min(timeout_s, 0.1))  # there is no teacher to ask
            return
        refs = list(self._asked)
        ready, _ = ray.wait(refs, num_returns=1, timeout=timeout_s, fetch_local=True)
        if ready:
            ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0, fetch_local=True)
        for ref in ready:
            asked = self._asked.pop(ref)
            wanted = asked.wanted
            try:
                answer = ray.get(ref)
            except ActorUnavailableError:  # it is being restarted
                self._queue.appendleft(wanted)
            except RayActorError as error:  # it is gone for good: the roster will tell of others
                self._say_once("gone", f"a teacher is gone ({error}): its labels are asked again")
                self._teachers = [one for one in self._teachers if one != asked.teacher]
                self._seen = ""  # to hear it all anew
                self._queue.appendleft(wanted)
            except RayTaskError as error:
                if isinstance(error.cause, UserError):  # which no other try would mend
                    raise UserError(str(error.cause)) from None
                self._fail(asked, error.cause)
            except RayError as error:  # the answer was lost on its way
                self._fail(asked, error)
            else:
                self._clock(asked)
                self._take(wanted, self._checked(wanted, SoftTargets(*answer)))
        self._pump()

    def _clock(self, asked: _Asked) -> None:
        took_s = time.perf_counter() - asked.at_s
        self._took_s.append(took_s)
        self._choice.answered(asked.teacher, took_s, asked.behind)

    def _take(self, wanted: BlockView, answer: SoftTargets) -> None:
        self._bytes += answer.bytes
        self._answered += len(answer.valid)
        if wanted in self._kept:  # of a teacher that was late
            self._again += len(answer.valid)
            return
        self._lost_kl += answer.lost_kl * int(answer.valid.sum())
        # A copy, on the heap: what came lies in the object store, which is to hold no more than
        # what is on its way.
        values = answer.values.copy() if answer.steps is None else exact(answer)
        self._kept[wanted] = answer._replace(values=values, steps=None, valid=answer.valid.copy())
        self._failed.pop(wanted, None)
        self._given_up.pop(wanted, None)

    def _fail(self, asked: _Asked, error: Exception) -> None:
        """Asks again, a few times, and others first."""
        wanted = asked.wanted
        self._say_once("error", f"label of {wanted}: {error}; asking again")
        self._choice.failed(asked.teacher)
        if wanted in self._kept:
            return
        failed = self._failed.setdefault(wanted, [])
        failed.append(asked.teacher)
        if len(failed) < _TRIES:
            self._queue.appendleft(wanted)
        else:
            del self._failed[wanted]
            self._given_up[wanted] = f"teachers failed {len(failed)} times: {error}"

    def _checked(self, wanted: BlockView, answer: SoftTargets) -> SoftTargets:
        mine = self._fingerprints[wanted.corpus]
        if answer.fingerprint != mine:
            raise RuntimeError(
                f"label of {wanted} was made by {answer.fingerprint}, this run wants {mine}: by "
                "another teacher, or of a corpus that was indexed anew meanwhile"
            )
        length = self._blocks[wanted.corpus].at(wanted.block).length
        shapes = answer.form, answer.values.shape, answer.valid.shape
        if shapes != (self._form, (length, self._width), (length,)):
            raise RuntimeError(
                f"label of {wanted} has a wrong shape: {answer.form} {answer.values.shape}, "
                f"expected {self._form} {(length, self._width)}"
            )
        if not finite(answer):
            raise RuntimeError(f"label of {wanted} is not finite: stopped before it is trained on")
        return answer

    def _evict(self) -> None:
        """Drops what came, or was announced, longest ago: a window's labels are asked before the
        next's, and trained on before them. Going by use would drop those not yet touched."""
        held = sum(len(answer.valid) for answer in self._kept.values())
        while held > self._kept_samples and len(self._kept) > 1:
            _, answer = self._kept.popitem(last=False)
            held -= len(answer.valid)

    def _say_once(self, kind: str, message: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            say(f"{message} (said once)")
