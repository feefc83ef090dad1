"""Stores the class vectors of a teacher: its text features of all class names, made once."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.config import Section, UserError
from engine.parse import Positional, parse
from jobs.cli import run


@dataclass(frozen=True)
class StoreConfig(Section):
    """Stores the class vectors of a teacher, for `classes.vectors` of a run.

    No class names at hand? `promptkd classes --mine` proposes some: it has a --help of its own.
    """

    names: Positional[str]
    """Text file of class names, one a line, in label order."""
    out: Positional[str]
    """File to write, .safetensors."""
    model: str
    """open_clip architecture, or local-dir:FOLDER."""
    weights: str = ""
    """Checkpoint file or open_clip tag of the architecture."""
    prompts: str = ""
    """Learned prompts: a file of `promptkd pretrain`, or of the reference's PromptSRC or MaPLe."""
    repeats: bool = False
    """Take names that come twice, as some of ImageNet's do."""
    template: str = "a photo of a {}."
    """Sentence around a class name; for a mean over several, imagenet-80, -60, -7, or a file of
    them. Learned prompts bring their own."""


def main(args: Sequence[str]) -> None:
    if "--mine" in args:
        from jobs import mine

        return mine.main([word for word in args if word != "--mine"])
    config = parse(StoreConfig, args, prog="promptkd classes")
    from engine.clip.class_vectors import ClassVectors, encode_classes, own_templates
    from engine.clip.names import read_names
    from engine.clip.templates import read_templates
    from engine.clip.towers import load_clip
    from engine.progress import say

    out = Path(config.out)
    names = read_names(config.names, "names", config.repeats)
    templates = read_templates(config.template, "template")
    if config.prompts and config.template != StoreConfig.template:
        raise UserError("template: learned prompts bring their own words; leave out one of the two")
    known = ClassVectors.load(out, "out") if out.exists() else None
    clip = load_clip(config.model, config.weights, "", config.prompts)
    templates = own_templates(clip, templates)
    old = known.rows(clip.fingerprint, templates) if known else {}
    if known and not old:
        raise UserError(
            f"out: {out} holds vectors of another teacher, or from other sentences; remove it or "
            "name another file"
        )
    say(f"encoding {len(names)} class names in {len(templates)} sentences each, if they are new")
    classes = encode_classes(clip, names, templates, known, f"names: {config.names}")
    classes.save(out)
    kept = sum(name in old for name in names)
    dropped = len(old.keys() - set(names))
    sentences = repr(templates[0]) if len(templates) == 1 else f"{len(templates)} sentences"
    if clip.prompts:
        sentences = f"the prompts of {config.prompts}"
    rows, width = classes.vectors.shape
    print(
        f"{config.out}: {rows} class vectors of width {width} from {sentences} "
        f"({rows - kept} computed, {kept} kept, {dropped} dropped)"
    )


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:], "classes"))
