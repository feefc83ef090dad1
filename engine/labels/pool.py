"""Teachers as Ray actors, and the target source that streams from a pool of them.

The student pulls: a fixed number of requests is outstanding, each sent to the teacher that owes it
least. Teachers restart without limit and their calls are retried, which is safe because a label is
a pure function. Replies are method returns, which survive their maker's death.
"""

import time
from collections import Counter, OrderedDict, deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray
import torch
from ray.actor import ActorHandle
from ray.exceptions import RayTaskError
from torch import Tensor

from engine.clip.class_vectors import ClassVectors
from engine.clip.towers import load_clip
from engine.config import RunConfig
from engine.data.corpus import open_corpora
from engine.data.isolate import decoder_of
from engine.data.loader import Batch
from engine.data.views import ViewPolicy
from engine.labels.targets import BlockView, SoftTargets, unpack
from engine.labels.teacher import Labeller, Teacher, fingerprint
from engine.progress import say

__all__ = ["StreamSource", "TeacherActor", "start_pool"]

_TRIES = 3  # requests of a label that a teacher answers with an error


class TeacherActor:
    """A Labeller in a process of its own; `config` must be resolved (no "auto")."""

    def __init__(self, config: RunConfig, classes: ClassVectors) -> None:
        torch.set_num_threads(config.teacher.threads)
        device = torch.device(config.device)
        told = config.teacher
        clip = load_clip(told.model, told.weights, "teacher.", told.prompts)
        policy = ViewPolicy(config.seed, clip.image.pixels, config.train.crop_scale)
        precision, corpora = config.teacher.precision, open_corpora(config.corpus)
        self._labeller = Labeller(
            Teacher(clip, classes, precision, device, config.teacher.batch),
            corpora,
            decoder_of(policy, config.device, config.teacher.threads, config.corpus),
            fingerprint(classes, policy, precision, corpora),
        )

    def label(self, wanted: BlockView) -> SoftTargets:
        return self._labeller.label(wanted)


def start_pool(config: RunConfig, classes: ClassVectors) -> list[ActorHandle]:
    """Starts the teachers; they load while the caller goes on."""
    actor: Any = ray.remote(TeacherActor).options(
        num_cpus=config.teacher.cpus,
        num_gpus=config.teacher.gpus,
        max_restarts=-1,
        max_task_retries=-1,
    )
    return [actor.remote(config, classes) for _ in range(config.teacher.actors)]


class StreamSource:
    """Target source over a pool of teachers.

    `kept_samples` bounds the labels held, in samples. `waited_s` is the time spent waiting for
    labels. Raises RuntimeError for a label that is needed and does not come within `timeout_s`, or
    that teachers repeatedly fail to make; that is not finite; or that was made by another teacher,
    under another view policy, or of another corpus, than this run's.
    """

    def __init__(
        self,
        teachers: Sequence[ActorHandle],
        teacher_fingerprint: str,
        w_ND: Tensor,
        scale: float,
        outstanding: int,
        timeout_s: float,
        kept_samples: int,
        rank: int,
    ) -> None:
        assert teachers
        self.waited_s = 0.0
        # Each rank starts with another teacher, so that equal loads spread evenly.
        turn = rank % len(teachers)
        self._teachers = [*teachers[turn:], *teachers[:turn]]
        self._owed = [0] * len(teachers)
        self._fingerprint, self._w_ND, self._scale = teacher_fingerprint, w_ND, scale
        self._outstanding, self._timeout_s = outstanding, timeout_s
        self._queue: deque[BlockView] = deque()
        self._asked: dict[ray.ObjectRef, tuple[BlockView, int]] = {}
        self._kept: OrderedDict[BlockView, SoftTargets] = OrderedDict()
        self._kept_samples = kept_samples
        self._told = False  # of an error
        self._errors: Counter[BlockView] = Counter()
        self._given_up: dict[BlockView, str] = {}  # and why

    def request(self, wanted: Sequence[BlockView]) -> None:
        known = {*self._queue, *self._kept, *(block for block, _ in self._asked.values())}
        for block in wanted:
            self._given_up.pop(block, None)  # it has a new chance
            if block in self._kept:
                self._kept.move_to_end(block)
        self._queue.extend(block for block in wanted if block not in known)
        self._pump()

    def logits(self, batch: Batch) -> tuple[Tensor, np.ndarray]:
        work = batch.work
        # What the student itself could not read or decode needs no label.
        blocks = np.where(batch.valid_B, work.share.blocks, -1)
        needed = [BlockView(work.corpus, int(b), work.view) for b in np.unique(blocks) if b >= 0]
        answers = self._await(needed)
        valid = np.zeros(len(blocks), bool)
        if not answers:  # nothing but padding, and what could not be read
            return self._w_ND.new_zeros(len(blocks), len(self._w_ND)), valid
        form, width = next((t.form, t.values.shape[1]) for t in answers.values())
        values = np.zeros((len(blocks), width), np.float16)
        for block, answer in answers.items():
            rows = blocks == block
            values[rows] = answer.values[work.share.offsets[rows]]
            valid[rows] = answer.valid[work.share.offsets[rows]]
        on_device = torch.from_numpy(values).to(self._w_ND.device)
        return unpack(form, on_device, self._w_ND, self._scale), valid & batch.valid_B

    def close(self) -> None:
        for ref in self._asked:
            ray.cancel(ref)

    def _pump(self) -> None:
        while self._queue and len(self._asked) < self._outstanding:
            teacher = self._owed.index(min(self._owed))
            wanted = self._queue.popleft()
            self._asked[self._teachers[teacher].label.remote(wanted)] = (wanted, teacher)
            self._owed[teacher] += 1

    def _await(self, needed: Sequence[BlockView]) -> dict[int, SoftTargets]:
        started = time.perf_counter()
        self._collect(0)
        missing = [w for w in needed if w not in self._kept and w not in self._given_up]
        asked = {block for block, _ in self._asked.values()}
        for wanted in reversed([m for m in missing if m not in asked]):
            if wanted in self._queue:
                self._queue.remove(wanted)
            self._queue.appendleft(wanted)
        self._pump()
        while not all(wanted in self._kept for wanted in needed):
            for wanted in needed:
                if wanted in self._given_up:
                    raise RuntimeError(f"no label of {wanted}: {self._given_up[wanted]}")
            left_s = self._timeout_s - (time.perf_counter() - started)
            if left_s <= 0 or not self._collect(left_s):
                late = next(wanted for wanted in needed if wanted not in self._kept)
                raise RuntimeError(
                    f"targets.timeout_s: no label of {late} after {self._timeout_s:.0f} s; "
                    f"{len(self._asked)} requests are with {len(self._teachers)} teachers"
                )
        self.waited_s += time.perf_counter() - started
        answers = {wanted.block: self._kept[wanted] for wanted in needed}
        self._evict()
        return answers

    def _collect(self, timeout_s: float) -> bool:
        """Takes in the answers that have come; waits for one at most `timeout_s`."""
        if not self._asked:
            return False
        refs = list(self._asked)
        ready, _ = ray.wait(refs, num_returns=1, timeout=timeout_s, fetch_local=True)
        if ready:
            ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0, fetch_local=True)
        for ref in ready:
            wanted, teacher = self._asked.pop(ref)
            self._owed[teacher] -= 1
            try:
                answer = ray.get(ref)
            except RayTaskError as error:
                self._fail(wanted, error.cause)
            else:
                self._kept[wanted] = self._checked(wanted, answer)
                self._errors.pop(wanted, None)
        self._pump()
        return bool(ready)

    def _fail(self, wanted: BlockView, error: Exception) -> None:
        """Asks again, a few times."""
        if not self._told:
            self._told = True
            say(f"label of {wanted}: {error}; asking again, as after all such errors from now on")
        self._errors[wanted] += 1
        if self._errors[wanted] < _TRIES:
            self._queue.appendleft(wanted)
        else:
            self._given_up[wanted] = f"teachers failed {self._errors.pop(wanted)} times: {error}"

    def _checked(self, wanted: BlockView, answer: SoftTargets) -> SoftTargets:
        if answer.fingerprint != self._fingerprint:
            raise RuntimeError(
                f"label of {wanted} was made by {answer.fingerprint}, "
                f"this run wants {self._fingerprint}: by another teacher, or of a corpus that was "
                "indexed anew meanwhile"
            )
        if not np.isfinite(answer.values[answer.valid]).all():
            raise RuntimeError(f"label of {wanted} is not finite: stopped before it is trained on")
        return answer

    def _evict(self) -> None:
        """Drops what was asked for longest ago: a window's labels are asked before the next's, and
        trained on before them. Going by use would drop those not yet touched."""
        held = sum(len(answer.valid) for answer in self._kept.values())
        while held > self._kept_samples and len(self._kept) > 1:
            _, answer = self._kept.popitem(last=False)
            held -= len(answer.valid)
