"""Runs of student workers without Ray, over a teacher and a student as small as can be."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from tiny import clip_folder

from engine.clip.class_vectors import ClassVectors, encode_classes
from engine.clip.towers import load_clip
from engine.config import (
    ClassesConfig,
    CorpusConfig,
    RunConfig,
    StudentConfig,
    TargetsConfig,
    TeacherConfig,
    TrainConfig,
)
from engine.data.corpus import open_corpora
from engine.labels.assignment import Assignment
from engine.labels.teacher import Labels, TeacherSpec, labellings
from engine.train.worker import Task, work


def models(
    folder: Path, corpus: Path, teacher: str = "", embed_dim: int = 8, classes: int = 12
) -> dict[str, str]:
    """A student under `folder`, a teacher, and its class vectors: what config_of() starts from."""
    teacher = teacher or clip_folder(folder / "teacher", seed=1, embed_dim=embed_dim)
    student = clip_folder(folder / "student")
    vectors, names = folder / "vectors.safetensors", tuple(f"class {n}" for n in range(classes))
    encode_classes(load_clip(teacher, "", "teacher."), names, ("{}",)).save(vectors)
    return {
        "teacher.model": teacher,
        "student.model": student,
        "classes.vectors": str(vectors),
        "corpus.shards": str(corpus),
        "corpus.evaluation": str(corpus),
    }


def config_of(runs: Path | str, name: str, changes: dict[str, Any]) -> RunConfig:
    """Resolved: of the shared corpus of 24 samples, 3 passes, 9 steps, each with a record.
    `changes` go by dotted field."""
    config = RunConfig(
        name=name,
        runs_dir=str(runs),
        device="cpu",
        corpus=CorpusConfig(block_samples=5, window_blocks=2, lanes=2),
        classes=ClassesConfig(names="unused"),
        teacher=TeacherConfig(precision="fp32", gpus=0, threads=1),
        student=StudentConfig(precision="fp32", gpus=0, depth=2, threads=1),
        targets=TargetsConfig(source="auto"),
        train=TrainConfig(
            passes=3,
            batch=8,
            lr=0.1,
            lr_batch=0,
            reduction="batchmean",
            kd_weight=1.0,
            log_steps=1,
            judge_images=16,
        ),
    )
    sections: dict[str, dict[str, Any]] = {}
    for field, value in changes.items():
        section, _, name = field.rpartition(".")
        sections.setdefault(section, {})[name] = value
    fields = sections.pop("", {})
    for section, told in sections.items():
        fields[section] = dataclasses.replace(getattr(config, section), **told)
    return dataclasses.replace(config, **fields)  # at once: sections are checked together


def assignment_of(config: RunConfig, classes: ClassVectors | None = None) -> Assignment:
    """How the labels of a run are made, as its driver would tell; of stored class vectors, unless
    others are given."""
    classes = classes or ClassVectors.load(Path(config.classes.vectors))
    labels = Labels.of(config, [TeacherSpec(config.teacher, classes)], features=False)
    corpora = open_corpora(config.corpus)
    told, listed = labellings(labels, corpora, "cpu"), corpora["shards"].listed
    samples = listed.fingerprint if listed else ""
    return Assignment(config, labels, told, bool(config.targets.store), samples)


def work_all(rank: int, world: int, runs: str, told: dict[str, list]) -> dict[str, Any]:
    """What the workers of some runs tell, one run after another: by name, where its labels come
    from, and its changes. What a run is stopped by is told as `error`."""
    outcomes: dict[str, Any] = {}
    for name, (source, changes) in told.items():
        config = config_of(runs, name, changes)
        config.folder.mkdir(parents=True, exist_ok=True)
        task = Task(config, assignment_of(config), None, source)
        try:
            outcomes[name] = work(task, torch.device("cpu"))
        except RuntimeError as error:
            outcomes[name] = {"error": str(error)}
    return outcomes


def records(folder: Path) -> list[dict[str, Any]]:
    """Of training steps."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record for record in lines if record["kind"] == "train"]


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in records(folder)]
