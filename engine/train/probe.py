"""What a run keeps to be looked at later: a few samples with both answers, and those left out.

Both are JSON lines in `telemetry/` of the run folder. Letters: B samples, N classes, D class vector
width.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.data.loader import Batch
from engine.data.order import Order, Share
from engine.telemetry import Recorder
from kernels.reference import logits

__all__ = ["Probes", "Skipped", "compared"]

_MOST_RECORDS = 2000  # of a run, or a few more: their period is whole
_MOST_SAMPLES = 64  # of a record
_EXAMPLES = 12  # of a reason, for each worker and life
Answers = Callable[[np.ndarray], Tensor]  # rows of the last step -> what compared() gives


@torch.no_grad()
def compared(x_BD: Tensor, teacher_BN: Tensor, w_ND: Tensor, scale: float) -> Tensor:
    """What a student of features `x_BD`, of any length, and a teacher of these logits say: fp32
    [5, B] of the teacher's top class and its probability, the student's, and the teacher's entropy
    in nats; all at temperature 1."""
    log_t_BN = F.log_softmax(teacher_BN.float(), dim=-1)
    log_s_BN = F.log_softmax(logits(F.normalize(x_BD.float(), dim=-1), w_ND, scale), dim=-1)
    (top_t_B, class_t_B), (top_s_B, class_s_B) = log_t_BN.max(dim=-1), log_s_BN.max(dim=-1)
    entropy_B = -(log_t_BN.exp() * log_t_BN).sum(dim=-1)
    return torch.stack([class_t_B, top_t_B.exp(), class_s_B, top_s_B.exp(), entropy_B])


class Probes:
    """Appends to `probes.jsonl`, of one worker's samples, at some of the steps that are logged
    anyway: there the GPU is waited for, and reading a few numbers more costs nothing to speak of.
    """

    def __init__(self, folder: Path, order: Order, total_steps: int, log_steps: int) -> None:
        self._recorder = Recorder(folder / "telemetry" / "probes.jsonl")
        self._order, self._last = order, total_steps
        self._period = log_steps * -(-total_steps // (log_steps * _MOST_RECORDS))

    def look(self, done: int, batch: Batch, valid_B: np.ndarray, answers: Answers) -> None:
        """After step `done`, counted from 1, of which `valid_B` were trained; if it is its turn."""
        rows = np.flatnonzero(valid_B)
        if (done % self._period and done != self._last) or not len(rows):
            return
        if len(rows) > _MOST_SAMPLES:  # of all lanes, which come in an order of their own
            rows = np.sort(np.random.default_rng(done).choice(rows, _MOST_SAMPLES, replace=False))
        told = answers(rows).cpu().numpy().astype(np.float64)
        sound = np.isfinite(told).all(axis=0)
        rows, told = rows[sound], told[:, sound]
        shard, position = _places(self._order, batch.work.share, rows)
        teacher, teacher_p, student, student_p, entropy = told
        self._recorder.record(
            "probe",
            step=done,
            view=batch.work.view,
            shard=shard,
            position=position,
            teacher=teacher.astype(int).tolist(),
            teacher_p=teacher_p.round(4).tolist(),
            student=student.astype(int).tolist(),
            student_p=student_p.round(4).tolist(),
            entropy=entropy.round(4).tolist(),
        )

    def close(self) -> None:
        self._recorder.close()


class Skipped:
    """Appends the first few samples that a worker leaves out, of each reason, to
    `skipped-RANK.jsonl`; there is no such file where it leaves none out."""

    def __init__(self, folder: Path, order: Order, rank: int) -> None:
        self._file = folder / "telemetry" / f"skipped-{rank}.jsonl"
        self._order = order
        self._recorder: Recorder | None = None
        self._told: Counter[str] = Counter()

    def add(self, done: int, batch: Batch, trained_B: np.ndarray) -> None:
        """Takes in step `done`, counted from 1; reasons are those of the ledger."""
        share = batch.work.share
        for row in np.flatnonzero(share.valid & ~trained_B).tolist():
            reason = batch.reasons[row] or "teacher"
            if self._told[reason] == _EXAMPLES:
                continue
            self._told[reason] += 1
            self._recorder = self._recorder or Recorder(self._file)
            (shard,), (position,) = _places(self._order, share, np.array([row]))
            self._recorder.record(
                "skipped", step=done, reason=reason, shard=shard, position=position
            )

    def close(self) -> None:
        if self._recorder:
            self._recorder.close()


def _places(order: Order, share: Share, rows: np.ndarray) -> tuple[list[int], list[int]]:
    """Shard and position of samples."""
    blocks = [order.blocks.at(block) for block in share.blocks[rows].tolist()]
    offsets = share.offsets[rows].tolist()
    positions = [block.start + offset for block, offset in zip(blocks, offsets, strict=True)]
    return [block.shard for block in blocks], positions
