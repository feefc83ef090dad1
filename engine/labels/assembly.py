"""Blocks of soft targets from batches that a teacher labels in the student's process.

A step must not wait for the copy from the GPU, nor for the disk: values go into pinned memory, and
one thread packs and records them.
"""

import queue
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.data.loader import Work
from engine.data.order import Blocks
from engine.labels.store import Recorded
from engine.labels.targets import BlockView, Form, Wire, pack

__all__ = ["Assembly"]

_QUEUED = 4  # batches; a step waits where the writer is further behind


class _Labelled(NamedTuple):
    """A batch, on its way to the writer."""

    work: Work
    valid_B: np.ndarray
    form: Form
    values_BX: Tensor  # on the CPU, once `copied`
    copied: "torch.cuda.Event | None"


@dataclass
class _Block:
    """A block of which some samples have been seen."""

    form: Form
    values: Tensor  # [n, X]
    valid: np.ndarray  # bool [n]
    seen: np.ndarray  # bool [n]


class Assembly:
    """Records each block when all its samples have been seen.

    Of more than `kept_samples` samples, those of the blocks not touched for longest are recorded as
    parts of blocks, and so is what is left at the end. `w_ND` lies on the CPU.
    """

    def __init__(
        self,
        recorded: Mapping[str, Recorded],
        blocks: Mapping[str, Blocks],
        kept_samples: int,
        wire: Wire,
        w_ND: Tensor,
        scale: float,
    ) -> None:
        self._recorded, self._blocks, self._kept_samples = recorded, blocks, kept_samples
        self._wire, self._w_ND, self._scale = wire, w_ND, scale
        self._parts: OrderedDict[BlockView, _Block] = OrderedDict()
        self._held = 0  # samples of the blocks in parts
        self._error: BaseException | None = None
        self._queue: queue.Queue[_Labelled | None] = queue.Queue(_QUEUED)
        self._thread = threading.Thread(target=self._run, name="assembly", daemon=True)
        self._thread.start()

    def add(self, work: Work, valid_B: np.ndarray, form: Form, values_BX: Tensor) -> None:
        """Takes the labels of a batch: unit features or shifted logits, on any device. Raises what
        the writer has failed with."""
        if self._error:
            raise self._error
        if work.corpus not in self._recorded or not self._recorded[work.corpus].recording:
            return
        values, copied = values_BX.detach(), None
        if values.is_cuda:
            device = values.device
            values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values.copy_(values_BX, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(device))
        self._queue.put(_Labelled(work, valid_B, form, values, copied))

    def close(self) -> None:
        """Records what is left. Raises what the writer has failed with."""
        self._queue.put(None)
        self._thread.join()
        if self._error:
            raise self._error

    def _run(self) -> None:
        while (labelled := self._queue.get()) is not None:
            try:
                if not self._error:
                    self._take(labelled)
            except BaseException as error:  # handed to the consumer, whose thread must see it
                self._error = error
        try:
            while self._parts and not self._error:
                self._record_oldest()
        except BaseException as error:
            self._error = error

    def _take(self, labelled: _Labelled) -> None:
        if labelled.copied:
            labelled.copied.synchronize()
        share = labelled.work.share
        for block in np.unique(share.blocks[share.valid]).tolist():
            rows = np.flatnonzero(share.valid & (share.blocks == block))
            wanted = BlockView(labelled.work.corpus, block, labelled.work.view)
            held = self._held_of(wanted, labelled)
            offsets = share.offsets[rows]
            held.values[torch.from_numpy(offsets)] = labelled.values_BX[torch.from_numpy(rows)]
            held.valid[offsets], held.seen[offsets] = labelled.valid_B[rows], True
            if held.seen.all():
                self._record(wanted)
        # A view that has ended may come again, and is then read.
        now = labelled.work.corpus, labelled.work.view
        for wanted in [one for one in self._parts if (one.corpus, one.view) != now]:
            self._record(wanted)
        while self._held > self._kept_samples:
            self._record_oldest()

    def _held_of(self, wanted: BlockView, labelled: _Labelled) -> _Block:
        if wanted not in self._parts:
            length, values = self._blocks[wanted.corpus].at(wanted.block).length, labelled.values_BX
            self._parts[wanted] = _Block(
                labelled.form,
                torch.zeros((length, values.shape[1]), dtype=values.dtype),
                np.zeros(length, bool),
                np.zeros(length, bool),
            )
            self._held += length
        self._parts.move_to_end(wanted)
        return self._parts[wanted]

    def _record_oldest(self) -> None:
        self._record(next(iter(self._parts)))

    def _record(self, wanted: BlockView) -> None:
        held, recorded = self._parts.pop(wanted), self._recorded[wanted.corpus]
        self._held -= len(held.seen)
        offsets = np.flatnonzero(held.seen)
        packed = pack(
            held.form,
            held.values[torch.from_numpy(offsets)],
            held.valid[offsets],
            recorded.fingerprint,
            self._wire,
            self._w_ND,
            self._scale,
        )
        recorded.put(wanted, packed, offsets, len(held.seen))
