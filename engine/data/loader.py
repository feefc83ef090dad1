"""From shard to pixels: a bounded, prefetching iterator of decoded batches.

One thread walks ahead of its consumer: it has blocks read (by reader threads, before they are
needed) and their samples decoded, and holds at most `ahead` finished batches. Blocks are kept while
a window may still need them, and as long as they fit the bound in bytes.
"""

import dataclasses
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from engine.data.corpus import Sample
from engine.data.isolate import AnyDecoder
from engine.data.order import Share
from engine.progress import say
from engine.telemetry import Stopwatch

__all__ = ["AHEAD", "FAILURES", "Batch", "Blocked", "Loader", "Work"]

AHEAD = 2  # batches held ready, unless told otherwise
# Reasons that the index did not know of; `teacher`: it has no label.
FAILURES = frozenset({"unreadable", "changed", "undecodable", "crashed", "timed_out", "teacher"})
_READERS = 4
_CPU = torch.device("cpu")
_LIVE = 2  # announcements whose windows a step may be in: the window that ends in it, and the next


class Blocked(Protocol):
    """Samples that come in blocks: a corpus, or something that reads like one."""

    def read(self, block: int) -> Sequence[Sample]: ...

    def block_bytes(self, block: int) -> int:
        """Of the encoded images of a block, roughly."""


class Work(NamedTuple):
    """One batch to be made: a view of the samples of a share. `step` counts over the run."""

    corpus: str  # "shards" or "evaluation"
    step: int
    view: int
    share: Share
    soon: tuple[tuple[int, int], ...] = ()  # (view, block) needed next, nearest first


@dataclass(frozen=True)
class Batch:
    """Decoded samples. Padding and samples that could not be decoded are black and not valid."""

    work: Work
    images_BCHW: Tensor  # uint8
    valid_B: np.ndarray  # bool
    reasons: tuple[str | None, ...]  # why a sample is not valid; None for padding too
    labels_B: np.ndarray  # int64; -1 where the sample has none
    ready: torch.cuda.Event | None = None  # after which images on a GPU are there

    def on(self, device: torch.device) -> "Batch":
        """With its images on a device; a GPU's current stream copies them while the CPU goes on."""
        if device.type != "cuda":
            return self
        images = self.images_BCHW
        if not images.is_cuda:
            images = images.pin_memory().to(device, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()
        return dataclasses.replace(self, images_BCHW=images, ready=ready)

    def here(self) -> Tensor:
        """Its images, for a GPU's current stream to use, which waits until they are there."""
        if self.ready:
            torch.cuda.current_stream().wait_event(self.ready)
            self.images_BCHW.record_stream(torch.cuda.current_stream())
        return self.images_BCHW

    def rows(self, which_B: np.ndarray) -> "Batch":
        """Those of its samples for which `which_B`, bool, is True."""
        places = np.flatnonzero(which_B)
        share = Share(*(column[places] for column in self.work.share))
        return Batch(
            self.work._replace(share=share),
            self.here()[torch.from_numpy(places).to(self.images_BCHW.device)],
            self.valid_B[places],
            tuple(self.reasons[place] for place in places),
            self.labels_B[places],
        )


class Loader:
    """Iterates over the batches of `works`, in their order, on a thread of its own.

    `most_bytes` bounds the encoded images held in memory, but for those of the batch in the making:
    a block that finds no room is read when it is needed, and one that is dropped to make room is
    read again. Images come on `device`. `waited_s` is the time its consumer has waited for it.
    """

    def __init__(
        self,
        corpus: Blocked,
        decoder: AnyDecoder,
        works: Iterable[Work],
        most_bytes: int,
        ahead: int = AHEAD,
        device: torch.device = _CPU,
    ) -> None:
        self._device = device
        self._read, self._decode, self._wait = Stopwatch(), Stopwatch(), Stopwatch()
        self._decoder, self._works = decoder, works
        self._stop = threading.Event()
        self._shelf = _Shelf(corpus, most_bytes, self._read, self._stop)
        self._ready: queue.Queue[Batch | BaseException | None] = queue.Queue(ahead)
        self._thread = threading.Thread(target=self._run, name="loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        while True:
            with self._wait.lap():
                item = self._ready.get()
            if isinstance(item, Batch):
                yield item
                continue
            self._ready.put(item)  # for whoever asks again
            if item is None:
                return
            raise item

    @property
    def waited_s(self) -> float:
        return self._wait.total_s

    def stages(self) -> dict[str, Any]:
        """Where the time goes: reads of blocks, decoding of batches, and its consumer's wait."""
        stages = {"read": self._read, "decode": self._decode, "wait": self._wait}
        told = {name: stage.statement() for name, stage in stages.items()}
        return told | {"held_bytes": self._shelf.held_bytes, "read_again": self._shelf.read_again}

    def close(self) -> None:
        """Ends the threads; batches not yet taken are dropped. It waits for no read: one that
        stalls ends by itself, or with its corpus."""
        self._stop.set()
        self._thread.join()
        self._shelf.close()

    def _run(self) -> None:
        # A stream of its own: on the usual one, copies would wait for what the GPU has to do.
        on_gpu = self._device.type == "cuda"
        try:
            with torch.cuda.stream(torch.cuda.Stream(self._device) if on_gpu else None):
                for work in self._works:
                    if not self._offer(self._batch(work).on(self._device)):
                        return
            self._offer(None)
        except BaseException as error:  # handed to the consumer, whose thread must see it
            self._offer(error)

    def _offer(self, item: "Batch | BaseException | None") -> bool:
        while not self._stop.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def _batch(self, work: Work) -> Batch:
        blocks = self._shelf.take(
            np.unique(work.share.blocks[work.share.valid]).tolist(),
            [block for _, block in work.soon],
        )
        samples = [
            blocks[block][offset] if valid else None
            for block, offset, valid in zip(
                *(column.tolist() for column in work.share), strict=True
            )
        ]
        with self._decode.lap(sum(len(s.data) for s in samples if s and s.data)):
            images_BCHW, reasons = self._decoder.decode(samples, work.view)
        valid = [s is not None and r is None for s, r in zip(samples, reasons, strict=True)]
        labels = [-1 if s is None or s.label is None else s.label for s in samples]
        return Batch(
            work,
            images_BCHW,
            np.array(valid, bool),
            tuple(reasons),
            np.array(labels, np.int64),
        )


@dataclass
class _Held:
    """A block that is there, or on its way."""

    samples: Future[Sequence[Sample]]
    bytes: int
    announced: int  # by which of the announcements, the last time


class _Shelf:
    """Blocks read ahead of their use, within a bound. take() ends early once `stop` is set."""

    def __init__(
        self, corpus: Blocked, most_bytes: int, reads: Stopwatch, stop: threading.Event
    ) -> None:
        self._corpus, self._most_bytes, self._reads = corpus, most_bytes, reads
        self._stop = stop
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="reader")
        self._held: dict[int, _Held] = {}
        # Each with its announcement, which ends the window that it is known for.
        self._coming: dict[int, int] = {}  # announced, and not yet asked for, nearest first
        self._dropped: dict[int, int] = {}  # while they were still of use
        self._announcement = 0
        self.held_bytes = self.read_again = 0

    def take(self, needed: Sequence[int], soon: Sequence[int]) -> dict[int, Sequence[Sample]]:
        """The blocks of a step; has those read that are needed soon."""
        if soon:
            self._announcement += 1
            self._forget(self._announcement - _LIVE - 1)
        for block in needed:
            self._ask(block, self._announcement - 1)  # should it be missing, its window has begun
        for block in soon:
            if block in self._held:
                self._held[block].announced = self._announcement
            else:
                self._coming[block] = self._announcement
        self._make_room(set(needed))
        while self._coming:
            block, announced = next(iter(self._coming.items()))
            if not self._fits(block):
                break
            self._ask(block, announced)
        blocks = {block: self._result(block) for block in needed}
        if soon:
            self._forget(self._announcement - _LIVE)
        return blocks

    def close(self) -> None:
        self._readers.shutdown(wait=False, cancel_futures=True)
        self._held.clear()

    def _fits(self, block: int) -> bool:
        return self.held_bytes + self._corpus.block_bytes(block) <= self._most_bytes

    def _ask(self, block: int, announced: int) -> None:
        if block in self._held:
            return
        self._coming.pop(block, None)
        if self._dropped.pop(block, None) is not None:
            if not self.read_again:
                say(
                    "corpus.memory_gb: a shuffling window does not fit; blocks are read again. "
                    "Give it more memory, or a smaller corpus.window_blocks"
                )
            self.read_again += 1
        size = self._corpus.block_bytes(block)
        read = self._readers.submit(self._load, block)
        self._held[block] = _Held(read, size, announced)
        self.held_bytes += size

    def _load(self, block: int) -> Sequence[Sample]:
        with self._reads.lap(self._corpus.block_bytes(block)):
            return self._corpus.read(block)

    def _result(self, block: int) -> Sequence[Sample]:
        read = self._held[block].samples
        while not wait([read], timeout=0.1).done:
            if self._stop.is_set():  # a stalled read may take minutes
                raise CancelledError
        return read.result()

    def _forget(self, announcement: int) -> None:
        """Drops the blocks that only windows which have ended did need."""
        for block in [b for b, held in self._held.items() if held.announced <= announcement]:
            self._drop(block)
        for known in (self._coming, self._dropped):
            for block in [b for b, announced in known.items() if announced <= announcement]:
                del known[block]

    def _make_room(self, needed: set[int]) -> None:
        """Drops blocks that are still of use, the nearest last, where the bound is exceeded."""
        others = [block for block in self._held if block not in needed]
        for block in sorted(others, key=lambda block: -self._held[block].announced):
            if self.held_bytes <= self._most_bytes:
                return
            announced = self._held[block].announced
            if self._drop(block):
                self._dropped[block] = announced

    def _drop(self, block: int) -> bool:
        """Whether it had been read, or was being read."""
        held = self._held.pop(block)
        self.held_bytes -= held.bytes
        return not held.samples.cancel()
