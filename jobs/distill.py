"""Distils a teacher into a student over unlabeled images, and writes a run folder."""

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import Drained, RunConfig, Section, UserError, to_dict
from engine.parse import Flat, parse
from engine.together import check_together
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
    students: tuple[str, ...] = ()
    """TOML files of students that share the teachers and their labels: of [student], [train] and
    seed what each has of its own. The run folder of FILE.toml is NAME/FILE."""
    seeds: str = ""
    """Seeds like 1,2,3: a run for each, in NAME/seed-1 and so on; tells their mean and spread."""
    resume: bool = False
    """Go on from the newest checkpoint in the run folder; of several students or seeds, with those
    that have not ended."""
    dry_run: bool = False
    """Print the resolved config and stop."""


def main(args: Sequence[str]) -> int:
    asked = _parsed(args)
    config = asked.run
    students = _students(args, asked)
    if students:
        check_together(students)
    seeds = parse_seeds(asked.seeds) if asked.seeds else ()
    if asked.dry_run:
        told = {name: to_dict(one) for name, one in students.items()} or to_dict(config)
        print(json.dumps(told, indent=2))
        return 0
    lost = not config.folder.exists() and not config.train.checkpoint_copy
    if asked.resume and lost:
        raise UserError(f"name: --resume goes on with a run, and {config.folder} does not exist")
    if students:
        if seeds:
            raise UserError("seeds: several students have a seed each, in their files")
        return _together(students, asked.resume)
    if not seeds:
        from engine.run import distill

        _tell(distill(config, asked.resume), config)
        return 0
    return _each(config, seeds, asked.resume)


def _parsed(args: Sequence[str], *more: str) -> DistillConfig:
    """`more`: files that are read after those among the words."""
    return parse(
        DistillConfig,
        args,
        prog="promptkd distill",
        from_files=True,
        presets=PRESETS / "distill",
        more=more,
    )


def _students(args: Sequence[str], asked: DistillConfig) -> dict[str, RunConfig]:
    """The runs of several students, by name: the common settings, then those of each file, then
    the command line."""
    found: dict[str, RunConfig] = {}
    for file in asked.students:
        name, folder = Path(file).stem, asked.run.folder
        if name in found:
            raise UserError(f"students: two files are named {name}")
        told = _parsed(args, file).run
        found[name] = _within(told, name, folder)
    return found


def _together(students: Mapping[str, RunConfig], resume: bool) -> int:
    from engine.run import distill_students

    outcomes = distill_students(students, resume)
    drained: list[Drained] = []
    for name, outcome in outcomes.items():
        print(f"student {name}")
        if isinstance(outcome, Drained):
            drained.append(outcome)
        elif isinstance(outcome, Exception):
            print(f"student {name} failed: {outcome}", file=sys.stderr)
        else:
            _tell(outcome, students[name])
    if drained:
        raise drained[0]
    return 1 if any(isinstance(outcome, Exception) for outcome in outcomes.values()) else 0


def _tell(summary: Mapping[str, Any], config: RunConfig) -> None:
    print(table(summary))
    print(weights(summary))
    print(labels(summary["labels"]))
    if skipped := summary["skipped"]:
        reasons = ", ".join(f"{reason} {count}" for reason, count in skipped.items())
        print(f"skipped in all passes: {reasons}")
    print(f"run folder: {config.folder}")


def _each(config: RunConfig, seeds: Sequence[int], resume: bool) -> int:
    """A run for each seed."""
    from engine.run import distill
    from engine.run_folder import check
    from engine.train.checkpoint_copy import prepare

    runs = {seed: of_seed(config, seed) for seed in seeds}
    if resume:
        for run_ in runs.values():
            prepare(run_, resume)
    begun = {seed for seed, run_ in runs.items() if resume and run_.folder.exists()}
    for seed, run_ in runs.items():  # before the first of them takes its hours
        check(run_, seed in begun)
    trained, summaries, failures = [], [], []
    for seed, run_ in runs.items():
        print(f"seed {seed}", file=sys.stderr)
        try:
            summaries.append(distill(run_, seed in begun))
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
    return _within(dataclasses.replace(config, seed=seed), f"seed-{seed}", config.folder)


def _within(config: RunConfig, name: str, folder: Path) -> RunConfig:
    """One of the runs of a folder, which is beside others in the copy, too."""
    where = config.train.checkpoint_copy
    copy = f"{where.removesuffix('/')}/{folder.name}" if where else ""
    train = dataclasses.replace(config.train, checkpoint_copy=copy)
    return dataclasses.replace(config, runs_dir=str(folder), name=name, train=train)


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


def labels(told: Mapping[str, Any]) -> str:
    """Where a run's labels came from, and what was spared."""
    text = f"labels: {told['source']}"
    if told.get("labelled"):
        by = f" by {told['teachers']:.0f} teachers" if "teachers" in told else ""
        text += f"; {told['labelled']:,.0f} images labelled{by}"
    if told.get("again"):
        text += f", and {told['again']:,.0f} more answered from memory"
    if "from_store" in told:
        share = told["from_store"] / max(told["from_store"] + told["asked"], 1)
        text += f"; {100 * share:.0f} % read from the store"
    if told.get("unrecorded"):
        text += ", which did not take all that was labelled"
    if told.get("damaged"):
        text += f", where {told['damaged']:,.0f} files were damaged"
    if told.get("lost_kl_sum"):
        lost = told["lost_kl_sum"] / told["received"]
        text += f"; int8 has cost a KL of {lost:.2g}"
    return text


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
