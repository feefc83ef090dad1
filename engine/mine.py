"""Class names for images that have none: the words of a vocabulary that a teacher sees in them.

Zero-shot classification (CLIP, section 3.1) of a sample of the images among all words at once. A
word has the votes of the images whose most probable word it is, as in "What's in a Name?" (Han et
al. 2023), and among equals its mean probability counts. Words are taken from the strongest down,
and each drops its near-synonyms among the weaker ones. Those are told by text features less the
mean of all: as they are, CLIP's all point the same way (SpLiCE, Bhalla et al. 2024), so that of
1,203 names of LVIS (ViT-B/32) 460 have another at a cosine of 0.9 or more, `cow` and `horse` among
them; less the mean, 15 have one at 0.8 or more, such as `cushion` and `pillow`.

Letters: B images, V words, D width of features.
"""

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from engine import durable
from engine.clip.class_vectors import ClassVectors, encode_classes
from engine.clip.towers import Clip, half_precision
from engine.config import UserError
from engine.data.corpus import Corpus, Sample
from engine.data.decode import Decoder
from engine.data.images import decoded
from engine.data.views import ViewPolicy
from engine.labels.teacher import Teacher
from engine.progress import track
from kernels.reference import logits

__all__ = [
    "BLOCK_SAMPLES",
    "Proposal",
    "Responses",
    "encode_vocabulary",
    "look",
    "propose",
    "spread",
    "write",
]

BLOCK_SAMPLES = 16  # of the sample that lie together: few, since neighbours may be alike
_WORDS = 4096  # that are tokenized, or compared with images, at a time
_SHOWN = 5  # synonyms of a proposal


class Proposal(NamedTuple):
    """A class name, and what speaks for it."""

    name: str
    images: int  # of the sample, whose most probable word is this one or one it has dropped
    probability: float  # of this word, mean over the sample
    synonyms: tuple[tuple[str, float], ...]  # words it has dropped, the nearest first; cosines


def encode_vocabulary(
    clip: Clip, words: Sequence[str], templates: tuple[str, ...], field: str
) -> ClassVectors:
    """encode_classes() of many words, some at a time. Raises UserError, naming `field`, for one too
    long for the text tower."""
    starts = track(range(0, len(words), _WORDS), "encoding words")
    parts = [
        encode_classes(clip, tuple(words[i : i + _WORDS]), templates, field=field) for i in starts
    ]
    vectors = np.concatenate([part.vectors for part in parts])
    return ClassVectors(tuple(words), vectors, templates, clip.fingerprint, clip.logit_scale)


def spread(blocks: int, samples: int, wanted: int, seed: int) -> list[int]:
    """Which of a corpus's blocks hold about so many `wanted` of its `samples`: numbers at even
    distances, of which the seed shifts the first; all blocks, if need be."""
    count = min(blocks, -(-wanted * blocks // samples))
    shift = np.random.default_rng(seed).random()
    return [int((place + shift) * blocks / count) for place in range(count)]


class Responses:
    """How a teacher responds to images, by word, added up; no [B, V] is ever held as a whole."""

    def __init__(self, w_VD: Tensor, scale: float) -> None:
        self._tiles = w_VD.split(_WORDS)
        self._scale = scale
        self.images = 0
        self._mass_V = torch.zeros(len(w_VD), dtype=torch.float64, device=w_VD.device)
        self._firsts_V = torch.zeros(len(w_VD), dtype=torch.int64, device=w_VD.device)

    @torch.inference_mode()
    def add(self, u_BD: Tensor) -> None:
        """Takes in unit image features, fp32, on the device of the words' vectors."""
        lse_B = u_BD.new_full((len(u_BD),), -torch.inf)
        best_B, word_B = lse_B, torch.zeros_like(lse_B, dtype=torch.int64)
        for number, w_TD in enumerate(self._tiles):
            z_BT = logits(u_BD, w_TD, self._scale)
            lse_B = torch.logaddexp(lse_B, z_BT.logsumexp(-1))
            value_B, place_B = z_BT.max(-1)
            word_B = torch.where(value_B > best_B, number * _WORDS + place_B, word_B)
            best_B = torch.maximum(best_B, value_B)
        for number, w_TD in enumerate(self._tiles):
            z_BT = logits(u_BD, w_TD, self._scale)
            mass_T = (z_BT - lse_B[:, None]).exp().sum(0)
            self._mass_V[number * _WORDS :][: len(w_TD)] += mass_T
        self._firsts_V += torch.bincount(word_B, minlength=len(self._firsts_V))
        self.images += len(u_BD)

    def probability_V(self) -> np.ndarray:
        """Mean probability of each word, float64."""
        return (self._mass_V / self.images).cpu().numpy()

    def firsts_V(self) -> np.ndarray:
        """Images whose most probable word each is, int64."""
        return self._firsts_V.cpu().numpy()


def look(
    clip: Clip,
    vocabulary: ClassVectors,
    corpus: Corpus,
    blocks: Sequence[int],
    device: str,
    batch: int,
) -> tuple[Responses, int]:
    """The teacher's responses to the test views of some blocks of a corpus, and how many of their
    images cannot be used. Raises UserError where none can."""
    there = torch.device(device)
    teacher = Teacher(clip, vocabulary, half_precision("auto", there), there, batch)
    responses = Responses(teacher.w_ND, teacher.scale)
    decoder = Decoder(ViewPolicy(0, teacher.pixels), device, threads=2)
    unusable = 0
    batches = decoded(_samples(corpus, track(blocks, "looking at images")), decoder, batch)
    for _, images_BCHW, reasons in batches:
        rows = [row for row, reason in enumerate(reasons) if reason is None]
        unusable += len(reasons) - len(rows)
        if rows:
            responses.add(teacher.features(images_BCHW[rows]))
    decoder.close()
    if not responses.images:
        raise UserError(f"corpus: none of the {unusable} images of the sample can be used")
    return responses, unusable


def _samples(corpus: Corpus, blocks: Iterable[int]) -> Iterator[tuple[str, Sample]]:
    for block in blocks:
        for sample in corpus.read(block):
            yield sample.key, sample


def propose(
    vocabulary: ClassVectors, responses: Responses, classes: int, similar: float
) -> list[Proposal]:
    """At most so many class names, the strongest first. Of words whose text features, less the mean
    of all, have a cosine of `similar` or more, the strongest alone is taken."""
    probability_V, firsts_V = responses.probability_V(), responses.firsts_V()
    centred_VD = torch.from_numpy(vocabulary.vectors)
    centred_VD = F.normalize(centred_VD - centred_VD.mean(0), dim=-1)
    free_V = np.ones(len(probability_V), bool)
    found: list[Proposal] = []
    for word in np.lexsort((-probability_V, -firsts_V)).tolist():
        if len(found) == classes:
            break
        if not free_V[word]:
            continue
        cosine_V = (centred_VD @ centred_VD[word]).numpy()
        free_V[word] = False
        near = np.flatnonzero(free_V & (cosine_V >= similar))
        free_V[near] = False
        near = near[np.argsort(-cosine_V[near], kind="stable")]
        found.append(
            Proposal(
                vocabulary.names[word],
                int(firsts_V[word] + firsts_V[near].sum()),
                float(probability_V[word]),
                tuple((vocabulary.names[other], float(cosine_V[other])) for other in near),
            )
        )
    return found


def write(names: Path, evidence: Path, proposals: Sequence[Proposal]) -> None:
    """Writes the class names, one a line, and a CSV of what speaks for each."""
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(["class", "images", "mean_probability", "dropped", "nearest_dropped"])
    for one in proposals:
        nearest = "; ".join(f"{name} ({cosine:.2f})" for name, cosine in one.synonyms[:_SHOWN])
        rows.writerow([one.name, one.images, f"{one.probability:.6f}", len(one.synonyms), nearest])
    names.parent.mkdir(parents=True, exist_ok=True)
    durable.replace(evidence, table.getvalue().encode())
    durable.replace(names, "".join(f"{one.name}\n" for one in proposals).encode())
