"""What recorded labels say of every sample of a corpus, in one view: read once, block by block.

Letters: n samples of a block, N classes, D class vector width, X whichever of them a form has.
"""

import shutil
import tempfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.clip.class_vectors import ClassVectors
from engine.config import UserError
from engine.data.order import Blocks
from engine.labels.store import Recorded
from engine.labels.targets import BlockView, Form, SoftTargets, exact
from engine.progress import track

__all__ = ["Scan", "features", "scan", "scores"]

_READERS = 16


class Scan(NamedTuple):
    """Columns have a row for each sample of the corpus, in its order."""

    features: np.ndarray  # fp16 [samples, X], unit rows, mapped from disk; zeros where none is
    there: np.ndarray  # bool: its block is recorded
    valid: np.ndarray  # bool: and it could be decoded, so that it has a label
    classes: np.ndarray  # int32: the teacher's nearest class; -1: no label
    in_domain: np.ndarray  # fp32, see scores(); 0: no label
    probability: np.ndarray  # fp32, likewise
    missing: int  # blocks that are not there


def scan(
    recorded: Recorded,
    blocks: Blocks,
    view: int,
    vectors: ClassVectors,
    out: Path,
    device: torch.device,
) -> Scan:
    """Reads the labels of a view of all blocks. Features are spooled to a file without a name in
    the folder `out`, 2 X bytes a sample. Raises UserError where it has no room for them."""
    w_ND, scale = torch.from_numpy(vectors.vectors).to(device), vectors.logit_scale
    width = w_ND.shape[0 if recorded.form == "logits" else 1]
    total = blocks.samples
    told = Scan(
        _spool(out, total, width),
        np.zeros(total, bool),
        np.zeros(total, bool),
        np.full(total, -1, np.int32),
        np.zeros(total, np.float32),
        np.zeros(total, np.float32),
        0,
    )
    end, missing = 0, 0
    for length, targets in track(_read(recorded, blocks, view), "reading labels"):
        start, end = end, end + length
        if targets is None:
            missing += 1
            continue
        told.there[start:end], told.valid[start:end] = True, targets.valid
        which = start + np.flatnonzero(targets.valid)
        values = torch.from_numpy(exact(targets)[targets.valid]).to(device).float()
        told.features[which] = features(targets.form, values).half().cpu().numpy()
        classes, in_domain, probability = scores(targets.form, values, w_ND, scale)
        told.classes[which] = classes.cpu().numpy()
        told.in_domain[which] = in_domain.cpu().numpy()
        told.probability[which] = probability.cpu().numpy()
    return told._replace(missing=missing)


def features(form: Form, values_nX: Tensor) -> Tensor:
    """Unit rows [n, X] by which samples are compared: the teacher's features; or, where logits are
    recorded alone, these less their mean over the classes."""
    if form == "logits":
        values_nX = values_nX - values_nX.mean(dim=-1, keepdim=True)
    return F.normalize(values_nX, dim=-1)


def scores(
    form: Form, values_nX: Tensor, w_ND: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest class int64 [n], and two scores fp32 [n] of how well an image fits the classes.

    Maximum concept matching: the largest of the softmax of the cosines to the class vectors, at
    temperature 1 (Ming et al., Delving into Out-of-Distribution Detection with Vision-Language
    Representations, NeurIPS 2022); an image between two classes may well be in the domain. And the
    largest probability, at the teacher's own scale (Hendrycks and Gimpel, A Baseline for Detecting
    Misclassified and Out-of-Distribution Examples, ICLR 2017), which is how sure the teacher is.
    Both are the same for logits that are shifted.
    """
    if form == "logits":
        cosines_nN = values_nX / scale
    else:
        cosines_nN = F.normalize(values_nX, dim=-1) @ w_ND.T
    largest_n, classes_n = cosines_nN.max(dim=-1)
    below_nN = cosines_nN - largest_n[:, None]
    in_domain_n = 1 / below_nN.exp().sum(dim=-1)
    probability_n = 1 / (scale * below_nN).exp().sum(dim=-1)
    return classes_n, in_domain_n, probability_n


def _spool(folder: Path, samples: int, width: int) -> np.ndarray:
    needed, free = 2 * samples * width, shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"out: {folder} has {free / 1e9:.3g} GB free, and features of {samples:,} samples take "
            f"{needed / 1e9:.3g} GB there meanwhile"
        )
    file: Any = tempfile.TemporaryFile(dir=folder)
    return np.memmap(file, np.float16, "w+", shape=(samples, width))


def _read(
    recorded: Recorded, blocks: Blocks, view: int
) -> Iterator[tuple[int, SoftTargets | None]]:
    """Length and labels of every block in turn, some of them read ahead."""
    with ThreadPoolExecutor(_READERS) as readers:
        waiting: deque[Any] = deque()
        for block in range(len(blocks)):
            length = blocks.at(block).length
            wanted = BlockView("shards", block, view)
            waiting.append((length, readers.submit(recorded.get, wanted, length)))
            if len(waiting) > 2 * _READERS:
                length, future = waiting.popleft()
                yield length, future.result()
        for length, future in waiting:
            yield length, future.result()
