"""The deliverable: all that a frozen backbone needs to predict, in one safetensors file.

Prompts, projector, weights of the tower that were trained, class vectors and class names, and which
backbone they belong to. It predicts without teacher and without text tower.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from engine.clip.class_vectors import ClassVectors
from engine.clip.prompts import PromptedTower
from engine.clip.towers import DTYPES, Clip, load_clip
from engine.clip.trained import with_weights
from engine.config import UserError
from engine.data.images import Picture, test_views
from engine.json_text import parse_json
from engine.tensor_files import open_tensors, write_tensors
from kernels.reference import logits

__all__ = ["Bundle", "Predictor"]

_FORMAT = 1


@dataclass(frozen=True)
class Bundle:
    """A trained student without what was frozen. `learned` is PromptedTower's state dict.

    Class vectors are rounded to fp16 here and now, so that a bundle answers the same whether it was
    saved and loaded or not.
    """

    learned: Mapping[str, Tensor]
    class_vectors: Tensor  # [N, D] fp16; w_ND is how they are used
    class_names: tuple[str, ...]
    model: str  # open_clip architecture or local-dir of the backbone
    weights: str  # its checkpoint, as the run had it
    backbone: str  # its fingerprint
    teacher: str  # fingerprint of the teacher that made the class vectors
    logit_scale: float  # the student's
    pixels: int
    format: int = _FORMAT

    def __post_init__(self) -> None:
        assert len(self.class_vectors) == len(self.class_names)
        object.__setattr__(self, "class_vectors", self.class_vectors.half())

    @property
    def w_ND(self) -> Tensor:
        """Class vectors [N, D], fp32 unit rows."""
        return F.normalize(self.class_vectors.float(), dim=-1)

    @property
    def tower_weights(self) -> dict[str, Tensor]:
        """Weights of the tower that were trained, as TrainedTower names them."""
        own = (name for name in self.learned if name.startswith("tower."))
        return {name.removeprefix("tower."): self.learned[name] for name in own}

    def renamed(self, names: Mapping[str, str]) -> "Bundle":
        """With other names for some classes, `names` being old to new; vectors stay. Raises
        UserError for an old name it has not, and for a new one that is taken."""
        if unknown := [name for name in names if name not in self.class_names]:
            raise UserError(f"rename: the bundle has no class {unknown[0]!r}")
        class_names = tuple(names.get(name, name) for name in self.class_names)
        _require_unique(class_names, names.values(), "rename")
        return replace(self, class_names=class_names)

    def added(self, classes: ClassVectors) -> "Bundle":
        """With more classes, after its own. Raises UserError for vectors of another teacher or
        another width, and for a class that it has already."""
        if classes.teacher != self.teacher:
            raise UserError(
                f"add: the bundle's class vectors are by teacher {self.teacher[:16]}, these by "
                f"{classes.teacher[:16]}"
            )
        wide, width = classes.vectors.shape[1], self.class_vectors.shape[1]
        if wide != width:
            raise UserError(f"add: the bundle's class vectors have width {width}, these {wide}")
        names = self.class_names + classes.names
        _require_unique(names, classes.names, "add")
        more = torch.from_numpy(classes.vectors).half()
        vectors = torch.cat([self.class_vectors, more])
        return replace(self, class_vectors=vectors, class_names=names)

    def kept(self, names: Sequence[str], field: str) -> "Bundle":
        """With these of its classes alone, in this order. Raises UserError, naming `field`, for an
        unknown name."""
        # Of classes with one name the first: ImageNet has a few, and their vectors are equal.
        rows = {name: row for row, name in reversed([*enumerate(self.class_names)])}
        if unknown := [name for name in names if name not in rows]:
            raise UserError(f"{field}: the bundle has no class {unknown[0]!r}")
        chosen = self.class_vectors[[rows[name] for name in names]]
        return replace(self, class_vectors=chosen, class_names=tuple(names))

    @classmethod
    def of(
        cls, clip: Clip, weights: str, learned: Mapping[str, Tensor], classes: ClassVectors
    ) -> "Bundle":
        """What was `learned` on top of a clip, whose checkpoint is `weights`."""
        return cls(
            learned=learned,
            class_vectors=torch.from_numpy(classes.vectors),
            class_names=classes.names,
            model=clip.name,
            weights=weights,
            backbone=clip.fingerprint,
            teacher=classes.teacher,
            logit_scale=clip.logit_scale,
            pixels=clip.image.pixels,
        )

    def save(self, path: str | Path) -> None:
        """Writes atomically."""
        about = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name not in ("learned", "class_vectors")
        }
        tensors = {f"learned.{name}": tensor for name, tensor in self.learned.items()}
        tensors["class_vectors"] = self.class_vectors
        write_tensors(Path(path), tensors, {"bundle": json.dumps(about, ensure_ascii=False)})

    @classmethod
    def load(cls, path: str | Path, field: str = "bundle") -> "Bundle":
        """Raises UserError for a missing file, or one that is not a bundle."""
        try:
            with open_tensors(Path(path), "pt") as file:
                held = file.metadata() or {}
                if "bundle" not in held:
                    what = next(iter(held), "no description")
                    raise UserError(f"{field}: {path} is not a bundle (it holds {what})")
                about = parse_json(held["bundle"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}
            class_vectors = tensors.pop("class_vectors")
            if about["format"] != _FORMAT:
                raise UserError(f"{field}: {path} has format {about['format']}, not {_FORMAT}")
            learned = {key.removeprefix("learned."): tensor for key, tensor in tensors.items()}
            names = about["class_names"] = tuple(about["class_names"])
            if len(class_vectors) != len(names):
                raise UserError(
                    f"{field}: {path} is not a bundle: it has {len(class_vectors)} vectors for "
                    f"{len(names)} names"
                )
            return cls(learned=learned, class_vectors=class_vectors, **about)
        except FileNotFoundError:
            raise UserError(f"{field}: {path}: no such file") from None
        except UserError:
            raise
        except (SafetensorError, KeyError, TypeError, OSError, ValueError) as error:
            raise UserError(f"{field}: {path} is not a bundle ({error})") from None

    def predictor(
        self, device: str = "cpu", precision: str = "fp32", model: str = "", weights: str = ""
    ) -> "Predictor":
        """Puts the student together; `precision` is fp32, bf16 or fp16. `model` and `weights` say
        where the backbone now lies, if not where the run had it. Raises UserError for a backbone
        that is not the one trained on."""
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError("device: cuda is asked for, but there is no GPU")
        clip = self.load_backbone(model, weights)
        clip.image.to(device, DTYPES[precision])
        return self.attached(clip, torch.device(device))

    def load_backbone(self, model: str = "", weights: str = "") -> Clip:
        """The frozen CLIP, from where the run had it or where `model` and `weights` say. Raises
        UserError for one that is not the one trained on."""
        clip = load_clip(model or self.model, weights or ("" if model else self.weights), "")
        if clip.fingerprint != self.backbone:
            raise UserError(
                f"weights: the bundle was trained on backbone {self.backbone[:16]}, "
                f"{weights or model or self.weights or self.model} is {clip.fingerprint[:16]}"
            )
        return clip

    def attached(self, clip: Clip, device: torch.device) -> "Predictor":
        """The student on top of a backbone that is loaded already, and stays as it is."""
        weights = self.tower_weights
        tower = with_weights(clip, weights) if weights else clip.image
        added = {k: v for k, v in self.learned.items() if not k.startswith("tower.")}
        depth, prompts, _ = added["prompts"].shape if "prompts" in added else (0, 0, 0)
        hidden, _ = added["projector.first.weight"].shape
        outputs = self.class_vectors.shape[1]
        student = PromptedTower(tower, prompts, depth, hidden, outputs, seed=0)
        student.load_state_dict(added)
        student.to(device).eval()
        return Predictor(student, self.w_ND.to(device), self.logit_scale, self.class_names)


def _require_unique(names: Sequence[str], new: Iterable[str], field: str) -> None:
    for name in new:
        if (times := names.count(name)) > 1:
            raise UserError(f"{field}: {times} classes would be called {name!r}")


class Predictor(nn.Module):
    """The student and its class vectors: logits are scale * u W^T, u being its unit features."""

    w_ND: Tensor

    def __init__(
        self, student: PromptedTower, w_ND: Tensor, scale: float, class_names: tuple[str, ...]
    ) -> None:
        super().__init__()
        self.student, self.scale, self.class_names = student, scale, class_names
        self.register_buffer("w_ND", w_ND)

    @property
    def pixels(self) -> int:
        return self.student.tower.pixels

    @torch.inference_mode()
    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits [B, N] fp32 of uint8 images [B, 3, pixels, pixels] in the test view, on any
        device."""
        return logits(self.student(images_BCHW.to(self.w_ND.device)), self.w_ND, self.scale)

    def predict(
        self, images: Picture | Iterable[Picture], top: int = 5, batch: int = 64
    ) -> list[dict[str, float]]:
        """The `top` classes of every image with their probabilities, best first: what `promptkd
        predict` says.

        An image is a file (JPEG, PNG, WebP), a PIL image, or uint8 RGB pixels [H, W, 3], of any
        size. Raises UserError, naming it, for one that cannot be read.
        """
        answers = []
        for images_BCHW in test_views(images, self.pixels, batch):
            best = self(images_BCHW).softmax(-1).topk(min(top, len(self.class_names)))
            for row, rows in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                names = (self.class_names[one] for one in rows)
                answers.append(dict(zip(names, row, strict=True)))
        return answers
