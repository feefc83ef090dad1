"""The whole way in minutes: images, shards, class vectors, a distilled student, predictions.

The domain is generated, and the two tiny CLIP models that meet it are shipped beside this file.
What it does are the commands that it prints.
"""

import json
import shlex
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from engine.config import Section, UserError
from engine.parse import parse
from jobs import classes, distill, evaluate, index, predict, shards

HERE = Path(__file__).parent
SETTINGS = HERE.parent / "configs" / "quickstart.toml"
TRAIN_PER_CLASS, TEST_PER_CLASS = 50, 25


@dataclass(frozen=True)
class QuickstartConfig(Section):
    """Distils a tiny CLIP over a generated domain of 48 classes, in minutes on two CPU cores."""

    seeds: tuple[int, ...] = (1,)
    """A student for each; the table shows their mean."""
    folder: str = "runs/quickstart"
    """Where images, shards and runs are kept; images and shards are made once."""


def main(args: Sequence[str]) -> None:
    config = parse(QuickstartConfig, args, prog="promptkd quickstart")
    if not config.seeds:
        raise UserError("seeds: give at least one")
    folder = Path(config.folder)
    domain = folder / "domain"
    if not (domain / "evaluation" / "corpus.parquet").exists():
        _make_corpora(domain)
    vectors = folder / "class_vectors.safetensors"
    teacher, student = (f"local-dir:{HERE / 'models' / name}" for name in ("teacher", "student"))
    names = domain / "evaluation" / "classes.txt"
    _promptkd(classes, names, vectors, "--model", teacher)
    summaries = []
    for seed in config.seeds:
        name = f"seed-{seed}"
        paths: dict[str, object] = {
            "runs_dir": folder,
            "corpus.shards": domain / "shards",
            "corpus.evaluation": domain / "evaluation",
            "classes.names": names,
            "classes.vectors": vectors,
            "teacher.model": teacher,
            "student.model": student,
        }
        flags = [word for field, value in paths.items() for word in (f"--{field}", value)]
        _promptkd(distill, SETTINGS, "--name", name, "--seed", seed, "--overwrite", *flags)
        summaries.append(json.loads((folder / name / "summary.json").read_text()))
    bundle = folder / name / "bundle.safetensors"
    _promptkd(evaluate, bundle, domain / "evaluation")
    some = sorted((domain / "test_images").rglob("000.jpg"))[::16]
    _promptkd(predict, bundle, *some, "--top", "2")
    print(f"\nMean of {len(summaries)} seeds:\n{distill.table(mean(summaries))}")


def mean(values: Sequence[Any]) -> Any:
    """Field by field, of summaries of one shape."""
    if isinstance(values[0], dict):
        return {key: mean([value[key] for value in values]) for key in values[0]}
    return values[0] if isinstance(values[0], str) else statistics.fmean(values)


def _make_corpora(domain: Path) -> None:
    from jobs.quickstart.domain import CLASSES, write_images

    shutil.rmtree(domain, ignore_errors=True)  # of an earlier try that did not come to its end
    print(f"drawing {len(CLASSES) * (TRAIN_PER_CLASS + TEST_PER_CLASS)} images", flush=True)
    train, test = domain / "train_images", domain / "test_images"
    write_images(train, "domain", TRAIN_PER_CLASS, seed=1, labelled=False)
    write_images(test, "domain", TEST_PER_CLASS, seed=2, labelled=True)
    names = domain / "classes.txt"
    names.write_text("\n".join(CLASSES) + "\n")
    _promptkd(shards, train, domain / "shards", "--samples", "512")
    _promptkd(shards, test, domain / "evaluation", "--classes", names)
    _promptkd(index, domain / "shards")
    _promptkd(index, domain / "evaluation")


def _promptkd(command: ModuleType, *args: object) -> None:
    words = [str(arg) for arg in args]
    print(f"\n$ promptkd {command.__name__.rpartition('.')[2]} {shlex.join(words)}", flush=True)
    command.main(words)
