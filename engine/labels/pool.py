"""Teachers as Ray actors, a pipeline in each.

Teachers restart without limit and their calls are retried, which is safe because a label is a pure
function. Replies are method returns, which survive their maker's death.
"""

import asyncio
import socket
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from engine.config import TeacherConfig, share_of
from engine.imports import uncollected
from engine.labels.statements import Statement
from engine.progress import hand_over
from engine.telemetry import GpuSampler

with uncollected():
    import torch

    from engine.labels.assignment import Assignment, labeller_of
    from engine.labels.targets import BlockView, SoftTargets

__all__ = ["TeacherActor", "start_teacher"]

_IN_WORK = 4  # blocks of an actor: being read, decoded, labelled, written
_LATELY_S = 5.0  # that it states means of its GPU over


class TeacherActor:
    """A Labeller in a process of its own: blocks are read, decoded, labelled and written by a
    thread each, so that one block's decoding overlaps another's forward.

    What has been labelled is kept, `targets.memory_gb` of it, for ranks and students that ask for
    it later; what is being labelled is not begun twice.
    """

    def __init__(self, roster: ActorHandle) -> None:
        # As an argument of this actor it would, if it is large, be forgotten before a restart.
        while not (sent := ray.get(roster.assignment.remote())):
            time.sleep(0.1)  # the roster has just been restarted
        assignment: Assignment = ray.get(sent[0])
        config = assignment.config
        self._news: list[str] = []
        hand_over(self._news.append)
        torch.set_num_threads(config.teacher.threads)
        self._labeller = labeller_of(assignment, torch.device(config.device))
        self._read, self._decode, self._forward, self._write = (
            ThreadPoolExecutor(1, name) for name in ("read", "decode", "forward", "write")
        )
        self._room = asyncio.Semaphore(_IN_WORK)
        self._coming: dict[BlockView, asyncio.Task[SoftTargets]] = {}
        self._kept: OrderedDict[BlockView, SoftTargets] = OrderedDict()
        self._kept_bytes, self._most_bytes = 0, int(config.targets.memory_gb * 2**30)
        self._again = 0  # images that were asked for again, and answered without a forward
        self._queue = 0  # requests that are not answered yet
        self._gpu = GpuSampler(0 if config.device == "cuda" else None)
        self._born_s = time.monotonic()

    async def label(self, wanted: BlockView) -> SoftTargets:
        self._queue += 1
        try:
            return await self._answer(BlockView(*wanted))
        finally:
            self._queue -= 1

    async def _answer(self, wanted: BlockView) -> SoftTargets:
        if kept := self._kept.get(wanted):
            self._again += len(kept.valid)
            return kept
        if wanted in self._coming:
            targets = await asyncio.shield(self._coming[wanted])
            self._again += len(targets.valid)
            return targets
        task = self._coming[wanted] = asyncio.ensure_future(self._made(wanted))
        task.add_done_callback(lambda _: self._coming.pop(wanted))
        return await asyncio.shield(task)  # one who asks may give up, another not

    async def statement(self) -> Statement:
        """The labeller's, with `again`: images answered without a forward; how it is now; and what
        this process has said since the last time, which nobody would read here."""
        news, self._news[:] = list(self._news), []
        now = {
            "host": socket.gethostname(),
            "alive_s": time.monotonic() - self._born_s,
            "queue": self._queue,
            **self._gpu.statement(_LATELY_S),
        }
        return Statement(self._labeller.statement() | {"again": self._again}, now, news)

    async def _made(self, wanted: BlockView) -> SoftTargets:
        run, labeller = asyncio.get_running_loop().run_in_executor, self._labeller
        async with self._room:
            if found := await run(self._read, labeller.stored, wanted):
                return found
            samples = await run(self._read, labeller.read, wanted)
            decoded = await run(self._decode, labeller.decode, wanted, samples)
            targets = await run(self._forward, labeller.forward, wanted, decoded)
            await run(self._write, labeller.write, wanted, decoded, targets)
        self._keep(wanted, targets)
        return targets

    def _keep(self, wanted: BlockView, targets: SoftTargets) -> None:
        self._kept[wanted] = targets
        self._kept_bytes += targets.bytes
        while self._kept_bytes > self._most_bytes:
            _, oldest = self._kept.popitem(last=False)
            self._kept_bytes -= oldest.bytes


def start_teacher(told: TeacherConfig, roster: ActorHandle, node: str) -> ActorHandle:
    """Starts a teacher, on a node if it has room; it loads while the caller goes on. What it is to
    do it learns from the roster."""
    actor: Any = ray.remote(TeacherActor).options(
        num_cpus=told.cpus,
        num_gpus=told.gpus,
        resources=share_of(told.resource),
        memory=1,  # a byte: Ray places an actor that wants nothing anywhere (seen in 2.60)
        max_restarts=-1,
        max_task_retries=-1,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=True),
    )
    return actor.remote(roster)
