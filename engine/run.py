"""The driver of a run: check, start, place, watch, finish."""

import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import ray
import torch
from ray.train import TrainingFailedError, WorkerGroupError

from engine import cluster, run_folder
from engine.clip.class_vectors import ClassVectors, encode_classes, own_templates
from engine.clip.templates import read_templates
from engine.clip.towers import Clip, load_clip
from engine.config import RunConfig, RunFailed, UserError, absolute
from engine.data.corpus import open_corpora
from engine.labels.pool import start_pool
from engine.preflight import check
from engine.progress import Watch, say
from engine.train import checkpoint
from engine.train.evaluate import Score
from engine.train.gang import run_gang
from engine.train.ledger import Ledger
from engine.train.schedule import effective_weight, peak_rate
from engine.train.worker import Task

__all__ = ["distill"]


def distill(config: RunConfig) -> dict[str, Any]:
    """Runs a distillation to its end and gives what its `summary.json` says.

    Raises UserError for what the user can mend, before any model is built, and RuntimeError where
    the student workers fail for good.
    """
    started = time.perf_counter()
    config = absolute(config)
    names = check(config)
    ours = cluster.start(config.ray.address, cluster.wanted(config)["CPU"])
    try:
        config = cluster.resolve(config)
        cluster.wait_for_room(config, grows=not ours)
        classes, zero_shot = _class_vectors(config, names)
        folder = run_folder.create(config)
        classes.save(folder / "class_vectors.safetensors")
        streams = config.targets.source == "stream"
        teachers = start_pool(config, classes) if streams else []
        say(_recipe(config, len(names)))
        say(_placement(config))
        with Watch(folder / "metrics.jsonl"):
            told = run_gang(Task(config, classes, zero_shot, teachers))
    except TrainingFailedError as failure:
        run_folder.write(config.folder / "ledger.json", _ledger_so_far(config))
        raise _plain(failure, config.folder / "failure.txt") from failure
    except KeyboardInterrupt:
        if (config.folder / "metrics.jsonl").exists():
            run_folder.write(config.folder / "ledger.json", _ledger_so_far(config))
        raise
    finally:
        if ours:
            ray.shutdown()
    if why := told.get("spoilt"):
        run_folder.write(folder / "ledger.json", _ledger_so_far(config))
        raise RunFailed(f"{why}. What was learned is in {folder / 'checkpoints'}")
    if why := told.get("collapsed"):
        run_folder.write(folder / "ledger.json", _ledger_so_far(config))
        raise RunFailed(
            f"the student has collapsed, after {config.train.rollbacks} roll-backs: {why}. "
            "A smaller train.lr, a longer train.warmup_steps or a smaller train.kd_weight may help"
        )
    summary = _summary(config.name, told, time.perf_counter() - started)
    run_folder.write(folder / "ledger.json", told["ledger"])
    run_folder.write(folder / "summary.json", summary)
    return summary


def _class_vectors(
    config: RunConfig, names: tuple[str, ...]
) -> tuple[ClassVectors, ClassVectors | None]:
    """The teacher's class vectors, stored or made now; and the student's own, for the zero-shot
    accuracy it starts from, where there is an evaluation."""
    told = config.teacher
    teacher = load_clip(told.model, told.weights, "teacher.", told.prompts)
    student = load_clip(config.student.model, config.student.weights, "student.")
    _require_like_scales(teacher, student)
    if torch.cuda.is_available():
        teacher.text.to("cuda")
        student.text.to("cuda")
    templates = read_templates(config.classes.template)
    if config.classes.vectors:
        classes = ClassVectors.load(Path(config.classes.vectors))
        if classes.teacher != teacher.fingerprint:
            raise UserError(
                f"classes.vectors: {config.classes.vectors} was made by another teacher than "
                f"teacher.model, teacher.weights and teacher.prompts name ({told.model}, "
                f"{told.weights or '-'}, {told.prompts or 'no prompts'})"
            )
    else:
        say(f"encoding {len(names)} class names with the teacher's text tower")
        classes = encode_classes(teacher, names, own_templates(teacher, templates))
    if not config.corpus.evaluation:
        return classes, None
    say(f"encoding {len(names)} class names with the student's text tower, for its zero-shot score")
    return classes, encode_classes(student, names, templates)


def _require_like_scales(teacher: Clip, student: Clip) -> None:
    """The KL between logits of scale 100 and of scale 1 would teach temperature, not classes."""
    low, high = sorted((teacher.logit_scale, student.logit_scale))
    if high > 10 * low:
        raise UserError(
            f"student.weights: the logit scale of {student.name} is {student.logit_scale:.3g}, "
            f"that of teacher.weights ({teacher.name}) {teacher.logit_scale:.3g}; these cannot be "
            "distilled into each other. CLIP's is about 100: is one of them not trained?"
        )


def _recipe(config: RunConfig, classes: int) -> str:
    train = config.train
    return (
        f"preset {config.preset}: {train.optimizer} at learning rate {peak_rate(train):g}, batch "
        f"{train.batch}; effective weight of the KL {effective_weight(train, classes):g}; keeps "
        + ("the last weights" if train.selection == "last" else "the best pass on the test images")
    )


def _placement(config: RunConfig) -> str:
    student, teacher = config.student, config.teacher
    inline = config.targets.source == "inline"
    labels = "each with a teacher inside" if inline else f"and {teacher.actors} teacher actors"
    return f"starting {student.workers} student workers (ZeRO-{student.zero_stage}) {labels}"


def _plain(failure: TrainingFailedError, story: Path) -> Exception:
    """The worker's own error, without Ray Train's wrapping; its tracebacks go to file `story`."""
    story.write_text(f"{failure}\n")
    if not isinstance(failure, WorkerGroupError):
        return RunFailed(f"Ray Train failed; {story} tells how")
    rank, error = min(failure.worker_failures.items(), key=lambda item: _blame(*item))
    if isinstance(error, UserError):
        return error
    why = f"{type(error).__name__}: {error}"
    return RunFailed(f"student worker {rank} failed: {why} ({story} tells where)")


def _blame(rank: int, error: BaseException) -> tuple[bool, bool, int]:
    """Sorts the cause first: when a worker fails, the others' collectives fail with it."""
    follows = "Connection closed" in str(error) or "NCCL" in str(error)
    return not isinstance(error, UserError), follows, rank


def _ledger_so_far(config: RunConfig) -> dict[str, Any]:
    try:
        saved = checkpoint.load_latest(config.folder / "checkpoints")
    except ValueError as damage:  # told beside the failure that brought us here
        say(f"warning: {damage}; ledger.json tells of no step")
        saved = None
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
        "data": told["data"],
        "skipped": told["ledger"]["skipped"],
        "evaluation": told["evaluation"],
        "selection": told["selection"],
        "rollbacks": told["rollbacks"],
        "train_s": train_s,
        "wall_s": wall_s,
    }
