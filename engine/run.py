"""The driver of a run: check, start, place, watch, finish. Several students may share a run."""

import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from ray.train import TrainingFailedError, WorkerGroupError

from engine import cluster, run_folder
from engine.announce import placement, recipe
from engine.clip.class_vectors import ClassVectors, encode_classes
from engine.clip.templates import read_templates
from engine.clip.towers import load_clip
from engine.config import RunConfig, RunFailed, UserError, absolute
from engine.data.corpus import open_corpora
from engine.labels.scaling import Pool
from engine.preflight import check
from engine.progress import Watch, say
from engine.staff import arranged
from engine.together import check_together
from engine.train import checkpoint
from engine.train.evaluate import Score
from engine.train.gang import run_gang
from engine.train.ledger import Ledger
from engine.train.worker import Task

__all__ = ["distill", "distill_students"]

Summary = dict[str, Any]


def distill(config: RunConfig) -> Summary:
    """Runs a distillation to its end and gives what its `summary.json` says.

    Raises UserError for what the user can mend, before any model is built, and RunFailed where the
    student workers fail for good.
    """
    (outcome,) = distill_students({config.name: config}).values()
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def distill_students(configs: Mapping[str, RunConfig]) -> dict[str, Summary | Exception]:
    """Distils one teacher, or one team of them, into several students at once: each (block, view)
    is labelled once for all. The configs differ in `student`, `train` and run folder alone.

    Gives each student's summary, or why it has failed, which disturbs no other. Raises UserError as
    distill() does.
    """
    started = time.perf_counter()
    configs = {name: absolute(config) for name, config in configs.items()}
    check_together(configs)
    first, *others = configs.values()
    names = check(first)
    for other in others:
        check(other)
    for config in configs.values():
        run_folder.check_free(config)
    may_stream = first.targets.source in ("auto", "stream")
    students = [config.student for config in configs.values()]
    needed = cluster.wanted(first, students, may_stream)["CPU"]
    with ExitStack() as stack:
        stack.enter_context(cluster.session(first.ray.address, needed))
        configs = {name: cluster.resolve(config) for name, config in configs.items()}
        assignment, choice = arranged([*configs.values()], names)
        streams = choice.source == "stream"
        students = [config.student for config in configs.values()]
        cluster.wait_for_room(assignment.config, students, streams)
        zero_shots = {name: _zero_shot(config, names) for name, config in configs.items()}
        for config in configs.values():
            assignment.labels.teachers[0].classes.save(
                run_folder.create(config) / "class_vectors.safetensors"
            )
        pool = stack.enter_context(closing(Pool(assignment))) if streams else None
        tasks = {
            name: Task(
                config,
                assignment,
                zero_shots[name],
                choice.source,
                pool.roster if pool else None,
                name,
                len(configs) > 1,
            )
            for name, config in configs.items()
        }
        for config in configs.values():
            say(recipe(config, len(names)))
        say(placement([*configs.values()], choice))
        return _train(tasks, pool, started)


def _zero_shot(config: RunConfig, names: tuple[str, ...]) -> ClassVectors | None:
    """The student's own class vectors, for the zero-shot accuracy it starts from, where there is an
    evaluation."""
    if not config.corpus.evaluation:
        return None
    say(f"encoding {len(names)} class names with the student's text tower, for its zero-shot score")
    student = load_clip(config.student.model, config.student.weights, "student.")
    if torch.cuda.is_available():
        student.text.to("cuda")
    return encode_classes(student, names, read_templates(config.classes.template))


def _train(
    tasks: Mapping[str, Task], pool: Pool | None, started: float
) -> dict[str, Summary | Exception]:
    with Watch({name: task.config.folder / "metrics.jsonl" for name, task in tasks.items()}):
        if len(tasks) == 1:  # Ray Train hears Ctrl-C in the main thread alone
            return {name: _outcome(task, pool, started) for name, task in tasks.items()}
        outcomes: dict[str, Summary | Exception] = {}

        def train(name: str) -> None:
            try:
                outcomes[name] = _outcome(tasks[name], pool, started)
            except Exception as error:  # the other students are to end in peace
                outcomes[name] = error

        # Daemons, since one that waits for Ray would keep an interrupted process alive.
        threads = [threading.Thread(target=train, args=(name,), daemon=True) for name in tasks]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.5)
        except KeyboardInterrupt:
            for task in tasks.values():
                _write_ledger(task.config)
            raise
        return {name: outcomes[name] for name in tasks}


def _outcome(task: Task, pool: Pool | None, started: float) -> Summary | Exception:
    """Trains a student to its end, and writes what became of it."""
    config = task.config
    try:
        told = run_gang(task)
    except TrainingFailedError as failure:
        _write_ledger(config)
        return _plain(failure, config.folder / "failure.txt")
    except KeyboardInterrupt:
        _write_ledger(config)
        raise
    if why := told.get("spoilt"):
        _write_ledger(config)
        return RunFailed(f"{why}. What was learned is in {config.folder / 'checkpoints'}")
    if why := told.get("collapsed"):
        _write_ledger(config)
        return RunFailed(
            f"the student has collapsed, after {config.train.rollbacks} roll-backs: {why}. "
            "A smaller train.lr, a longer train.warmup_steps or a smaller train.kd_weight may help"
        )
    told["labels"] |= {"source": task.source}
    if pool:
        told["labels"] |= pool.statement()
    summary = _summary(config.name, told, time.perf_counter() - started)
    run_folder.write(config.folder / "ledger.json", told["ledger"])
    run_folder.write(config.folder / "summary.json", summary)
    return summary


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


def _write_ledger(config: RunConfig) -> None:
    """Of a run that has come to no good end: what its last checkpoint says."""
    if not (config.folder / "metrics.jsonl").exists():  # it had not begun
        return
    try:
        saved = checkpoint.load_latest(config.folder / "checkpoints")
    except ValueError as damage:  # told beside the failure that brought us here
        say(f"warning: {damage}; ledger.json tells of no step")
        saved = None
    planned = config.train.passes * open_corpora(config.corpus)["shards"].samples
    statement = (saved.ledger if saved else Ledger()).statement(planned)
    run_folder.write(config.folder / "ledger.json", statement)


def _summary(name: str, told: dict[str, Any], wall_s: float) -> Summary:
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
        "labels": told["labels"],
        "skipped": told["ledger"]["skipped"],
        "evaluation": told["evaluation"],
        "selection": told["selection"],
        "rollbacks": told["rollbacks"],
        "train_s": train_s,
        "wall_s": wall_s,
    }
