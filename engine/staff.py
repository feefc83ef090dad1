"""Who labels a run's images, how, and where its labels come from."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from engine.announce import savings
from engine.clip.class_vectors import ClassVectors, encode_classes, own_templates
from engine.clip.templates import read_templates
from engine.clip.towers import Clip, half_precision, load_clip
from engine.clip.weights import vision_shape
from engine.config import Colleague, RunConfig, UserError
from engine.data.corpus import open_corpora
from engine.labels.assignment import Assignment
from engine.labels.sources import Choice, chosen, missing_blocks, opened
from engine.labels.teacher import Labels, TeacherSpec, labellings
from engine.preflight import colleagues
from engine.progress import say

__all__ = ["arranged"]


def arranged(
    configs: Sequence[RunConfig], students: Iterable[Clip], names: tuple[str, ...]
) -> tuple[Assignment, Choice]:
    """How the labels of students that share them are made, and where they come from; `students` are
    their CLIPs, `names` the classes. Raises UserError."""
    first = configs[0]
    scales = {clip.name: clip.logit_scale for clip in students}
    teachers = [
        _teacher(
            first.device, Colleague(teacher=first.teacher, classes=first.classes), names, scales, ""
        )
    ]
    for file, one in zip(first.teachers, colleagues(first), strict=True):
        teachers.append(_teacher(first.device, one, names, scales, f"{file}: "))
    features = any(config.train.feature_weight > 0 for config in configs)
    labels, corpora = Labels.of(first, teachers, features), open_corpora(first.corpus)
    how = labellings(labels, corpora, first.device)
    recorded, missing = opened(first, how), None
    if recorded:
        longest = max(configs, key=lambda config: config.views)
        by_view = missing_blocks(longest, recorded, corpora)
        missing = sum(by_view.values())
        say(savings(first.targets.store, labels, corpora, by_view))
        if missing and first.targets.source == "store":
            raise UserError(
                f"targets.source: {first.targets.store} lacks {missing} of the labels of blocks "
                f"that {longest.views} views have; --targets.source auto makes them"
            )
    sizes = [vision_shape(config.student.model).pixels for config in configs]
    pixels = [vision_shape(one.config.model).pixels for one in teachers]
    choice = chosen(first, sizes, pixels, missing)
    say(f"labels: {choice.source}, {choice.why}")
    listed = corpora["shards"].listed
    samples = listed.fingerprint if listed else ""
    return Assignment(first, labels, how, bool(recorded), samples), choice


def _teacher(
    device: str,
    one: Colleague,
    names: tuple[str, ...],
    scales: Mapping[str, float],
    where: str,
) -> TeacherSpec:
    """A teacher, with its class vectors, stored or made now. `scales`: of its students' logits;
    `where`: what its fields are named after."""
    told = one.teacher
    teacher = load_clip(told.model, told.weights, f"{where}teacher.", told.prompts)
    _require_like_scales(teacher, scales, where)
    precision = half_precision(told.precision, torch.device(device))
    resolved = dataclasses.replace(told, precision=precision)
    if one.classes.vectors:
        classes = ClassVectors.load(Path(one.classes.vectors), f"{where}classes.vectors")
        if classes.teacher != teacher.fingerprint:
            raise UserError(
                f"{where}classes.vectors: {one.classes.vectors} was made by another teacher than "
                f"teacher.model, teacher.weights and teacher.prompts name ({told.model}, "
                f"{told.weights or '-'}, {told.prompts or 'no prompts'})"
            )
        return TeacherSpec(resolved, classes)
    say(f"encoding {len(names)} class names with the text tower of teacher {told.model}")
    if torch.cuda.is_available():
        teacher.text.to("cuda")
    templates = own_templates(teacher, read_templates(one.classes.template))
    return TeacherSpec(resolved, encode_classes(teacher, names, templates))


def _require_like_scales(teacher: Clip, scales: Mapping[str, float], where: str) -> None:
    """The KL between logits of scale 100 and of scale 1 would teach temperature, not classes."""
    for name, scale in scales.items():
        low, high = sorted((teacher.logit_scale, scale))
        if high > 10 * low:
            raise UserError(
                f"student.weights: the logit scale of {name} is {scale:.3g}, that of "
                f"{where}teacher.weights ({teacher.name}) {teacher.logit_scale:.3g}; these cannot "
                "be distilled into each other. CLIP's is about 100: is one of them not trained?"
            )
