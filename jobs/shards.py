"""Packs a folder of images into WebDataset shards."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from engine.config import Range, Section
from engine.parse import Positional, parse
from jobs.cli import run


@dataclass(frozen=True)
class ShardsConfig(Section):
    """Packs a folder of images into WebDataset shards, in a shuffled order that never changes.

    Sub-folders are taken as classes (`_` reads as a blank): their labels are kept for evaluation
    alone, and `out`/classes.txt names them. `promptkd index OUT` is the next step.
    """

    images: Positional[str]
    """Folder of JPEG, PNG or WebP images."""
    out: Positional[str]
    """Folder to write the shards to."""
    classes: str = ""
    """Text file of class names in label order. Empty: the sub-folders, sorted."""
    samples: Annotated[int, Range(1)] = 4096
    """Images of a shard."""
    skip_invalid: bool = False
    """Leave out files that are not usable images, and count them, instead of stopping."""


def main(args: Sequence[str]) -> None:
    config = parse(ShardsConfig, args, prog="promptkd shards")
    from engine.clip.names import read_names
    from engine.data.shards import write_shards

    out = Path(config.out)
    class_names = read_names(config.classes, "classes") if config.classes else None
    shards, names, left_out = write_shards(
        Path(config.images), out, class_names, config.samples, config.skip_invalid
    )
    if names:
        (out / "classes.txt").write_text("\n".join(names) + "\n")
    skipped = "".join(f"; left out {count} ({reason})" for reason, count in left_out.items())
    print(f"{len(shards)} shards in {out}, {len(names)} classes{skipped}")


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:], "shards"))
