"""The whole way in minutes: images, shards, a tuned teacher, a distilled student, predictions.

The domain is generated, and the two tiny CLIP models that meet it are shipped beside this file.
What it does are the commands that it prints.
"""

import json
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from engine.config import Section
from engine.parse import parse
from jobs import distill, evaluate, index, predict, pretrain, shards
from jobs.seeds import mean, parse_seeds, spread
from jobs.table import scores

HERE = Path(__file__).parent
SETTINGS = HERE.parent / "configs" / "quickstart"
TRAIN_PER_CLASS, LABELLED_PER_CLASS, TEST_PER_CLASS = 50, 32, 25
ROWS = ("zero_shot_student", "zero_shot_teacher", "tuned_teacher", "distilled_student")


@dataclass(frozen=True)
class QuickstartConfig(Section):
    """Tunes a tiny CLIP by 16 labelled images of each of 24 classes of a generated domain, and
    distils it into a tinier one over unlabeled images of 48, in minutes on two CPU cores."""

    seeds: str = "1"
    """Seeds like 1,2,3: a teacher and a student for each; tells their mean and spread."""
    folder: str = "runs/quickstart"
    """Where images, shards and runs are kept; images and shards are made once."""


def main(args: Sequence[str]) -> None:
    config = parse(QuickstartConfig, args, prog="promptkd quickstart")
    folder = Path(config.folder)
    domain = folder / "domain"
    if not (domain / "labelled" / "corpus.parquet").exists():  # the last thing that is made
        _make_corpora(domain)
    seeds = parse_seeds(config.seeds)
    tables = [_run(folder, domain, seed) for seed in seeds]
    bundle = folder / f"student-{seeds[-1]}" / "bundle.safetensors"
    _promptkd(evaluate, bundle, domain / "evaluation")
    some = sorted((domain / "test_images").rglob("000.jpg"))[::16]
    _promptkd(predict, bundle, *some, "--top", "2")
    several = len(tables) > 1
    print(f"\nMean and standard deviation of {len(tables)} seeds:" if several else "")
    print(scores(mean(tables), ROWS, spread(tables) if several else None))


def table(folder: Path, seed: int) -> dict[str, dict[str, float | None]]:
    """The scores of the four models of a seed, by row, from the summaries of its runs."""
    stage_1, stage_2 = (
        json.loads((folder / f"{name}-{seed}" / "summary.json").read_text())
        for name in ("teacher", "student")
    )
    models = (
        stage_2["student_before"],
        stage_1["zero_shot"],
        stage_2["teacher"],
        stage_2["student_after"],
    )
    return dict(zip(ROWS, models, strict=True))


def _run(folder: Path, domain: Path, seed: int) -> dict[str, dict[str, float | None]]:
    """Both stages, and the table of them."""
    teacher, student = (f"local-dir:{HERE / 'models' / name}" for name in ("teacher", "student"))
    tuned = folder / f"teacher-{seed}"
    common = {
        "seed": seed,
        "runs_dir": folder,
        "corpus.evaluation": domain / "evaluation",
        "classes.names": domain / "classes.txt",
        "teacher.model": teacher,
    }
    tuning = {"name": f"teacher-{seed}", "corpus.shards": domain / "labelled"}
    _promptkd(pretrain, SETTINGS / "pretrain.toml", "--overwrite", *flags(tuning | common))
    distilling = {
        "name": f"student-{seed}",
        "corpus.shards": domain / "shards",
        "classes.vectors": tuned / "class_vectors.safetensors",
        "teacher.prompts": tuned / "prompts.safetensors",
        "student.model": student,
    }
    _promptkd(distill, SETTINGS / "distill.toml", "--overwrite", *flags(distilling | common))
    return table(folder, seed)


def _make_corpora(domain: Path) -> None:
    from jobs.quickstart.domain import CLASSES, write_images

    shutil.rmtree(domain, ignore_errors=True)  # of an earlier try that did not come to its end
    per_class = TRAIN_PER_CLASS + LABELLED_PER_CLASS + TEST_PER_CLASS
    print(f"drawing {len(CLASSES) * per_class} images", flush=True)
    train, labelled, test = (domain / f"{name}_images" for name in ("train", "labelled", "test"))
    write_images(train, "domain", TRAIN_PER_CLASS, seed=1, labelled=False)
    write_images(labelled, "domain", LABELLED_PER_CLASS, seed=3, labelled=True)
    write_images(test, "domain", TEST_PER_CLASS, seed=2, labelled=True)
    names = domain / "classes.txt"
    names.write_text("\n".join(CLASSES) + "\n")
    _promptkd(shards, train, domain / "shards", "--samples", "512")
    _promptkd(shards, labelled, domain / "labelled", "--classes", names)
    _promptkd(shards, test, domain / "evaluation", "--classes", names)
    for corpus in ("shards", "evaluation", "labelled"):
        _promptkd(index, domain / corpus)


def flags(values: Mapping[str, object]) -> list[object]:
    """Options of a command, by dotted field."""
    return [word for field, value in values.items() for word in (f"--{field}", value)]


def _promptkd(command: ModuleType, *args: object) -> None:
    words = [str(arg) for arg in args]
    print(f"\n$ promptkd {command.__name__.rpartition('.')[2]} {shlex.join(words)}", flush=True)
    command.main(words)
