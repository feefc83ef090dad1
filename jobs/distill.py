"""Distils a teacher into a student over unlabeled images, and writes a run folder."""

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.config import RunConfig, Section, to_dict
from engine.parse import Flat, parse
from jobs.cli import PRESETS, run
from jobs.seeds import mean, parse_seeds, spread
from jobs.table import scores

MODELS = ("student_before", "student_after", "teacher")


@dataclass(frozen=True)
class DistillConfig(Section):
    """Distils a teacher into a student over unlabeled images.

    Options come from a TOML file, if one is named first, and then from the command line.
    """

    run: Flat[RunConfig]
    seeds: str = ""
    """Seeds like 1,2,3: a run for each, in NAME/seed-1 and so on; tells their mean and spread."""
    dry_run: bool = False
    """Print the resolved config and stop."""


def main(args: Sequence[str]) -> int:
    asked = parse(
        DistillConfig,
        args,
        prog="promptkd distill",
        from_files=True,
        presets=PRESETS / "distill",
    )
    config = asked.run
    seeds = parse_seeds(asked.seeds) if asked.seeds else ()
    if asked.dry_run:
        print(json.dumps(to_dict(config), indent=2))
        return 0
    from engine.run import distill
    from engine.run_folder import check_free

    if not seeds:
        summary = distill(config)
        print(table(summary))
        print(weights(summary))
        if skipped := summary["skipped"]:
            reasons = ", ".join(f"{reason} {count}" for reason, count in skipped.items())
            print(f"skipped in all passes: {reasons}")
        print(f"run folder: {config.folder}")
        return 0
    runs = {seed: of_seed(config, seed) for seed in seeds}
    for run_ in runs.values():  # before the first of them takes its hours
        check_free(run_)
    trained, summaries, failures = [], [], []
    for seed, run_ in runs.items():
        print(f"seed {seed}", file=sys.stderr)
        try:
            summaries.append(distill(run_))
            trained.append(seed)
        except RuntimeError as error:  # the other seeds are to be told of, too
            failures.append(f"seed {seed} failed: {error}")
    for failure in failures:
        print(failure, file=sys.stderr)
    if summaries:
        spreads = spread(summaries) if len(summaries) > 1 else None
        told = {"seeds": trained, "failures": failures, "mean": mean(summaries), "spread": spreads}
        path = config.folder / "seeds.json"
        path.write_text(json.dumps(told, indent=2) + "\n")
        print(table(mean(summaries), spreads))
        for summary in summaries:
            print(f"{summary['name']}: {weights(summary)}")
        print(f"mean and standard deviation over seeds {trained}: {path}")
    return 1 if failures else 0


def of_seed(config: RunConfig, seed: int) -> RunConfig:
    """The run of one of several seeds."""
    return dataclasses.replace(config, seed=seed, runs_dir=str(config.folder), name=f"seed-{seed}")


def table(summary: Mapping[str, Any], deviation: Mapping[str, Any] | None = None) -> str:
    """The scores of a run, in percent, and its speed."""
    wait = summary["wait_fraction"]
    lines = [
        scores(summary, MODELS, deviation),
        f"{summary['samples']:,.0f} images in {summary['steps']:,.0f} steps, "
        f"{summary['images_per_second']:,.1f} images/s; waited {100 * wait['labels']:.1f} % of the "
        f"time for labels, {100 * wait['data']:.1f} % for data",
    ]
    return "\n".join(lines)


def weights(summary: Mapping[str, Any]) -> str:
    """Which weights a run kept, and how often it went back."""
    selection, rollbacks = summary["selection"], summary["rollbacks"]
    told = "weights: the last"
    if selection["rule"] != "last":
        told = (
            f"weights: of pass {selection['pass'] + 1}, whose accuracy on the evaluation images is "
            f"the best ({selection['accuracy']:.2f} %), as the paper chooses"
        )
    if rollbacks:
        rate = f"1/{2 ** len(rollbacks)} of its learning rate"
        told += f"; went back {len(rollbacks)} times, and ended at {rate}"
    return told


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:], "distill"))
