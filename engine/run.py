"""The driver of a run: check, place, start, watch, finish."""

import dataclasses
import json
import os
import platform
import shutil
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
import torch
from ray.train import TrainingFailedError, WorkerGroupError

from engine.clip.class_vectors import ClassVectors, encode_classes
from engine.clip.names import read_names
from engine.clip.towers import check_weights, half_precision, input_pixels, load_clip
from engine.config import RunConfig, UserError, absolute, to_dict
from engine.labels.pool import open_corpora, start_pool
from engine.progress import Watch, say
from engine.train.gang import Task, run_gang
from engine.train.schedule import effective_weight

__all__ = ["check", "distill"]

# Ray's own dashboards, usage reports and state exports are of no use to a run, and slow its start.
_QUIET_RAY = {
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "RAY_TRAIN_ENABLE_STATE_ACTOR_RECONCILIATION": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
}
_PACKAGES = ("torch", "open_clip_torch", "deepspeed", "ray", "nvidia-dali-cuda130", "numpy")


def distill(config: RunConfig) -> dict[str, Any]:
    """Runs a distillation to its end and gives what its `summary.json` says.

    Raises UserError for what the user can mend, before any model is built; RuntimeError where
    workers fail for good.
    """
    config = absolute(config)
    names = check(config)
    folder = _new_folder(config)
    started = time.perf_counter()
    joined = _start_ray(config)
    try:
        config = _resolved(config)
        _write(folder / "config.json", _record(config))
        classes, zero_shot = _class_vectors(config, names)
        weight = effective_weight(config.train, len(names))
        say(f"{len(names)} classes; effective weight of the KL: {weight:g}")
        streams = config.targets.source == "stream"
        teachers = start_pool(config, classes) if streams else []
        _say_placement(config)
        with Watch(folder / "metrics.jsonl"):
            told = run_gang(Task(config, classes, zero_shot, teachers))
    except TrainingFailedError as failure:
        raise _plain(failure) from failure
    finally:
        if not joined:
            ray.shutdown()
    summary = _summary(config, told, time.perf_counter() - started)
    _write(folder / "ledger.json", told["ledger"])
    _write(folder / "summary.json", summary)
    return summary


def check(config: RunConfig) -> tuple[str, ...]:
    """Checks all that can be checked without a model; gives the class names. Raises UserError."""
    names = read_names(config.classes.names)
    if config.classes.vectors:
        stored = ClassVectors.load(Path(config.classes.vectors))
        if stored.names != names:
            raise UserError(
                f"classes.names: {config.classes.names} does not fit classes.vectors: "
                + _difference(names, stored.names)
            )
    open_corpora(config)
    check_weights(config.teacher.model, config.teacher.weights, "teacher")
    check_weights(config.student.model, config.student.weights, "student")
    if config.targets.source == "inline":
        pixels = input_pixels(config.teacher.model), input_pixels(config.student.model)
        if pixels[0] != pixels[1]:
            raise UserError(
                "targets.source: inline needs teacher and student to take images of one size, "
                f"these take {pixels[0]} and {pixels[1]} pixels; use stream"
            )
    return names


def _difference(names: tuple[str, ...], stored: tuple[str, ...]) -> str:
    if len(names) != len(stored):
        return f"{len(names)} names, {len(stored)} vectors"
    row = next(i for i, pair in enumerate(zip(names, stored, strict=True)) if pair[0] != pair[1])
    return f"line {row + 1} is {names[row]!r}, the vectors have {stored[row]!r}"


def _new_folder(config: RunConfig) -> Path:
    folder = config.folder
    if folder.exists():
        if not config.overwrite:
            raise UserError(f"name: {folder} exists already; choose another name, or --overwrite")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return folder


def _start_ray(config: RunConfig) -> bool:
    """Joins the cluster that is named, or starts a local one; True if it was there before."""
    for name, value in _QUIET_RAY.items():
        os.environ.setdefault(name, value)
    if ray.is_initialized():
        return True
    address = config.ray.address or os.environ.get("RAY_ADDRESS", "")
    if address:
        say(f"joining the Ray cluster at {address}")
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, ray.exceptions.AuthenticationError) as error:
            raise UserError(
                f"ray.address: no Ray cluster answers at {address} ({error}); "
                "on another cluster's token, set RAY_AUTH_MODE and RAY_AUTH_TOKEN"
            ) from None
        return True
    say("starting Ray on this machine")
    wanted = config.student.workers * config.student.cpus
    if config.targets.source == "stream":
        wanted += config.teacher.actors * config.teacher.cpus
    ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, int(-(-wanted // 1))),
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    return False


def _resolved(config: RunConfig) -> RunConfig:
    """Replaces every "auto" by what this cluster has, and says what was chosen."""
    gpus = ray.cluster_resources().get("GPU", 0)
    device = config.device if config.device != "auto" else ("cuda" if gpus else "cpu")
    if device == "cuda" and not gpus:
        raise UserError("device: cuda is asked for, but the Ray cluster has no GPU")
    kind = torch.device(device)
    share = 1.0 if device == "cuda" else 0.0
    student_precision = config.student.precision
    if student_precision == "auto":
        student_precision = "bf16" if device == "cuda" else "fp32"
    resolved = dataclasses.replace(
        config,
        device=device,
        teacher=dataclasses.replace(
            config.teacher,
            precision=half_precision(config.teacher.precision, kind),
            gpus=share if config.teacher.gpus < 0 else config.teacher.gpus,
        ),
        student=dataclasses.replace(
            config.student,
            precision=student_precision,
            gpus=share if config.student.gpus < 0 else config.student.gpus,
        ),
    )
    say(
        f"device {device}; teacher in {resolved.teacher.precision}, "
        f"student tower in {resolved.student.precision}"
    )
    return resolved


def _class_vectors(
    config: RunConfig, names: tuple[str, ...]
) -> tuple[ClassVectors, ClassVectors | None]:
    """The teacher's class vectors, stored or made now; and the student's own, for the zero-shot
    accuracy it starts from, where there is an evaluation."""
    template = config.classes.template
    if config.classes.vectors:
        classes = ClassVectors.load(Path(config.classes.vectors))
    else:
        say(f"encoding {len(names)} class names with the teacher's text tower")
        clip = load_clip(config.teacher.model, config.teacher.weights, "teacher")
        classes = encode_classes(clip, names, template)
    classes.save(config.folder / "class_vectors.safetensors")
    if not config.corpus.evaluation:
        return classes, None
    clip = load_clip(config.student.model, config.student.weights, "student")
    return classes, encode_classes(clip, names, template)


def _say_placement(config: RunConfig) -> None:
    student, teacher = config.student, config.teacher
    wanted = {"GPU": student.workers * student.gpus, "CPU": student.workers * student.cpus}
    text = f"{student.workers} student workers (ZeRO-{student.zero_stage})"
    if config.targets.source == "stream":
        wanted["GPU"] += teacher.actors * teacher.gpus
        wanted["CPU"] += teacher.actors * teacher.cpus
        text = f"{teacher.actors} teacher actors, {text}"
    say(f"starting {text}")
    deadline = time.monotonic() + config.ray.start_timeout_s
    while lacking := _lacking(wanted):
        if time.monotonic() > deadline:
            raise UserError(
                f"ray.start_timeout_s: the cluster lacks {lacking} after "
                f"{config.ray.start_timeout_s:.0f} s; ask for less, or add nodes"
            )
        say(f"waiting for the cluster: it lacks {lacking}")
        time.sleep(5)


def _lacking(wanted: dict[str, float]) -> str:
    have = ray.cluster_resources()
    short = {kind: n for kind, n in wanted.items() if n > have.get(kind, 0)}
    return ", ".join(f"{n:g} {kind} (has {have.get(kind, 0):g})" for kind, n in short.items())


def _plain(failure: TrainingFailedError) -> Exception:
    """The worker's own error, without Ray Train's wrapping."""
    if not isinstance(failure, WorkerGroupError):
        return RuntimeError(f"Ray Train failed: {failure}")
    rank, error = min(failure.worker_failures.items())
    if isinstance(error, UserError):
        return error
    return RuntimeError(f"student worker {rank} failed: {type(error).__name__}: {error}")


def _summary(config: RunConfig, told: dict[str, Any], wall_s: float) -> dict[str, Any]:
    train_s = told["train_s"]
    nothing = {"base": None, "novel": None, "hm": None, "agreement": None}
    scores = {
        model: told["scores"].get(model, nothing)
        for model in ("student_before", "student_after", "teacher")
    }
    trained = told["ledger"]["trained"]
    return {
        "name": config.name,
        "images_per_second": trained / train_s if train_s else 0.0,
        "steps": told["steps"],
        "samples": trained,
        "wait_fraction": {
            "labels": told["waited_labels_s"] / train_s if train_s else 0.0,
            "data": told["waited_data_s"] / train_s if train_s else 0.0,
        },
        **scores,
        "train_s": train_s,
        "wall_s": wall_s,
    }


def _record(config: RunConfig) -> dict[str, Any]:
    """The resolved config, with what it ran on."""
    return to_dict(config) | {
        "versions": {"python": platform.python_version()} | {p: version(p) for p in _PACKAGES},
        "git_sha": _git_sha(),
    }


def _git_sha() -> str | None:
    here = Path(__file__).parent
    command = ["git", "rev-parse", "--verify", "HEAD"]
    try:
        found = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return found.stdout.strip() or None


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
