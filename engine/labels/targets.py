"""Soft targets: the contract between whoever labels and whoever learns.

Letters: n samples of a block, B images of a batch, N classes, D class vector width, X whichever of
N and D a form has.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.data.loader import Batch
from kernels.reference import kl_divergence, logits

__all__ = [
    "BlockView",
    "Form",
    "SoftTargets",
    "TargetSource",
    "Targets",
    "Wire",
    "exact",
    "fewer_bytes",
    "finite",
    "gathered",
    "on_device",
    "pack",
    "shifted",
    "unpack",
]

Form = Literal["features", "logits"]
Wire = Literal["fp16", "int8"]


class BlockView(NamedTuple):
    """What is labelled at once: one view of one block of one corpus."""

    corpus: str  # "shards" or "evaluation"
    block: int
    view: int


class SoftTargets(NamedTuple):
    """What the teacher says of a block's view, as it is sent and stored.

    Either unit image features [n, D], from which the logits are a u W^T, or the logits [n, N], less
    the largest of each row: a shift that no softmax sees, and that spends fp16's precision on the
    classes that matter. fp16; or int8 with a step for each row, which loses `lost_kl`.
    """

    form: Form
    values: np.ndarray  # [n, X] fp16 or int8
    steps: np.ndarray | None  # fp32 [n]: what 1 of an int8 row stands for
    valid: np.ndarray  # bool [n]: False where the image could not be decoded
    fingerprint: str  # of the labelling: teacher, class vectors, views and corpus
    lost_kl: float = 0.0  # mean KL(exact || int8) of the valid rows, in nats

    @property
    def bytes(self) -> int:
        """As sent."""
        return self.values.nbytes + (0 if self.steps is None else self.steps.nbytes)


class Targets(NamedTuple):
    """What the teacher says of a batch, where the student is; rows that are not valid may hold
    anything."""

    form: Form
    values_BX: Tensor  # fp16 or fp32
    valid_B: np.ndarray  # bool: has a label, and pixels


def fewer_bytes(w_ND: Tensor) -> Form:
    """The form that is smaller: logits where there are fewer classes than dimensions."""
    return "logits" if w_ND.shape[0] < w_ND.shape[1] else "features"


def shifted(z_nN: Tensor) -> Tensor:
    """Logits less the largest of each row."""
    return z_nN - z_nN.amax(dim=-1, keepdim=True)


def pack(
    form: Form,
    values_nX: Tensor,
    valid_n: np.ndarray,
    fingerprint: str,
    wire: Wire,
    w_ND: Tensor,
    scale: float,
) -> SoftTargets:
    """Soft targets of unit features or shifted logits, whose meaning `w_ND` and `scale` are."""
    if wire == "fp16":
        return SoftTargets(form, values_nX.half().cpu().numpy(), None, valid_n, fingerprint)
    steps_n = values_nX.abs().amax(dim=-1).clamp(min=1e-12) / 127
    rounded = (values_nX / steps_n[:, None]).round()
    sent = unpack(form, rounded * steps_n[:, None], w_ND, scale)
    kl_n = kl_divergence(unpack(form, values_nX, w_ND, scale), sent)
    rows = torch.from_numpy(np.flatnonzero(valid_n)).to(kl_n.device)
    lost = float(kl_n[rows].mean()) if len(rows) else 0.0
    told = rounded.to(torch.int8).cpu().numpy()
    return SoftTargets(form, told, steps_n.float().cpu().numpy(), valid_n, fingerprint, lost)


def exact(targets: SoftTargets) -> np.ndarray:
    """The values [n, X] as fp16, whatever they were sent as."""
    if targets.steps is None:
        return targets.values
    return (targets.values * targets.steps[:, None]).astype(np.float16)


def finite(targets: SoftTargets) -> bool:
    """Whether the valid rows hold nothing but numbers."""
    told = targets.values if targets.steps is None else targets.steps
    return bool(np.isfinite(told[targets.valid]).all())


def unpack(form: Form, values_BX: Tensor, w_ND: Tensor, scale: float) -> Tensor:
    """Teacher logits [B, N] fp32, up to a shift per row, from the values of soft targets."""
    if form == "logits":
        return values_BX.float()
    return logits(F.normalize(values_BX.float(), dim=-1), w_ND, scale)


def on_device(array: np.ndarray, device: torch.device) -> Tensor:
    """An array on a device; through pinned memory, so that nobody waits for a GPU."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def gathered(
    answers: Mapping[int, SoftTargets],
    batch: Batch,
    form: Form,
    width: int,
    device: torch.device,
) -> Targets:
    """The rows of a batch out of the labels of its blocks, by block; what has none is not
    valid."""
    share, valid_B = batch.work.share, np.zeros(len(batch.valid_B), bool)
    values_BX = np.zeros((len(valid_B), width), np.float16)
    for block, told in answers.items():
        rows = (share.blocks == block) & batch.valid_B
        values_BX[rows] = exact(told)[share.offsets[rows]]
        valid_B[rows] = told.valid[share.offsets[rows]]
    return Targets(form, on_device(values_BX, device), valid_B)


class TargetSource(Protocol):
    """Where a student worker's soft targets come from. Each source works in a plain script."""

    @property
    def waited_s(self) -> float:
        """Spent waiting for labels."""

    def request(self, wanted: Sequence[BlockView]) -> None:
        """Says which labels will be needed soon, nearest first; no more than the source keeps."""

    def targets(self, batch: Batch) -> Targets:
        """The soft targets of a batch, on the student's device.

        Waits for them; raises RuntimeError where the teacher cannot answer."""

    def statement(self) -> dict[str, float]:
        """What the source has done so far, in numbers that add up over workers."""

    def close(self) -> None: ...
