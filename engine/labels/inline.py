"""Target sources without Ray: a teacher in this process, one loaded on demand, and noise."""

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from engine.data.loader import Batch
from engine.labels.assembly import Assembly
from engine.labels.labeller import Labeller
from engine.labels.targets import BlockView, Form, SoftTargets, Targets, gathered, on_device
from engine.labels.teacher import Team

__all__ = ["InlineSource", "OnDemandSource", "SyntheticSource"]

_BEHIND = 2  # steps after which a number on the GPU is there without a wait


class InlineSource:
    """Asks a teacher in this process, about pixels that are decoded once for both.

    On a GPU the teacher has a stream of its own, so that it labels the next batch while the student
    trains on this one. `assembly` records what it says. Raises RuntimeError, within `_BEHIND`
    steps, where the teacher's numbers are not finite; the student's step keeps such numbers from
    its optimizer by itself.
    """

    waited_s = 0.0

    def __init__(self, team: Team, assembly: Assembly | None = None) -> None:
        self._team, self._assembly = team, assembly
        device = team.w_ND.device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._stream:  # on which the weights have come
            self._stream.wait_stream(torch.cuda.current_stream(device))
        self._flags: list[tuple[int, Tensor, torch.cuda.Event | None]] = []
        self._labelled, self._busy_s = 0, 0.0

    def request(self, wanted: Sequence[BlockView]) -> None:
        pass

    def targets(self, batch: Batch) -> Targets:
        started = time.perf_counter()
        values_BX = self._values(batch)
        self._busy_s += time.perf_counter() - started  # on a GPU, that of launching
        self._labelled += int(batch.valid_B.sum())
        if self._assembly:
            # What could not be read may be read another time: it has not been seen.
            unread_B = np.array([reason == "unreadable" for reason in batch.reasons])
            share = batch.work.share
            work = batch.work._replace(share=share._replace(valid=share.valid & ~unread_B))
            self._assembly.add(work, batch.valid_B, self._team.form, values_BX)
        return Targets(self._team.form, values_BX, batch.valid_B)

    def statement(self) -> dict[str, float]:
        told = {"labelled": self._labelled, "forward_s": self._busy_s}
        return told | self._team.statement()

    def close(self) -> None:
        if self._assembly:
            self._assembly.close()

    def _values(self, batch: Batch) -> Tensor:
        (pixels,) = self._team.pixels
        images = {pixels: batch.images_BCHW}
        if self._stream is None:
            values_BX = self._team.values(images)
            self._look_at(batch, values_BX, None)
            return values_BX
        student = torch.cuda.current_stream()
        if batch.ready:
            self._stream.wait_event(batch.ready)
        else:
            self._stream.wait_stream(student)
        with torch.cuda.stream(self._stream):
            values_BX = self._team.values(images)
            self._look_at(batch, values_BX, torch.cuda.Event())
        student.wait_stream(self._stream)
        batch.images_BCHW.record_stream(self._stream)
        values_BX.record_stream(student)
        return values_BX

    def _look_at(self, batch: Batch, values_BX: Tensor, told: torch.cuda.Event | None) -> None:
        """Looks at whether the numbers of some steps ago were finite, and marks these."""
        valid_B = on_device(batch.valid_B, values_BX.device)
        bad = ~torch.isfinite(values_BX.sum(-1).masked_fill(~valid_B, 0)).all()
        self._flags.append((batch.work.step, bad.to("cpu", non_blocking=True), told))
        if told:
            told.record()
        while len(self._flags) > (_BEHIND if told else 0):
            step, was_bad, told = self._flags.pop(0)
            if told:
                told.synchronize()
            if was_bad:
                raise RuntimeError(
                    f"the teacher's numbers at step {step + 1} are not finite: stopped before "
                    "they are trained on. teacher.precision fp32 or bf16 may help"
                )


class OnDemandSource:
    """Labels whole blocks in this process, with a labeller that is made when first asked: for the
    few blocks of a store that turn out to be damaged."""

    def __init__(
        self, make: Callable[[], Labeller], form: Form, width: int, device: torch.device
    ) -> None:
        self.waited_s = 0.0
        self._make, self._form, self._width, self._device = make, form, width, device
        self._labeller: Labeller | None = None
        self._kept: dict[BlockView, SoftTargets] = {}

    def request(self, wanted: Sequence[BlockView]) -> None:
        pass

    def targets(self, batch: Batch) -> Targets:
        started = time.perf_counter()
        if self._labeller is None:
            self._labeller = self._make()
        work, blocks = batch.work, np.unique(batch.work.share.blocks[batch.valid_B])
        needed = [BlockView(work.corpus, int(block), work.view) for block in blocks]
        self._kept = {
            one: self._kept[one] if one in self._kept else self._labeller.label(one)
            for one in needed
        }
        self.waited_s += time.perf_counter() - started
        answers = {one.block: self._kept[one] for one in needed}
        return gathered(answers, batch, self._form, self._width, self._device)

    def statement(self) -> dict[str, float]:
        return self._labeller.statement() if self._labeller else {}

    def close(self) -> None:
        if self._labeller:
            self._labeller.close()


class SyntheticSource:
    """Labels that mean nothing and cost nothing: unit features drawn by the sample's place."""

    waited_s = 0.0

    def __init__(self, width: int, device: torch.device) -> None:
        table = np.random.default_rng(0).standard_normal((997, width)).astype(np.float32)
        table /= np.linalg.norm(table, axis=1, keepdims=True)
        self._table = torch.from_numpy(table).to(device)

    def request(self, wanted: Sequence[BlockView]) -> None:
        pass

    def targets(self, batch: Batch) -> Targets:
        share = batch.work.share
        rows = torch.from_numpy((31 * share.blocks + share.offsets) % len(self._table))
        return Targets("features", self._table[rows.to(self._table.device)], batch.valid_B)

    def statement(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        pass
