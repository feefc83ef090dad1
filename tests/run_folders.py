"""Run folders as runs leave them, without a run."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from engine.clip.class_vectors import ClassVectors
from engine.config import CorpusConfig, RunConfig, StudentConfig, TeacherConfig, to_dict

START = 1_795_305_600.0
CLASSES = ("daisy", "oak_tree", "tulip")


def begun(folder: Path, shards: object = "nowhere", classes: tuple[str, ...] = CLASSES) -> Path:
    """The folder of a run that has just been begun."""
    folder.mkdir(parents=True)
    config = RunConfig(
        name=folder.name,
        runs_dir=str(folder.parent),
        corpus=CorpusConfig(shards=str(shards)),
        student=StudentConfig(model="ViT-B-16-quickgelu", weights="openai"),
        teacher=TeacherConfig(model="ViT-L-14-quickgelu", weights="openai"),
    )
    life = {"started": START, "host": "here", "versions": {"torch": "2.15.0"}, "git_sha": "abc"}
    write(folder / "config.json", to_dict(config) | {"lives": [life]})
    vectors = np.eye(len(classes), 8, dtype=np.float32)
    stored = ClassVectors(classes, vectors, ("a {}.",), "t" * 64, 100.0)
    stored.save(folder / "class_vectors.safetensors")
    return folder


def write(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value))


def append(file: Path, *records: dict[str, Any]) -> None:
    file.parent.mkdir(exist_ok=True)
    with open(file, "a") as lines:
        lines.writelines(json.dumps(record) + "\n" for record in records)


def trained(folder: Path, steps: Iterable[int], **changes: Any) -> None:
    """Training records, two seconds a step."""
    told = [
        {
            **{"time": START + 2 * step, "kind": "train", "step": step, "steps": 20, "pass_": 0},
            **{"loss": 3 / step, "agreement": 1 - 0.5 / step, "images_per_second": 100.0},
            **{"waited_labels_s": 0.5 * step, "waited_data_s": 0.1 * step},
        }
        | changes
        for step in steps
    ]
    append(folder / "metrics.jsonl", *told)


def probe(step: int, *samples: tuple[int, int, int, float, int, float, float]) -> dict[str, Any]:
    """Of samples: shard, position, teacher's class and p, student's class and p, entropy."""
    names = ("shard", "position", "teacher", "teacher_p", "student", "student_p", "entropy")
    columns = dict(zip(names, map(list, zip(*samples, strict=True)), strict=True))
    return {"time": START + 2 * step, "kind": "probe", "step": step, "view": 0, **columns}
