"""Distils a teacher into a student over unlabeled images, and writes a run folder."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from engine.config import RunConfig, Section, to_dict
from engine.parse import Flat, parse
from jobs.cli import PRESETS, run
from jobs.table import scores


@dataclass(frozen=True)
class DistillConfig(Section):
    """Distils a teacher into a student over unlabeled images.

    Options come from a TOML file, if one is named first, and then from the command line.
    """

    run: Flat[RunConfig]
    dry_run: bool = False
    """Print the resolved config and stop."""


def main(args: Sequence[str]) -> None:
    asked = parse(
        DistillConfig,
        args,
        prog="promptkd distill",
        from_files=True,
        presets=PRESETS / "distill",
    )
    config = asked.run
    if asked.dry_run:
        print(json.dumps(to_dict(config), indent=2))
        return
    from engine.run import distill

    summary = distill(config)
    print(table(summary))
    print(f"run folder: {config.folder}")


def table(summary: dict) -> str:
    """The scores of a run, in percent, and its speed."""
    lines = [scores(summary, ("student_before", "student_after", "teacher"))]
    wait = summary["wait_fraction"]
    lines.append(
        f"{summary['samples']:,.0f} images in {summary['steps']:,.0f} steps, "
        f"{summary['images_per_second']:,.1f} images/s; waited {100 * wait['labels']:.1f} % of the "
        f"time for labels, {100 * wait['data']:.1f} % for data"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:], "distill"))
