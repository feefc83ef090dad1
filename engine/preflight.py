"""All of a run's mistakes that can be found before a model is built."""

import dataclasses
from pathlib import Path

from engine.clip.class_vectors import ClassVectors
from engine.clip.names import read_names
from engine.clip.templates import read_templates
from engine.clip.weights import check_weights, vision_shape
from engine.config import (
    ClassesConfig,
    Colleague,
    RunConfig,
    TeacherConfig,
    UserError,
    absolute,
)
from engine.data.corpus import open_corpora
from engine.labels.store import Store
from engine.parse import parse
from engine.progress import say

__all__ = ["check", "colleagues"]


def check(config: RunConfig) -> tuple[str, ...]:
    """Gives the class names, or raises UserError with the file and the field to mend."""
    read_templates(config.classes.template)
    if config.teacher.prompts and not Path(config.teacher.prompts).is_file():
        raise UserError(f"teacher.prompts: {config.teacher.prompts}: no such file")
    names = read_names(config.classes.names, repeats=config.classes.repeats)
    if config.classes.vectors:
        stored = ClassVectors.load(Path(config.classes.vectors))
        _require_names(names, config, stored, "classes.vectors")
    corpora = open_corpora(config.corpus)
    if listed := corpora["shards"].listed:
        say(
            f"corpus.samples: {config.corpus.samples} lists {listed.samples:,} of the "
            f"{corpora['shards'].samples:,} samples of corpus.shards, in {len(listed.used):,} of "
            f"{len(listed.counts):,} blocks"
        )
    if "evaluation" in corpora:
        corpora["evaluation"].require_labels_below(
            len(names), config.classes.names, config.corpus.evaluation, "corpus.evaluation"
        )
    if config.train.selection != "last":
        if "evaluation" not in corpora or corpora["evaluation"].largest_label < 0:
            raise UserError(
                f"train.selection: {config.train.selection} chooses a pass by corpus.evaluation, "
                "which is to have labels (.cls); --train.selection last does without"
            )
    for name, corpus in corpora.items():
        for shard in corpus.incomplete:
            say(f"warning: corpus.{name}: {shard} has no end mark; it may have lost its tail")
    check_weights(config.teacher.model, config.teacher.weights, "teacher.")
    check_weights(config.student.model, config.student.weights, "student.")
    teacher, student = vision_shape(config.teacher.model), vision_shape(config.student.model)
    if config.student.prompts and config.student.depth > student.layers:
        raise UserError(
            f"student.depth: {config.student.depth} layers are to have prompts, "
            f"{config.student.model} has {student.layers}"
        )
    sizes = {student.pixels, teacher.pixels}
    for one, file in zip(colleagues(config), config.teachers, strict=True):
        check_weights(one.teacher.model, one.teacher.weights, f"{file}: teacher.")
        if one.teacher.prompts and not Path(one.teacher.prompts).is_file():
            raise UserError(f"{file}: teacher.prompts: {one.teacher.prompts}: no such file")
        sizes.add(vision_shape(one.teacher.model).pixels)
        if one.classes.vectors:
            _require_names(names, config, ClassVectors.load(Path(one.classes.vectors)), file)
    if (config.student.trained_layers or 0) > student.layers:
        raise UserError(
            f"student.trainable: {config.student.trainable} of {config.student.model}, which has "
            f"{student.layers} layers; full trains all"
        )
    if config.targets.store:
        _check_store(config)
    if config.targets.source == "inline" and len(sizes) > 1:
        raise UserError(
            "targets.source: inline needs teachers and student to take images of one size, "
            f"these take {', '.join(map(str, sorted(sizes)))} pixels; use stream"
        )
    if config.teachers and config.train.feature_weight:
        raise UserError(
            "train.feature_weight: several teachers have no features in common; leave it at 0"
        )
    return names


def _check_store(config: RunConfig) -> None:
    """What can be said of a store before it is known how labels are made."""
    if not Store(config.targets.store).labellings() and config.targets.source == "store":
        raise UserError(f"targets.store: {config.targets.store} holds no labels")


def colleagues(config: RunConfig) -> tuple[Colleague, ...]:
    """The further teachers of a run. Raises UserError, naming the file."""
    found = []
    for file in config.teachers:
        one = parse(Colleague, [file], prog="promptkd distill", from_files=True)
        told = dataclasses.replace(one.classes, vectors="", template=ClassesConfig().template)
        if told != ClassesConfig():
            raise UserError(f"{file}: classes: only vectors and template are a teacher's own")
        alone = TeacherConfig()
        for field in ("actors", "max_actors", "gpus", "cpus", "resource", "threads"):
            if getattr(one.teacher, field) != getattr(alone, field):
                raise UserError(
                    f"{file}: teacher.{field}: teachers of a team share their actors; say it in "
                    "the run's own [teacher]"
                )
        found.append(absolute(one))
    return tuple(found)


def _require_names(
    names: tuple[str, ...], config: RunConfig, stored: ClassVectors, source: str
) -> None:
    if stored.names != names:
        raise UserError(
            f"classes.names: {config.classes.names} does not fit the vectors of {source}: "
            + _difference(names, stored.names)
        )


def _difference(names: tuple[str, ...], stored: tuple[str, ...]) -> str:
    if len(names) != len(stored):
        return f"{len(names)} names, {len(stored)} vectors"
    row = next(i for i, pair in enumerate(zip(names, stored, strict=True)) if pair[0] != pair[1])
    return f"line {row + 1} is {names[row]!r}, the vectors have {stored[row]!r}"
