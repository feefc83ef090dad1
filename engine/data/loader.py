"""From shard to pixels: a bounded, prefetching iterator of decoded batches.

One thread walks ahead of its consumer: it has blocks read (by two reader threads, before they are
needed) and their samples decoded, and holds at most `ahead` finished batches. Blocks are kept while
a window may still need them.
"""

import dataclasses
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from engine.data.corpus import Sample
from engine.data.decode import Decoder
from engine.data.order import Share

__all__ = ["AHEAD", "Batch", "Blocks", "Loader", "Work"]

AHEAD = 2  # batches held ready, unless told otherwise


class Blocks(Protocol):
    """Samples that come in blocks: a corpus, or something that reads like one."""

    @property
    def counts(self) -> np.ndarray:
        """Samples of every block, int64 [n]."""

    def read(self, block: int) -> Sequence[Sample]: ...


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

    def to(self, device: torch.device) -> "Batch":
        """With its images on a device."""
        return dataclasses.replace(self, images_BCHW=self.images_BCHW.to(device))


class Loader:
    """Iterates over the batches of `works`, in their order, on a thread of its own.

    `kept_samples` bounds the blocks held in memory, in samples. `waited_s` is the time its consumer
    has spent waiting for it.
    """

    def __init__(
        self, corpus: Blocks, decoder: Decoder, works: Iterable[Work], kept_samples: int, ahead: int
    ) -> None:
        self.waited_s = 0.0
        self._corpus, self._decoder, self._works = corpus, decoder, works
        self._kept: OrderedDict[int, Future[Sequence[Sample]]] = OrderedDict()
        self._kept_samples = kept_samples
        self._readers = ThreadPoolExecutor(2, thread_name_prefix="reader")
        self._ready: queue.Queue[Batch | BaseException | None] = queue.Queue(ahead)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        while True:
            started = time.perf_counter()
            item = self._ready.get()
            self.waited_s += time.perf_counter() - started
            if isinstance(item, Batch):
                yield item
                continue
            self._ready.put(item)  # for whoever asks again
            if item is None:
                return
            raise item

    def close(self) -> None:
        """Ends the thread; batches not yet taken are dropped."""
        self._stop.set()
        self._thread.join()
        self._readers.shutdown(cancel_futures=True)

    def _run(self) -> None:
        try:
            for work in self._works:
                if not self._offer(self._batch(work)):
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
        needed = np.unique(work.share.blocks[work.share.valid]).tolist()
        reads = {block: self._asked(block) for block in needed}
        for _, block in work.soon:
            self._asked(block)
            self._kept.move_to_end(block)  # by its last announcement: see _asked()
        blocks = {block: read.result() for block, read in reads.items()}
        samples = [
            blocks[block][offset] if valid else None
            for block, offset, valid in zip(
                *(column.tolist() for column in work.share), strict=True
            )
        ]
        images, reasons = self._decoder.decode(samples, work.view)
        valid = [s is not None and r is None for s, r in zip(samples, reasons, strict=True)]
        labels = [-1 if s is None or s.label is None else s.label for s in samples]
        return Batch(
            work,
            torch.from_numpy(images).permute(0, 3, 1, 2),
            np.array(valid, bool),
            tuple(reasons),
            np.array(labels, np.int64),
        )

    def _asked(self, block: int) -> Future[Sequence[Sample]]:
        """The read of a block, begun if need be; drops those that were announced longest ago, whose
        windows come first. Going by use would drop blocks not yet touched."""
        if block in self._kept:
            return self._kept[block]
        read = self._kept[block] = self._readers.submit(self._corpus.read, block)
        held = int(self._corpus.counts[list(self._kept)].sum())
        while held > self._kept_samples and len(self._kept) > 1:
            oldest, _ = self._kept.popitem(last=False)
            held -= int(self._corpus.counts[oldest])
        return read
