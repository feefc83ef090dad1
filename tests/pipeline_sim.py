"""A discrete-event simulation of a run, to hold `engine.plan` against.

It has what the arithmetic leaves out: service times that vary, bounded queues, windows that a
worker enters only once all their labels are there, a fixed number of labels outstanding, and
requests that go to the teacher which owes this worker least, in turn where several do. Time is in
seconds.
"""

import heapq
import itertools
import math
import random
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

Resume = Callable[[Any], None]
Process = Generator[Callable[[Resume], None], Any, None]  # yields what it waits for


class Clock:
    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Resume, Any]] = []
        self._turns = itertools.count()

    def call(self, resume: Resume, value: Any = None, delay_s: float = 0.0) -> None:
        heapq.heappush(self._events, (self.now + delay_s, next(self._turns), resume, value))

    def after(self, delay_s: float) -> Callable[[Resume], None]:
        return lambda resume: self.call(resume, None, delay_s)

    def start(self, process: Process) -> None:
        def step(value: Any) -> None:
            try:
                wait = process.send(value)
            except StopIteration:
                return
            wait(step)

        self.call(step)

    def run(self, done: Callable[[], bool]) -> None:
        while not done():
            assert self._events, "every process waits for another"
            self.now, _, resume, value = heapq.heappop(self._events)
            resume(value)


class Queue:
    """First in, first out; a put waits while it is full."""

    def __init__(self, clock: Clock, most: float = math.inf) -> None:
        self._clock, self._most = clock, most
        self._items: deque[Any] = deque()
        self._getters: deque[Resume] = deque()
        self._putters: deque[tuple[Any, Resume]] = deque()

    def get(self, resume: Resume) -> None:
        self._getters.append(resume)
        self._match()

    def put(self, item: Any) -> Callable[[Resume], None]:
        def wait(resume: Resume) -> None:
            self._putters.append((item, resume))
            self._match()

        return wait

    def offer(self, item: Any) -> None:
        """A put that nobody waits for."""
        self.put(item)(lambda _: None)

    def _match(self) -> None:
        while True:
            if self._putters and len(self._items) < self._most:
                item, resume = self._putters.popleft()
                self._items.append(item)
                self._clock.call(resume)
            elif self._getters and self._items:
                self._clock.call(self._getters.popleft(), self._items.popleft())
            else:
                return


@dataclass(frozen=True)
class Pipeline:
    """A run to be simulated. Rates are images/s of one device; without teachers, labels are there
    already. `students` have `workers` each, which are `gang`s if every step waits for all."""

    student: float
    decode: float = math.inf
    teachers: tuple[float, ...] = ()
    teacher_decode: float = math.inf
    link: float = math.inf  # labels/s that a teacher sends
    students: int = 1
    workers: int = 1
    gang: bool = False
    by_rate: bool = False  # requests go where they are answered soonest
    cv: float = 0.2  # of every service time but a step's
    step_cv: float = 0.2
    outstanding: int = 4  # of a worker
    window: int = 4  # blocks, of a worker
    block: int = 512
    batch: int = 128  # of a worker
    ahead: int = 2  # batches decoded
    blocks: int = 400  # that a worker trains, or a little more
    seed: int = 1


def throughput(told: Pipeline) -> float:
    """Images/s over all workers, between the last one's entries into two windows."""
    return _Run(told).throughput()


class _Run:
    def __init__(self, told: Pipeline) -> None:
        self.told, self.clock, self.random = told, Clock(), random.Random(told.seed)
        self.entered = [0.0] * max(8, -(-told.blocks // told.window))  # when the last worker did
        self.finished = 0
        self.requests = [Queue(self.clock) for _ in told.teachers]
        self.wanted: dict[tuple[int, int], list[Queue]] = {}  # by worker and block: who waits
        self.made: set[tuple[int, int]] = set()
        self.maker: dict[tuple[int, int], int] = {}
        self.sends = [Queue(self.clock) for _ in told.teachers]

    def throughput(self) -> float:
        told, clock = self.told, self.clock
        for turn, rate in enumerate(told.teachers):
            decoded = Queue(clock, 1)
            clock.start(self.teacher_decodes(self.requests[turn], decoded))
            clock.start(self.teacher_labels(turn, rate, decoded))
            clock.start(self.sender(self.sends[turn]))
        for _ in range(told.students):
            barrier = _Barrier(clock, told.workers)
            for rank in range(told.workers):
                ready, entered = Queue(clock, told.ahead), Queue(clock)
                arrivals, credits = Queue(clock), Queue(clock)
                for _ in range(told.outstanding):
                    credits.offer(None)
                clock.start(self.loads(ready))
                if told.teachers:
                    clock.start(self.asks(rank, entered, credits, arrivals))
                clock.start(self.trains(ready, entered, credits, arrivals, barrier))
        clock.run(lambda: self.finished == told.students * told.workers)
        first, last = len(self.entered) // 4, len(self.entered) - 1
        images = told.students * told.workers * told.window * told.block * (last - first)
        return images / (self.entered[last] - self.entered[first])

    def lasts(self, images: float, rate: float, cv: float) -> Callable[[Resume], None]:
        """A lognormal time of mean images / rate."""
        if rate == math.inf:
            return self.clock.after(0)
        sigma2 = math.log(1 + cv**2)
        spread = self.random.lognormvariate(-sigma2 / 2, math.sqrt(sigma2)) if cv else 1.0
        return self.clock.after(images / rate * spread)

    def teacher_decodes(self, requests: Queue, decoded: Queue) -> Process:
        while True:
            key = yield requests.get
            yield self.lasts(self.told.block, self.told.teacher_decode, self.told.cv)
            yield decoded.put(key)

    def teacher_labels(self, turn: int, rate: float, decoded: Queue) -> Process:
        while True:
            key = yield decoded.get
            yield self.lasts(self.told.block, rate, self.told.cv)
            self.made.add(key)
            for arrivals in self.wanted.pop(key):
                self.sends[turn].offer((key, arrivals))

    def sender(self, sends: Queue) -> Process:
        while True:
            (_, block), arrivals = yield sends.get
            yield self.lasts(self.told.block, self.told.link, self.told.cv)
            arrivals.offer(block)

    def asks(self, rank: int, entered: Queue, credits: Queue, arrivals: Queue) -> Process:
        """Requests of the coming window; `arrivals` gets what has come."""
        owed = [0] * len(self.told.teachers)
        turns = itertools.count(rank * len(owed) // self.told.workers)
        while True:
            window = yield entered.get
            for block in range(window * self.told.window, (window + 1) * self.told.window):
                credit = yield credits.get
                if credit is not None:
                    owed[credit] -= 1
                key = (rank, block)
                if key not in self.maker:
                    self.maker[key] = self.least(owed, next(turns))
                    self.requests[self.maker[key]].offer(key)
                    self.wanted[key] = []
                maker = self.maker[key]
                owed[maker] += 1
                back = _Returning(arrivals, credits, maker)
                if key in self.made:
                    self.sends[maker].offer((key, back))
                else:
                    self.wanted[key].append(back)

    def least(self, owed: Sequence[int], turn: int) -> int:
        """The teacher that owes least, in blocks or, `by_rate`, in time; of several in turn."""
        rates = self.told.teachers if self.told.by_rate else [1.0] * len(owed)
        order = [(turn + n) % len(owed) for n in range(len(owed))]
        return min(order, key=lambda teacher: (owed[teacher] + 1) / rates[teacher])

    def loads(self, ready: Queue) -> Process:
        while True:
            yield self.lasts(self.told.batch, self.told.decode, self.told.cv)
            yield ready.put(None)

    def trains(
        self, ready: Queue, entered: Queue, credits: Queue, arrivals: Queue, barrier: "_Barrier"
    ) -> Process:
        told = self.told
        if told.teachers:
            entered.offer(0)
        here: dict[int, int] = defaultdict(int)  # labels by window
        for window in range(len(self.entered)):
            if told.teachers:
                entered.offer(window + 1)
                while here[window] < told.window:
                    block = yield arrivals.get
                    here[block // told.window] += 1
            self.entered[window] = self.clock.now
            for _ in range(told.window * told.block // told.batch):
                yield ready.get
                yield self.lasts(told.batch, told.student, told.step_cv)
                if told.gang:
                    yield barrier.wait
        self.finished += 1


class _Returning:
    """Where a label goes: it gives its credit back as it comes."""

    def __init__(self, arrivals: Queue, credits: Queue, maker: int) -> None:
        self._arrivals, self._credits, self._maker = arrivals, credits, maker

    def offer(self, block: int) -> None:
        self._credits.offer(self._maker)
        self._arrivals.offer(block)


class _Barrier:
    def __init__(self, clock: Clock, parties: int) -> None:
        self._clock, self._parties = clock, parties
        self._waiting: list[Resume] = []

    def wait(self, resume: Resume) -> None:
        self._waiting.append(resume)
        if len(self._waiting) == self._parties:
            for each in self._waiting:
                self._clock.call(each)
            self._waiting = []
