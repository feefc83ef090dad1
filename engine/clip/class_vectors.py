"""Class vectors: the teacher's text features of all class names, made once and stored."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F

from engine.clip.towers import Clip
from engine.config import UserError
from engine.json_text import parse_json
from engine.tensor_files import open_tensors, write_tensors

__all__ = ["CHUNK", "ClassVectors", "encode_classes", "own_templates", "text_features", "tokenized"]

CHUNK = 256  # sentences of one forward of the text tower


@dataclass(frozen=True)
class ClassVectors:
    """W [N, D] fp32 with unit rows, and where it comes from."""

    names: tuple[str, ...]
    vectors: np.ndarray
    templates: tuple[str, ...]  # the sentences whose features a row is the mean of
    teacher: str  # fingerprint of the CLIP that made them
    logit_scale: float  # of that CLIP

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.vectors.tobytes()).hexdigest()

    def rows(self, teacher: str, templates: tuple[str, ...]) -> dict[str, np.ndarray]:
        """The vectors by class name, if this teacher made them of these sentences; else none."""
        if (self.teacher, self.templates) != (teacher, templates):
            return {}
        return dict(zip(self.names, self.vectors, strict=True))

    def save(self, path: Path) -> None:
        """Writes atomically."""
        about = {
            "names": list(self.names),
            "templates": list(self.templates),
            "teacher": self.teacher,
            "logit_scale": self.logit_scale,
        }
        vectors = torch.from_numpy(self.vectors)
        write_tensors(path, {"vectors": vectors}, {"class_vectors": json.dumps(about)})

    @classmethod
    def load(cls, path: Path, field: str = "classes.vectors") -> "ClassVectors":
        """Raises UserError for a file that is not ours, or whose rows do not fit its names."""
        try:
            with open_tensors(path, "np") as file:
                about = parse_json((file.metadata() or {})["class_vectors"])
                vectors = file.get_tensor("vectors")
            about |= {key: tuple(about[key]) for key in ("names", "templates")}
            stored = cls(vectors=vectors, **about)
        except FileNotFoundError:
            raise UserError(f"{field}: {path}: no such file") from None
        except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
            raise UserError(f"{field}: {path} holds no class vectors ({error})") from None
        if not np.isfinite(vectors).all():
            raise UserError(f"{field}: {path} holds numbers that are not finite")
        if len(vectors) != len(stored.names):
            raise UserError(
                f"{field}: {path} has {len(vectors)} vectors for {len(stored.names)} names"
            )
        return stored


@torch.inference_mode()
def encode_classes(
    clip: Clip,
    names: tuple[str, ...],
    templates: tuple[str, ...],
    known: ClassVectors | None = None,
    field: str = "classes.names",
) -> ClassVectors:
    """The class vectors of `names`, by the text tower of `clip` and the prompts it has learned.

    A row is the mean of the unit features of a class in all templates, made a unit again (CLIP,
    section 3.1.4). Rows of `known` are kept where they were made by the same teacher from the same
    sentences. Raises UserError, naming `field`, for a class name too long for the text tower.
    """
    kept = known.rows(clip.fingerprint, templates) if known else {}
    new = tuple(name for name in names if name not in kept)
    if new:
        features = sum(
            F.normalize(text_features(clip, new, template, field), dim=-1) for template in templates
        )
        assert isinstance(features, Tensor)
        kept |= zip(new, F.normalize(features, dim=-1).cpu().numpy(), strict=True)
    vectors = np.stack([kept[name] for name in names])
    return ClassVectors(names, vectors, templates, clip.fingerprint, clip.logit_scale)


def own_templates(clip: Clip, templates: tuple[str, ...]) -> tuple[str, ...]:
    """The sentences for a CLIP: `templates`, unless its learned prompts bring their own."""
    return (clip.prompts.template,) if clip.prompts else templates


def text_features(clip: Clip, names: Sequence[str], template: str, field: str) -> Tensor:
    """Text features [N, D] fp32, not normalised, of a sentence around each class name; computed
    where the text tower lies."""
    device = clip.text.positional_embedding.device
    prompts = clip.prompts.text_KPC.to(device) if clip.prompts else None
    tokens = tokenized(clip, names, template, field).to(device)
    return torch.cat([clip.text(part, prompts).float() for part in tokens.split(CHUNK)])


def tokenized(clip: Clip, names: Sequence[str], template: str, field: str) -> Tensor:
    """Token ids [N, L] of a sentence around each class name; `_` reads as a blank.

    Raises UserError for a sentence that is cut off at the tower's context length.
    """
    length = clip.text.context_length
    sentences = [template.replace("{}", name.replace("_", " ")) for name in names]
    tokens = clip.tokenizer(sentences)
    whole = clip.tokenizer(sentences, context_length=8 * length)
    if (cut := (whole[:, :length] != tokens).any(dim=1)).any():
        name = names[int(cut.int().argmax())]
        raise UserError(
            f"{field}: {name!r} is too long: {template!r} around it takes more than the "
            f"{length} tokens of {clip.name}'s text tower"
        )
    return tokens
