"""The driver of a run: check, start, place, watch, finish."""

import json
import platform
import shutil
import subprocess
import time
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ray
from ray.train import TrainingFailedError, WorkerGroupError

from engine import cluster
from engine.clip.class_vectors import ClassVectors, encode_classes
from engine.clip.towers import load_clip
from engine.config import RunConfig, UserError, absolute, to_dict
from engine.data.corpus import open_corpora
from engine.labels.pool import start_pool
from engine.preflight import check
from engine.progress import Watch, say
from engine.train import checkpoint
from engine.train.evaluate import Score
from engine.train.gang import run_gang
from engine.train.ledger import Ledger
from engine.train.schedule import effective_weight
from engine.train.worker import Task

__all__ = ["distill"]

_PACKAGES = ("torch", "open_clip_torch", "deepspeed", "ray", "nvidia-dali-cuda130", "numpy")


def distill(config: RunConfig) -> dict[str, Any]:
    """Runs a distillation to its end and gives what its `summary.json` says.

    Raises UserError for what the user can mend, before any model is built, and RuntimeError where
    the student workers fail for good.
    """
    started = time.perf_counter()
    config = absolute(config)
    names = check(config)
    ours = cluster.start(config)
    try:
        config = cluster.resolve(config)
        cluster.wait_for_room(config, grows=not ours)
        classes, zero_shot = _class_vectors(config, names)
        folder = _new_folder(config)
        classes.save(folder / "class_vectors.safetensors")
        streams = config.targets.source == "stream"
        teachers = start_pool(config, classes) if streams else []
        say(f"effective weight of the KL: {effective_weight(config.train, len(names)):g}")
        say(_placement(config))
        with Watch(folder / "metrics.jsonl"):
            told = run_gang(Task(config, classes, zero_shot, teachers))
    except TrainingFailedError as failure:
        _write(config.folder / "ledger.json", _ledger_so_far(config))
        raise _plain(failure) from failure
    finally:
        if ours:
            ray.shutdown()
    summary = _summary(config.name, told, time.perf_counter() - started)
    _write(folder / "ledger.json", told["ledger"])
    _write(folder / "summary.json", summary)
    return summary


def _new_folder(config: RunConfig) -> Path:
    folder = config.folder
    if config.overwrite and folder.exists():
        shutil.rmtree(folder)
    try:
        folder.mkdir(parents=True)  # whoever makes it owns it
    except FileExistsError:
        raise UserError(f"name: {folder} has been taken by another run meanwhile") from None
    about = {"versions": _versions(), "git_sha": _git_sha()}
    _write(folder / "config.json", to_dict(config) | about)
    return folder


def _class_vectors(
    config: RunConfig, names: tuple[str, ...]
) -> tuple[ClassVectors, ClassVectors | None]:
    """The teacher's class vectors, stored or made now; and the student's own, for the zero-shot
    accuracy it starts from, where there is an evaluation."""
    clip = load_clip(config.teacher.model, config.teacher.weights, "teacher.")
    if config.classes.vectors:
        classes = ClassVectors.load(Path(config.classes.vectors))
        if classes.teacher != clip.fingerprint:
            raise UserError(
                f"classes.vectors: {config.classes.vectors} was made by another teacher than "
                f"teacher.model ({config.teacher.model} {config.teacher.weights})"
            )
    else:
        say(f"encoding {len(names)} class names with the teacher's text tower")
        classes = encode_classes(clip, names, config.classes.template)
    if not config.corpus.evaluation:
        return classes, None
    clip = load_clip(config.student.model, config.student.weights, "student.")
    return classes, encode_classes(clip, names, classes.template)


def _placement(config: RunConfig) -> str:
    student, teacher = config.student, config.teacher
    inline = config.targets.source == "inline"
    labels = "each with a teacher inside" if inline else f"and {teacher.actors} teacher actors"
    return f"starting {student.workers} student workers (ZeRO-{student.zero_stage}) {labels}"


def _plain(failure: TrainingFailedError) -> Exception:
    """The worker's own error, without Ray Train's wrapping."""
    if not isinstance(failure, WorkerGroupError):
        return RuntimeError(f"Ray Train failed: {failure}")
    rank, error = min(failure.worker_failures.items(), key=lambda item: _blame(*item))
    if isinstance(error, UserError):
        return error
    return RuntimeError(f"student worker {rank} failed: {type(error).__name__}: {error}")


def _blame(rank: int, error: BaseException) -> tuple[bool, bool, int]:
    """Sorts the cause first: when a worker fails, the others' collectives fail with it."""
    follows = "Connection closed" in str(error) or "NCCL" in str(error)
    return not isinstance(error, UserError), follows, rank


def _ledger_so_far(config: RunConfig) -> dict[str, Any]:
    saved = checkpoint.load_latest(config.folder / "checkpoints")
    planned = config.train.passes * open_corpora(config.corpus)["shards"].samples
    return (saved.ledger if saved else Ledger()).statement(planned)


def _summary(name: str, told: dict[str, Any], wall_s: float) -> dict[str, Any]:
    unknown = {field.name: None for field in fields(Score)}
    models = ("student_before", "student_after", "teacher")
    train_s, trained = told["train_s"], told["ledger"]["trained"]
    return {
        "name": name,
        "images_per_second": trained / train_s,
        "steps": told["steps"],
        "samples": trained,
        "wait_fraction": {
            "labels": told["waited_labels_s"] / train_s,
            "data": told["waited_data_s"] / train_s,
        },
        **{model: told["scores"].get(model, unknown) for model in models},
        "evaluation": told["evaluation"],
        "train_s": train_s,
        "wall_s": wall_s,
    }


def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {p: version(p) for p in _PACKAGES}


def _git_sha() -> str | None:
    """Of the source tree, where there is one."""
    command = ["git", "rev-parse", "--verify", "HEAD"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return found.stdout.strip() or None


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
