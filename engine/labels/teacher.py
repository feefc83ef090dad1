"""The frozen teachers: pixels to soft targets. Plain torch."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.clip.class_vectors import ClassVectors, encode_classes, own_templates
from engine.clip.compiled import Run, compiled
from engine.clip.names import read_names
from engine.clip.quantized import full_precision, quantized, require_device
from engine.clip.templates import read_templates
from engine.clip.towers import DTYPES, Clip, half_precision, load_clip
from engine.clip.weights import vision_shape
from engine.config import (
    ClassesConfig,
    Compile,
    RunConfig,
    TeacherConfig,
    TeacherPrecision,
    UserError,
)
from engine.data.corpus import Corpus
from engine.data.decode import jpeg_decoder
from engine.data.views import RULES, ViewPolicy
from engine.labels.fidelity import Fidelity
from engine.labels.fusion import fused
from engine.labels.labelling import Labelling
from engine.labels.targets import Form, Wire, fewer_bytes, shifted
from kernels.reference import logits

__all__ = ["Labels", "Teacher", "TeacherSpec", "Team", "labellings", "policies"]


class TeacherSpec(NamedTuple):
    """One teacher of a run: how to load it (resolved), and its own class vectors."""

    config: TeacherConfig
    classes: ClassVectors


class Labels(NamedTuple):
    """How a run's labels are made: by whom, in which form, and of which views."""

    teachers: tuple[TeacherSpec, ...]  # the first one's class vectors are the student's
    fusion: str
    form: Form
    wire: Wire
    seed: int
    crop_scale: float

    @property
    def width(self) -> int:
        """Columns of what is sent."""
        classes, width = self.teachers[0].classes.vectors.shape
        return width if self.form == "features" else classes

    @classmethod
    def of(cls, config: RunConfig, teachers: Sequence[TeacherSpec], features: bool) -> "Labels":
        """`features`: whether a student learns from them, whatever their size."""
        w_ND = torch.from_numpy(teachers[0].classes.vectors)
        form: Form = (
            "logits" if len(teachers) > 1 else "features" if features else fewer_bytes(w_ND)
        )
        targets = config.targets
        return cls(
            tuple(teachers),
            targets.fusion,
            form,
            targets.precision,
            config.view_seed,
            float(config.train.crop_scale),
        )


def policies(labels: Labels) -> dict[int, ViewPolicy]:
    """The views that the teachers see, by the size of image that they take."""
    sizes = {vision_shape(told.config.model).pixels for told in labels.teachers}
    return {pixels: ViewPolicy(labels.seed, pixels, labels.crop_scale) for pixels in sorted(sizes)}


def labellings(labels: Labels, corpora: Mapping[str, Corpus], device: str) -> dict[str, Labelling]:
    """Of each corpus, what its labels depend on, where images are decoded on a `device`."""
    specs = labels.teachers
    return {
        name: Labelling(
            teachers=tuple(told.classes.teacher for told in specs),
            precisions=tuple(told.config.precision for told in specs),
            class_vectors=tuple(told.classes.fingerprint for told in specs),
            weights=tuple(told.config.weight for told in specs) if len(specs) > 1 else (1.0,),
            fusion=labels.fusion if len(specs) > 1 else "none",
            form=labels.form,
            wire=labels.wire,
            pixels=tuple(vision_shape(told.config.model).pixels for told in specs),
            seed=labels.seed,
            crop_scale=labels.crop_scale,
            rules=RULES,
            decoder=jpeg_decoder(device),
            corpus=corpus.fingerprint,
            block_samples=corpus.blocks.block_samples,
            class_names=specs[0].classes.names,
        )
        for name, corpus in corpora.items()
    }


class Teacher:
    """A CLIP image tower in half precision or 8 bits, with the prompts it has learned, against
    class vectors. `Teacher.load` makes one.

    `classes` holds the class names and their vectors (and saves them); `w_ND`, fp32 unit rows, are
    the vectors on the device; `scale` is exp of CLIP's logit scale; `pixels` is the side of the
    images it takes. Logits are scale * u W^T, u being unit image features.

    One in 8 bits is compared, on its first images, with what it was, if it is given a `fidelity`;
    the tower as it was leaves the device then.
    """

    def __init__(
        self,
        clip: Clip,
        classes: ClassVectors,
        precision: TeacherPrecision,
        device: torch.device,
        batch: int,
        fidelity: Fidelity | None = None,
        compile: Compile = "off",
    ) -> None:
        """`batch`: most images of a forward."""
        if clip.fingerprint != classes.teacher:
            raise UserError(
                "classes.vectors: they were made by another teacher than teacher.model "
                f"({classes.teacher[:16]}, this one is {clip.fingerprint[:16]})"
            )
        self.classes, self.scale, self.pixels = classes, clip.logit_scale, clip.image.pixels
        self.w_ND = torch.from_numpy(classes.vectors).to(device)
        self._tower = clip.image.to(device, DTYPES[full_precision(precision, device)])
        self._fidelity = fidelity
        self._full = self._tower if fidelity else None  # until that is done
        if precision == "fp8" or precision == "int8":
            require_device(precision, device)
            self._tower = quantized(self._tower, precision)
        self._prompts = None if clip.prompts is None else clip.prompts.vision_KPC.to(device)
        self._device, self._batch = device, batch
        self._run = compiled(self._tower, batch, self._prompts, compile, "teacher.compile")

    @classmethod
    def load(
        cls,
        model: str,
        weights: str | Path,
        classes: ClassVectors | Sequence[str] | str | Path,
        *,
        prompts: str | Path = "",
        template: str = ClassesConfig.template,
        precision: TeacherPrecision = "auto",
        device: str = "cpu",
        batch: int = 256,
    ) -> "Teacher":
        """The teacher that `promptkd distill` has, by the same words as `[teacher]` of its file.

        `model`: open_clip architecture, with `weights` its tag or checkpoint, or local-dir:FOLDER,
        without. `classes`: names, a text file of them, or stored vectors. `prompts`: what stage I
        has learned, or a checkpoint of the reference's. `template`: sentence around a class name,
        or an ensemble (imagenet-80), where there are no prompts. `batch`: most images of a
        forward. Raises UserError for what does not fit together.
        """
        place = torch.device(device)
        if isinstance(classes, str | Path):
            classes = read_names(str(classes), "classes")
        clip = load_clip(model, str(weights), "", str(prompts))
        if not isinstance(classes, ClassVectors):
            sentences = own_templates(clip, read_templates(template, "template"))
            classes = encode_classes(clip, tuple(classes), sentences, field="classes")
        told = TeacherConfig(
            model=model,
            weights=str(weights),
            prompts=str(prompts),
            precision=half_precision(precision, place),
            compile="off",
            batch=batch,
        )
        return cls._made(clip, TeacherSpec(told, classes), place, batch)

    @classmethod
    def of(cls, told: TeacherSpec, device: torch.device, images: int) -> "Teacher":
        """A run's, for so many `images` at a time, which are forwarded in equal parts."""
        config = told.config
        clip = load_clip(config.model, config.weights, "teacher.", config.prompts)
        return cls._made(clip, told, device, math.ceil(images / math.ceil(images / config.batch)))

    @classmethod
    def _made(cls, clip: Clip, told: TeacherSpec, device: torch.device, batch: int) -> "Teacher":
        config = told.config
        full = full_precision(config.precision, device)
        fidelity = Fidelity(config, full) if full != config.precision else None
        return cls(clip, told.classes, config.precision, device, batch, fidelity, config.compile)

    @torch.inference_mode()
    def features(self, images_BCHW: Tensor) -> Tensor:
        """Unit features [B, D] fp32, on the teacher's device, of uint8 images [B, 3, S, S] on any,
        S being `pixels`.

        Raises UserError where the tower is in 8 bits and too far from what it was.
        """
        parts = [self._features(part) for part in images_BCHW.split(self._batch)]
        return torch.cat(parts)

    @torch.inference_mode()
    def logits(self, images_BCHW: Tensor) -> Tensor:
        """Logits [B, N] fp32 of such images: scale * u W^T."""
        return logits(self.features(images_BCHW), self.w_ND, self.scale)

    def statement(self) -> dict[str, float]:
        """What fidelity it has; nothing of a tower that is not in 8 bits."""
        return self._fidelity.statement() if self._fidelity else {}

    def _features(self, images_BCHW: Tensor) -> Tensor:
        images_BCHW = images_BCHW.to(self._device)
        u_BD = self._of(self._run, images_BCHW)
        if self._full and self._fidelity:
            full_BD = self._of(self._full, images_BCHW)
            self._fidelity.take(*(logits(u, self.w_ND, self.scale) for u in (full_BD, u_BD)))
            if self._fidelity.done:
                self._full = None
        return u_BD

    def _of(self, run: Run, images_BCHW: Tensor) -> Tensor:
        return F.normalize(run(images_BCHW, self._prompts).float(), dim=-1)


class Team:
    """One teacher, or several that give one soft target between them."""

    def __init__(
        self, teachers: Sequence[Teacher], form: Form, weights: Sequence[float], fusion: str
    ) -> None:
        assert len(teachers) == 1 or form == "logits"
        self.form = form
        self.w_ND, self.scale = teachers[0].w_ND, teachers[0].scale
        self.pixels = {teacher.pixels for teacher in teachers}
        self._teachers, self._weights, self._fusion = teachers, weights, fusion

    @classmethod
    def load(cls, labels: Labels, device: torch.device, images: int) -> "Team":
        """For so many `images` at a time."""
        teachers = [Teacher.of(told, device, images) for told in labels.teachers]
        weights = [told.config.weight for told in labels.teachers]
        return cls(teachers, labels.form, weights, labels.fusion)

    @torch.inference_mode()
    def values(self, images: Mapping[int, Tensor]) -> Tensor:
        """What soft targets hold, [B, X] fp32, of uint8 images by their size in pixels."""
        first = self._teachers[0]
        if self.form == "features":
            return first.features(images[first.pixels])
        answers = [teacher.logits(images[teacher.pixels]) for teacher in self._teachers]
        if len(answers) == 1:
            return shifted(answers[0])
        return shifted(fused(answers, self._weights, self._fusion))

    def statement(self) -> dict[str, float]:
        """What its teachers tell, together."""
        total: Counter[str] = Counter()
        for teacher in self._teachers:
            total.update(teacher.statement())
        return dict(total)
