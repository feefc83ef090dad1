"""Accuracy over base, novel and all classes, and agreement with the teacher.

Protocols of CoOp, CoCoOp and PromptKD. Base-to-novel: classes in label order, the first half
(rounded up) is base, the rest novel; an image is classified among the classes of its own half.
Cross-dataset, domain generalisation and few-shot: among all classes. Letters: B images, N classes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.clip.class_vectors import ClassVectors
from engine.clip.towers import Clip
from engine.config import CorpusConfig
from engine.data.batches import test_shares
from engine.data.corpus import Corpus
from engine.data.isolate import decoder_of
from engine.data.loader import Loader, Work
from engine.data.views import TEST_VIEW, ViewPolicy
from engine.labels.targets import BlockView, Targets, TargetSource
from engine.train.ledger import Ledger
from kernels.reference import logits

__all__ = ["Model", "Score", "evaluate", "tally", "zero_shot"]

_AS_USUAL = CorpusConfig()
_HELD_BYTES = 1 << 30  # of encoded images
Model = Callable[[Tensor], Tensor]  # uint8 images [B, 3, S, S] on the device -> logits [B, N]


def tally(
    logits_BN: Tensor, labels_B: Tensor, base: int, teacher_logits_BN: Tensor | None = None
) -> Tensor:
    """Counts of a batch, int64 [7]: base right, base, novel right, novel, right among all classes,
    agreeing, compared.

    `labels_B` is -1 where an image has none; agreement is over all N classes.
    """
    is_base, is_novel = (labels_B >= 0) & (labels_B < base), labels_B >= base
    right_base = (logits_BN[:, :base].argmax(-1) == labels_B) & is_base
    novel = logits_BN[:, base:]
    top_novel = novel.argmax(-1) + base if novel.shape[1] else torch.full_like(labels_B, -1)
    right_novel = (top_novel == labels_B) & is_novel
    top = logits_BN.argmax(-1)
    counts = [right_base.sum(), is_base.sum(), right_novel.sum(), is_novel.sum()]
    counts.append((top == labels_B).sum())
    if teacher_logits_BN is None:
        counts += [torch.zeros_like(counts[0])] * 2
    else:
        agree = top == teacher_logits_BN.argmax(-1)
        counts += [agree.sum(), torch.full_like(counts[0], len(agree))]
    return torch.stack(counts)


def evaluate(
    models: Mapping[str, Model],
    source: TargetSource | None,
    corpus: Corpus,
    blocks: Sequence[int],
    policy: ViewPolicy,
    threads: int,
    base: int,
    batch: int,
    device: torch.device,
    data: CorpusConfig = _AS_USUAL,
    told: Callable[[Targets], Tensor] | None = None,
) -> tuple[dict[str, Tensor], Ledger]:
    """tally() of every model, and of the teacher behind `source` if there is one (`teacher`), over
    the test view of some blocks of a corpus; and what became of the samples. `told` makes logits
    [B, N] of the source's soft targets. Decodes with `threads` CPU threads, as `data` says."""
    assert (source is None) == (told is None)
    names = [*models, "teacher"] if source else [*models]
    tallies = {name: torch.zeros(7, dtype=torch.int64) for name in names}
    ledger = Ledger()
    works = (
        Work("evaluation", number, TEST_VIEW, share, soon)
        for number, (share, soon) in enumerate(test_shares(corpus, blocks, batch))
    )
    # Its own: another one may be at work.
    decoder = decoder_of(policy, str(device), threads, data)
    loader = Loader(corpus, decoder, works, _HELD_BYTES, device=device)
    try:
        with torch.inference_mode():
            for item in loader:
                valid_B, teacher_BN = item.valid_B, None
                if source and told:
                    source.request([BlockView("evaluation", b, v) for v, b in item.work.soon])
                    targets = source.targets(item)
                    valid_B, teacher_BN = targets.valid_B, told(targets)
                ledger.add(item, valid_B)
                rows = torch.from_numpy(np.flatnonzero(valid_B)).to(device)
                labels = torch.from_numpy(item.labels_B).to(device)[rows]
                images = item.here()[rows]
                answers = {name: model(images) for name, model in models.items()}
                if teacher_BN is not None:
                    teacher_BN = answers["teacher"] = teacher_BN[rows]
                for name, logits_BN in answers.items():
                    tallies[name] += tally(logits_BN, labels, base, teacher_BN).cpu()
    finally:
        loader.close()
        decoder.close()
    return tallies, ledger


def zero_shot(clip: Clip, classes: ClassVectors, device: torch.device) -> Model:
    """A CLIP's image tower, with the prompts it has learned, against class vectors of its own."""
    w_ND = torch.from_numpy(classes.vectors).to(device)
    prompts_KPC = clip.prompts.vision_KPC.to(device) if clip.prompts else None

    def answer(images_BCHW: Tensor) -> Tensor:
        u_BD = F.normalize(clip.image(images_BCHW, prompts_KPC).float(), dim=-1)
        return logits(u_BD, w_ND, clip.logit_scale)

    return answer


@dataclass(frozen=True)
class Score:
    """Percentages; None where there was nothing to count."""

    base: float | None
    novel: float | None
    hm: float | None
    all: float | None
    agreement: float | None

    @classmethod
    def of(cls, counts: Tensor) -> "Score":
        right_base, base, right_novel, novel, right, agreeing, compared = counts.tolist()
        in_base, in_novel = _percent(right_base, base), _percent(right_novel, novel)
        return cls(
            in_base,
            in_novel,
            _harmonic(in_base, in_novel),
            _percent(right, base + novel),
            _percent(agreeing, compared),
        )


def _percent(part: int, whole: int) -> float | None:
    return 100 * part / whole if whole else None


def _harmonic(a: float | None, b: float | None) -> float | None:
    if a is None or b is None:
        return None
    return 2 * a * b / (a + b) if a + b else 0.0
