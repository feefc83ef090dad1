"""Labels a run's images with its teachers alone: into a store, or to nowhere, to time them."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from engine.config import Range, RunConfig, Section
from engine.parse import Flat, parse
from jobs.cli import PRESETS, run


@dataclass(frozen=True)
class LabelConfig(Section):
    """Labels all views that a run of this config would ask its teachers for, and trains no student:
    into targets.store, or, without one, to nowhere, which tells how fast the teachers are.

    Options come from the run's TOML file, and then from the command line.
    """

    run: Flat[RunConfig]
    blocks: Annotated[int | None, Range(1)] = None
    """Label so many blocks at most. None: all."""


def main(args: Sequence[str]) -> None:
    asked = parse(
        LabelConfig,
        args,
        prog="promptkd label",
        from_files=True,
        presets=PRESETS / "distill",
    )
    from engine.label import label

    told = label(asked.run, asked.blocks)
    labels = told["labels"]
    print(
        f"{labels.get('labelled', 0):,.0f} images labelled by {labels['teachers']:.0f} teachers"
        # What comes within a second was under way when the first label came.
        + (f", {told['images_per_second']:,.1f} images/s" if told["s"] >= 1 else "")
    )
    for step in ("read", "decode", "forward", "write"):
        print(f"  {step:<8}{labels.get(f'{step}_s', 0.0):>10,.1f} s of the teachers' threads")


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:], "label"))
