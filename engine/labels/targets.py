"""Soft targets: the contract between whoever labels and whoever learns.

Letters: n samples of a block, B images of a batch, N classes, D class vector width.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from engine.data.loader import Batch
from kernels.reference import logits

__all__ = ["BlockView", "SoftTargets", "TargetSource", "pack", "unpack"]


class BlockView(NamedTuple):
    """What is labelled at once: one view of one block of one corpus."""

    corpus: str  # "shards" or "evaluation"
    block: int
    view: int


class SoftTargets(NamedTuple):
    """What the teacher says of a block's view. Produced by a Teacher, consumed by a TargetSource.

    In whichever form is fewer bytes: unit image features (fp16 [n, D]), from which the logits are
    a u W^T, or, where N < D, those logits (fp16 [n, N]), less the largest of each row: a shift that
    no softmax sees, and that spends fp16's precision on the classes that matter.
    """

    form: str  # "features" or "logits"
    values: np.ndarray
    valid: np.ndarray  # bool [n]: False where the image could not be decoded
    fingerprint: str  # of the labelling: teacher, class vectors and views


def pack(
    u_nD: Tensor, valid_n: np.ndarray, w_ND: Tensor, scale: float, fingerprint: str
) -> SoftTargets:
    """Soft targets of unit features `u_nD`; `scale` is the teacher's logit scale."""
    if w_ND.shape[0] >= w_ND.shape[1]:
        return SoftTargets("features", u_nD.half().cpu().numpy(), valid_n, fingerprint)
    z_nN = logits(u_nD, w_ND, scale)
    z_nN -= z_nN.amax(dim=-1, keepdim=True)
    return SoftTargets("logits", z_nN.half().cpu().numpy(), valid_n, fingerprint)


def unpack(form: str, values_BX: Tensor, w_ND: Tensor, scale: float) -> Tensor:
    """Teacher logits [B, N] fp32, up to a shift per row, from the values of soft targets."""
    if form == "logits":
        return values_BX.float()
    return logits(torch.nn.functional.normalize(values_BX.float(), dim=-1), w_ND, scale)


class TargetSource(Protocol):
    """Where a student worker's teacher logits come from."""

    def request(self, wanted: Sequence[BlockView]) -> None:
        """Says which labels will be needed soon, nearest first; no more than the source keeps."""

    def logits(self, batch: Batch) -> tuple[Tensor, np.ndarray]:
        """Teacher logits [B, N] fp32 (up to a shift per row) of a batch, and which rows are valid.

        Waits for them; raises RuntimeError where the teacher cannot answer."""

    def close(self) -> None: ...

    waited_s: float
