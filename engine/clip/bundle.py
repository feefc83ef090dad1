"""The deliverable: all that a frozen backbone needs to predict, in one safetensors file.

Prompts, projector, class vectors and class names, and which backbone they belong to. It predicts
without teacher and without text tower.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from json import JSONDecodeError
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from engine.clip.prompts import PromptedTower
from engine.clip.towers import DTYPES, Clip, load_clip
from engine.config import UserError
from kernels.reference import logits

__all__ = ["Bundle", "Predictor"]

_FORMAT = 1


@dataclass(frozen=True)
class Bundle:
    """A trained student without its frozen tower. `learned` is PromptedTower's state dict."""

    learned: Mapping[str, Tensor]
    class_vectors: Tensor  # [N, D] fp32
    class_names: tuple[str, ...]
    model: str  # open_clip architecture or local-dir of the backbone
    weights: str  # its checkpoint, as the run had it
    backbone: str  # its fingerprint
    teacher: str  # fingerprint of the teacher that made the class vectors
    logit_scale: float  # the student's
    pixels: int
    format: int = _FORMAT

    def save(self, path: Path) -> None:
        """Writes atomically."""
        about = asdict(self)
        tensors = {f"learned.{k}": v.detach().cpu().contiguous() for k, v in self.learned.items()}
        tensors["class_vectors"] = self.class_vectors.cpu().contiguous()
        del about["learned"], about["class_vectors"]
        partial = path.with_name(path.name + ".tmp")
        save_file(tensors, partial, {"bundle": json.dumps(about)})
        partial.replace(path)

    @classmethod
    def load(cls, path: Path, field: str = "bundle") -> "Bundle":
        """Raises UserError for a missing file, or one that is not a bundle."""
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {})["bundle"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}
            class_vectors = tensors.pop("class_vectors")
            if about["format"] != _FORMAT:
                raise UserError(f"{field}: {path} has format {about['format']}, not {_FORMAT}")
            learned = {key.removeprefix("learned."): tensor for key, tensor in tensors.items()}
            about["class_names"] = tuple(about["class_names"])
            return cls(learned=learned, class_vectors=class_vectors, **about)
        except FileNotFoundError:
            raise UserError(f"{field}: {path}: no such file") from None
        except (SafetensorError, KeyError, TypeError, OSError, JSONDecodeError) as error:
            raise UserError(f"{field}: {path} is not a bundle ({error})") from None

    def among(self, names: Sequence[str], field: str) -> "Bundle":
        """The bundle over some of its classes, in the order of `names`.

        Raises UserError, naming `field`, for the first name that is not one of its classes.
        """
        # Of classes with one name, ImageNet's "missile" twice, the first: their vectors are equal.
        rows = {name: row for row, name in reversed([*enumerate(self.class_names)])}
        if strange := [name for name in names if name not in rows]:
            raise UserError(f"{field}: the bundle has no class {strange[0]!r}")
        chosen = self.class_vectors[[rows[name] for name in names]]
        return replace(self, class_vectors=chosen, class_names=tuple(names))

    def predictor(
        self, device: str, precision: str, model: str = "", weights: str = ""
    ) -> "Predictor":
        """Puts the student together. `model` and `weights` say where the backbone now lies, if not
        where the run had it. Raises UserError for a backbone that is not the one trained on."""
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError("device: cuda is asked for, but there is no GPU")
        clip = load_clip(model or self.model, weights or ("" if model else self.weights), "")
        if clip.fingerprint != self.backbone:
            raise UserError(
                f"weights: the bundle was trained on backbone {self.backbone[:16]}, "
                f"{weights or model or self.weights or self.model} is {clip.fingerprint[:16]}"
            )
        clip.image.to(device, DTYPES[precision])
        return self.attached(clip, torch.device(device))

    def attached(self, clip: Clip, device: torch.device) -> "Predictor":
        """The student on top of a backbone that is loaded already."""
        depth, prompts, _ = self.learned["prompts"].shape
        hidden, _ = self.learned["projector.first.weight"].shape
        student = PromptedTower(
            clip.image, prompts, depth, hidden, self.class_vectors.shape[1], seed=0
        )
        student.load_state_dict(dict(self.learned))
        return Predictor(student.to(device).eval(), self.class_vectors.to(device), self.logit_scale)


class Predictor(nn.Module):
    """The student and its class vectors."""

    def __init__(self, student: PromptedTower, w_ND: Tensor, scale: float) -> None:
        super().__init__()
        self.student, self.scale = student, scale
        self.register_buffer("w_ND", w_ND)

    @property
    def pixels(self) -> int:
        return self.student.tower.pixels

    @torch.inference_mode()
    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits [B, N] fp32 of uint8 images in the test view."""
        assert isinstance(self.w_ND, Tensor)
        return logits(self.student(images_BCHW.to(self.w_ND.device)), self.w_ND, self.scale)
