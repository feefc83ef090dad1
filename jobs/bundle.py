"""Changes the classes of a bundle: adds, renames, keeps some. Stored vectors are all it needs."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.config import Section, UserError
from engine.parse import Positional, parse
from jobs.cli import run


@dataclass(frozen=True)
class BundleConfig(Section):
    """Writes a bundle with other classes, without a teacher or any other model.

    Classes are first renamed, then added, then kept. `promptkd evaluate` takes them in the order of
    its labels, and their first half as base.
    """

    bundle: Positional[str]
    """bundle.safetensors of a run."""
    out: Positional[str]
    """File to write."""
    rename: tuple[str, ...] = ()
    """OLD=NEW, for any number of classes."""
    add: tuple[str, ...] = ()
    """Files of class vectors, stored by `promptkd classes` with the teacher of the run."""
    keep: str = ""
    """Text file of the class names to keep, one a line, in the order they are to have."""


def main(args: Sequence[str]) -> None:
    config = parse(BundleConfig, args, prog="promptkd bundle")
    from engine.clip.bundle import Bundle
    from engine.clip.class_vectors import ClassVectors
    from engine.clip.names import read_names

    bundle = Bundle.load(Path(config.bundle)).renamed(_pairs(config.rename))
    for file in config.add:
        bundle = bundle.added(ClassVectors.load(Path(file), "add"))
    if config.keep:
        bundle = bundle.kept(read_names(config.keep, "keep", repeats=True), "keep")
    out = Path(config.out)
    if out.exists():
        raise UserError(f"out: {out} exists; remove it or name another file")
    bundle.save(out)
    print(f"{out}: {len(bundle.class_names)} classes, {out.stat().st_size / 1e6:.2f} MB")


def _pairs(words: Sequence[str]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for word in words:
        old, sign, new = word.partition("=")
        if not sign or not new.strip():
            raise UserError(f"rename: {word!r} is not OLD=NEW")
        if old in pairs:
            raise UserError(f"rename: {old!r} is renamed twice")
        pairs[old] = new.strip()
    return pairs


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:], "bundle"))
