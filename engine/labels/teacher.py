"""The frozen teacher: pixels to features and logits, blocks to soft targets. Plain torch."""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.clip.class_vectors import ClassVectors
from engine.clip.towers import DTYPES, Clip
from engine.config import UserError
from engine.data.corpus import Corpus, Sample
from engine.data.isolate import AnyDecoder
from engine.data.loader import Batch
from engine.data.views import ViewPolicy
from engine.labels.targets import BlockView, SoftTargets, pack
from kernels.reference import logits

__all__ = ["InlineSource", "Labeller", "Teacher", "fingerprint"]


def fingerprint(
    classes: ClassVectors, policy: ViewPolicy, precision: str, corpora: Mapping[str, Corpus]
) -> str:
    """Of everything but block and view that a label depends on, as 16 hex digits."""
    images = [
        (name, corpus.fingerprint, corpus.blocks.block_samples)
        for name, corpus in sorted(corpora.items())
    ]
    identity = f"{classes.teacher} {classes.fingerprint} {policy} {precision} {images}"
    return hashlib.sha256(identity.encode()).hexdigest()[:16]


class Teacher:
    """A CLIP image tower in half precision, with the prompts it has learned, against class
    vectors."""

    def __init__(
        self, clip: Clip, classes: ClassVectors, precision: str, device: torch.device, batch: int
    ) -> None:
        if clip.fingerprint != classes.teacher:
            raise UserError(
                "classes.vectors: they were made by another teacher than teacher.model "
                f"({classes.teacher[:16]}, this one is {clip.fingerprint[:16]})"
            )
        self.scale = clip.logit_scale
        self.w_ND = torch.from_numpy(classes.vectors).to(device)
        self._tower = clip.image.to(device, DTYPES[precision])
        self._prompts = None if clip.prompts is None else clip.prompts.vision_KPC.to(device)
        self._device, self._batch = device, batch

    @torch.inference_mode()
    def features(self, images_BCHW: Tensor) -> Tensor:
        """Unit features [B, D] fp32 of uint8 images on any device."""
        parts = [
            self._tower(part.to(self._device), self._prompts).float()
            for part in images_BCHW.split(self._batch)
        ]
        return F.normalize(torch.cat(parts), dim=-1)

    def logits(self, images_BCHW: Tensor) -> Tensor:
        """Logits [B, N] fp32."""
        return logits(self.features(images_BCHW), self.w_ND, self.scale)


class Labeller:
    """Soft targets of blocks: reads, decodes and labels; a pure function of its argument. Raises
    OSError for a block of which nothing can be read: that may pass, and is no label."""

    def __init__(
        self, teacher: Teacher, corpora: Mapping[str, Corpus], decoder: AnyDecoder, fingerprint: str
    ) -> None:
        self._teacher, self._corpora = teacher, corpora
        self._decoder, self._fingerprint = decoder, fingerprint

    def label(self, wanted: BlockView) -> SoftTargets:
        corpus = self._corpora[wanted.corpus]
        samples = corpus.read(wanted.block)
        if _unreadable(samples):
            shard = corpus.shards[corpus.blocks.at(wanted.block).shard]
            raise OSError(f"the teacher cannot read block {wanted.block}, of {shard}")
        images, reasons = self._decoder.decode(samples, wanted.view)
        u_nD = self._teacher.features(images)
        valid_n = np.array([reason is None for reason in reasons])
        return pack(u_nD, valid_n, self._teacher.w_ND, self._teacher.scale, self._fingerprint)


def _unreadable(samples: Sequence[Sample]) -> bool:
    reasons = {sample.reason for sample in samples}
    return "unreadable" in reasons and None not in reasons


class InlineSource:
    """The target source that asks a teacher in its own process, on pixels decoded once."""

    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher
        self.waited_s = 0.0

    def request(self, wanted: Sequence[BlockView]) -> None:
        pass

    def logits(self, batch: Batch) -> tuple[Tensor, np.ndarray]:
        return self._teacher.logits(batch.images_BCHW), batch.valid_B

    def close(self) -> None:
        pass
