"""Sentences around a class name: one, a published ensemble, or a file of the user's."""

from pathlib import Path

from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

from engine.config import UserError

__all__ = ["ENSEMBLES", "read_templates"]

_EIGHTY = tuple(sentence("{}") for sentence in OPENAI_IMAGENET_TEMPLATES)
ENSEMBLES = {
    "imagenet-80": _EIGHTY,  # CLIP's own
    "imagenet-60": _EIGHTY[:60],  # the ones that PromptSRC anchors its text features to
    "imagenet-7": tuple(sentence("{}") for sentence in SIMPLE_IMAGENET_TEMPLATES),
}


def read_templates(template: str, field: str = "classes.template") -> tuple[str, ...]:
    """A sentence that holds {}, the name of an ensemble, or a text file of one sentence a line.

    Raises UserError for anything else.
    """
    if "{}" in template:
        return (template,)
    if template in ENSEMBLES:
        return ENSEMBLES[template]
    try:
        lines = Path(template).read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError):
        raise UserError(
            f"{field}: {template!r} is neither a sentence that holds {{}}, nor one of "
            f"{', '.join(ENSEMBLES)}, nor a text file of such sentences"
        ) from None
    for number, line in enumerate(lines, 1):
        if "{}" not in line:
            raise UserError(f"{field}: {template}, line {number} does not hold {{}}")
    if not lines:
        raise UserError(f"{field}: {template} is empty")
    return tuple(lines)
