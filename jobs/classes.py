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
    """Stores the class vectors of a teacher, for `classes.vectors` of a run."""

    names: Positional[str]
    """Text file of class names, one a line, in label order."""
    out: Positional[str]
    """File to write, .safetensors."""
    model: str
    """open_clip architecture, or local-dir:FOLDER."""
    weights: str = ""
    """Checkpoint file or open_clip tag of the architecture."""
    template: str = "a photo of a {}."
    """Sentence around a class name."""


def main(args: Sequence[str]) -> None:
    config = parse(StoreConfig, args, prog="promptkd classes")
    from engine.clip.class_vectors import encode_classes
    from engine.clip.names import read_names
    from engine.clip.towers import load_clip

    if "{}" not in config.template:
        raise UserError(f"template must hold {{}}, got {config.template!r}")
    names = read_names(config.names, "names")
    clip = load_clip(config.model, config.weights, "")
    classes = encode_classes(clip, names, config.template)
    classes.save(Path(config.out))
    rows, width = classes.vectors.shape
    print(f"{config.out}: {rows} class vectors of width {width}")


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:], "classes"))
