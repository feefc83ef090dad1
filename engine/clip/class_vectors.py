"""Class vectors: the teacher's text features of all class names, made once and stored."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from engine.clip.towers import Clip
from engine.config import UserError

__all__ = ["ClassVectors", "encode_classes"]


@dataclass(frozen=True)
class ClassVectors:
    """W [N, D] fp32 with unit rows, and where it comes from."""

    names: tuple[str, ...]
    vectors: np.ndarray
    template: str
    teacher: str  # fingerprint of the CLIP that made them
    logit_scale: float  # of that CLIP

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.vectors.tobytes()).hexdigest()

    def save(self, path: Path) -> None:
        """Writes atomically."""
        about = {
            "names": list(self.names),
            "template": self.template,
            "teacher": self.teacher,
            "logit_scale": self.logit_scale,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".tmp")
        save_file({"vectors": self.vectors}, partial, {"class_vectors": json.dumps(about)})
        partial.replace(path)

    @classmethod
    def load(cls, path: Path, field: str = "classes.vectors") -> "ClassVectors":
        """Raises UserError for a file that is not ours, or whose rows do not fit its names."""
        try:
            with safe_open(path, "np") as file:
                about = json.loads((file.metadata() or {})["class_vectors"])
                vectors = file.get_tensor("vectors")
            stored = cls(vectors=vectors, **(about | {"names": tuple(about["names"])}))
        except FileNotFoundError:
            raise UserError(f"{field}: {path}: no such file") from None
        except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
            raise UserError(f"{field}: {path} holds no class vectors ({error})") from None
        if len(vectors) != len(stored.names):
            raise UserError(
                f"{field}: {path} has {len(vectors)} vectors for {len(stored.names)} names"
            )
        return stored


@torch.inference_mode()
def encode_classes(
    clip: Clip, names: tuple[str, ...], template: str, chunk: int = 256
) -> ClassVectors:
    """The class vectors of `names`, one sentence each, by the text tower of `clip`."""
    rows = []
    for start in range(0, len(names), chunk):
        sentences = [template.replace("{}", name) for name in names[start : start + chunk]]
        rows.append(clip.encode_text(clip.tokenizer(sentences)).float())
    vectors = torch.nn.functional.normalize(torch.cat(rows), dim=-1).numpy()
    return ClassVectors(names, vectors, template, clip.fingerprint, clip.logit_scale)
