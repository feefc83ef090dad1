"""The quickstart's domain, small, and whole runs over it."""

import json
from pathlib import Path

from engine.config import RunConfig
from engine.data.shards import write_shards
from engine.index import index
from engine.parse import parse
from jobs.quickstart import HERE
from jobs.quickstart.domain import CLASSES, write_images

PASSES = 2


def write_domain(folder: Path) -> Path:
    """A small quickstart domain, sharded and indexed, with one image that cannot be decoded."""
    write_images(folder / "train_images", "domain", 4, seed=1, labelled=False)
    write_images(folder / "test_images", "domain", 2, seed=2, labelled=True)
    broken = folder / "train_images" / "00007.jpg"
    broken.write_bytes(broken.read_bytes().replace(b"\xff\xdb", b"\xff\xfe"))  # no tables
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    for images, shards, names in (("train", "shards", None), ("test", "evaluation", CLASSES)):
        write_shards(folder / f"{images}_images", folder / shards, names, 100, False)
        index(str(folder / shards))
    return folder


def config_of(domain: Path, runs: Path, name: str, *flags: str) -> RunConfig:
    """Of a run over it."""
    words = {
        "name": name,
        "runs_dir": runs,
        "corpus.shards": domain / "shards",
        "corpus.evaluation": domain / "evaluation",
        "corpus.block_samples": 32,
        "corpus.window_blocks": 2,
        "classes.names": domain / "classes.txt",
        "teacher.model": f"local-dir:{HERE / 'models' / 'teacher'}",
        "teacher.precision": "fp32",
        "student.model": f"local-dir:{HERE / 'models' / 'student'}",
        "student.depth": 4,
        "train.passes": PASSES,
        "train.batch": 32,
        "train.optimizer": "adamw",
        "train.lr": 2e-3,
        "train.log_steps": 1,
        "train.checkpoint_steps": 5,
    }
    args = [str(word) for field, value in words.items() for word in (f"--{field}", value)]
    return parse(RunConfig, [*args, *flags], prog="test")


def losses(folder: Path) -> list[float]:
    """Of the training steps of a run."""
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if record["kind"] == "train"]
