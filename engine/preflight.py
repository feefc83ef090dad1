"""All of a run's mistakes that can be found before a model is built."""

from pathlib import Path

from engine.clip.class_vectors import ClassVectors
from engine.clip.names import read_names
from engine.clip.templates import read_templates
from engine.clip.weights import check_weights, vision_shape
from engine.config import RunConfig, UserError
from engine.data.corpus import open_corpora
from engine.progress import say
from engine.run_folder import check_free

__all__ = ["check"]


def check(config: RunConfig) -> tuple[str, ...]:
    """Gives the class names, or raises UserError with the file and the field to mend."""
    check_free(config)
    read_templates(config.classes.template)
    if config.teacher.prompts and not Path(config.teacher.prompts).is_file():
        raise UserError(f"teacher.prompts: {config.teacher.prompts}: no such file")
    names = read_names(config.classes.names, repeats=config.classes.repeats)
    if config.classes.vectors:
        stored = ClassVectors.load(Path(config.classes.vectors))
        if stored.names != names:
            raise UserError(
                f"classes.names: {config.classes.names} does not fit classes.vectors: "
                + _difference(names, stored.names)
            )
    corpora = open_corpora(config.corpus)
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
    if config.student.depth > student.layers:
        raise UserError(
            f"student.depth: {config.student.depth} layers are to have prompts, "
            f"{config.student.model} has {student.layers}"
        )
    if config.targets.source == "inline" and teacher.pixels != student.pixels:
        raise UserError(
            "targets.source: inline needs teacher and student to take images of one size, "
            f"these take {teacher.pixels} and {student.pixels} pixels; use stream"
        )
    return names


def _difference(names: tuple[str, ...], stored: tuple[str, ...]) -> str:
    if len(names) != len(stored):
        return f"{len(names)} names, {len(stored)} vectors"
    row = next(i for i, pair in enumerate(zip(names, stored, strict=True)) if pair[0] != pair[1])
    return f"line {row + 1} is {names[row]!r}, the vectors have {stored[row]!r}"
