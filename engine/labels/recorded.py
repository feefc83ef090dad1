"""The target source that has recorded labels, in front of one that makes them."""

from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from engine.data.loader import Batch
from engine.data.order import Blocks
from engine.data.sample_list import SampleList
from engine.labels.store import Recorded
from engine.labels.targets import (
    BlockView,
    Form,
    SoftTargets,
    Targets,
    TargetSource,
    exact,
    gathered,
    on_device,
)
from engine.telemetry import Stopwatch

__all__ = ["RecordedSource"]

_READERS = 4


class RecordedSource:
    """Reads what is recorded ahead of its need, and asks `inner` for the rest.

    `kept_samples` bounds the blocks held, in samples. A block is looked for when it is requested,
    so what others record meanwhile is found. It records nothing itself. Of the shards no more is
    needed than the `listed` samples, where there is a list.
    """

    def __init__(
        self,
        recorded: Mapping[str, Recorded],
        blocks: Mapping[str, Blocks],
        inner: TargetSource | None,
        kept_samples: int,
        form: Form,
        width: int,
        device: torch.device,
        listed: SampleList | None = None,
    ) -> None:
        self._recorded, self._blocks, self._inner = recorded, blocks, inner
        self._listed = listed
        self._kept_samples, self._device = kept_samples, device
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="recorded")
        self._reads: OrderedDict[BlockView, Future[SoftTargets | None]] = OrderedDict()
        self._held = 0  # samples of the blocks in reads
        self._unsettled: deque[BlockView] = deque()  # may have to be asked of inner
        self._form: Form = form
        self._width = width
        self._waited = Stopwatch()
        self._from_store = self._asked = 0

    @property
    def waited_s(self) -> float:
        return self._waited.total_s + (self._inner.waited_s if self._inner else 0.0)

    def request(self, wanted: Sequence[BlockView]) -> None:
        for block in wanted:
            future = self._reads.get(block)
            if future and future.done() and future.result() is None:
                self._drop(block)  # it may be there by now
            self._look_for(block)
            self._reads.move_to_end(block)
        self._evict()
        self._pass_on()

    def targets(self, batch: Batch) -> Targets:
        """Raises RuntimeError for a block that is not recorded, where there is nobody to ask."""
        work, share = batch.work, batch.work.share
        blocks = np.unique(share.blocks[share.valid]).tolist()
        known = self._await([BlockView(work.corpus, block, work.view) for block in blocks])
        stored_B = np.isin(share.blocks, [wanted.block for wanted in known])
        # With the samples that cannot be used: whoever labels a block is to see all of it.
        rest_B = share.valid & ~stored_B
        asked = int((batch.valid_B & rest_B).sum())
        self._from_store += int(batch.valid_B.sum()) - asked
        self._asked += asked
        if self._inner is None and asked:
            block = int(share.blocks[batch.valid_B & rest_B][0])
            raise RuntimeError(
                f"no label of block {block} of {work.corpus}, view {work.view}, in "
                f"{self._recorded[work.corpus].where}: record it by --targets.source auto"
            )
        if self._inner and rest_B.any() and not known:
            return self._inner.targets(batch)
        answers = {wanted.block: labels for wanted, labels in known.items()}
        found = gathered(answers, batch, self._form, self._width, self._device)
        if self._inner is None or not rest_B.any():
            return found
        return _merged(found, self._inner.targets(batch.rows(rest_B)), rest_B)

    def statement(self) -> dict[str, float]:
        inner = self._inner.statement() if self._inner else {}
        stores = self._recorded.values()
        return inner | {
            "from_store": self._from_store,
            "asked": self._asked,
            "damaged": sum(recorded.damaged for recorded in stores),
            "unrecorded": sum(recorded.unrecorded for recorded in stores),
        }

    def close(self) -> None:
        self._readers.shutdown(wait=False, cancel_futures=True)
        if self._inner:
            self._inner.close()

    def _length(self, wanted: BlockView) -> int:
        return self._blocks[wanted.corpus].at(wanted.block).length

    def _look_for(self, wanted: BlockView) -> None:
        if wanted not in self._reads:
            self._reads[wanted] = self._readers.submit(self._read, wanted)
            self._held += self._length(wanted)
            self._unsettled.append(wanted)

    def _read(self, wanted: BlockView) -> SoftTargets | None:
        listed = self._listed if wanted.corpus == "shards" else None
        needed = listed.offsets(wanted.block) if listed else None
        found = self._recorded[wanted.corpus].get(wanted, self._length(wanted), needed)
        return found and found._replace(values=exact(found), steps=None)

    def _await(self, needed: Sequence[BlockView]) -> dict[BlockView, SoftTargets]:
        """Those of some blocks that are recorded; inner, if there is one, is asked for others."""
        for wanted in needed:
            self._look_for(wanted)
        with self._waited.lap():
            found = {wanted: self._reads[wanted].result() for wanted in needed}
        self._pass_on()
        self._evict()
        return {wanted: known for wanted, known in found.items() if known is not None}

    def _pass_on(self) -> None:
        """Requests of inner what was found absent, in the order of the requests: up to the first
        block whose read has not ended."""
        absent = []
        while self._unsettled:
            future = self._reads.get(self._unsettled[0])
            if future and not future.done():
                break
            wanted = self._unsettled.popleft()
            if future and future.result() is None:
                absent.append(wanted)
        if absent and self._inner:
            self._inner.request(absent)

    def _evict(self) -> None:
        """Drops what was requested longest ago, which has been trained on first."""
        while self._held > self._kept_samples and len(self._reads) > 1:
            self._drop(next(iter(self._reads)))

    def _drop(self, wanted: BlockView) -> None:
        self._reads.pop(wanted).cancel()
        self._held -= self._length(wanted)


def _merged(found: Targets, asked: Targets, rest_B: np.ndarray) -> Targets:
    """Targets of a batch from the recorded ones, and those of the rest of its rows."""
    assert asked.form == found.form
    told = asked.values_BX
    values_BX = found.values_BX.to(torch.promote_types(found.values_BX.dtype, told.dtype))
    values_BX[on_device(np.flatnonzero(rest_B), told.device)] = told.to(values_BX.dtype)
    valid_B = found.valid_B.copy()
    valid_B[rest_B] = asked.valid_B
    return Targets(found.form, values_BX, valid_B)
