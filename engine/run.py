"""The driver of a run: check, start, place, watch, finish. Several students may share a run.

A run may have several lives, each with a driver of its own: --resume begins the next one.
"""

import dataclasses
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from ray.train import TrainingFailedError, WorkerGroupError

from engine import cluster, lease, run_folder
from engine.announce import placement, recipe
from engine.clip.class_vectors import ClassVectors, encode_classes
from engine.clip.templates import read_templates
from engine.clip.towers import load_clip
from engine.config import Drained, RunConfig, RunFailed, UserError, absolute
from engine.data.corpus import open_corpora
from engine.labels.scaling import Pool
from engine.preflight import check
from engine.progress import Watch, say
from engine.sigterm import Sigterm
from engine.staff import arranged
from engine.telemetry import Recorder
from engine.together import check_together
from engine.train import checkpoint
from engine.train.evaluate import Score
from engine.train.gang import run_gang
from engine.train.ledger import Ledger
from engine.train.stops import Stop
from engine.train.worker import Task

__all__ = ["distill", "distill_students"]

Summary = dict[str, Any]
Outcome = Summary | Exception | Drained


def distill(config: RunConfig, resume: bool = False) -> Summary:
    """Runs a distillation to its end and gives what its `summary.json` says. To `resume` is to go
    on from the newest checkpoint of its folder; of a run that has ended, only the summary is given.

    Raises UserError for what the user can mend, before any model is built, RunFailed where the
    student workers fail for good, and Drained on SIGTERM.
    """
    if resume:
        run_folder.require_begun(config)
    (outcome,) = distill_students({config.name: config}, resume).values()
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


def distill_students(configs: Mapping[str, RunConfig], resume: bool = False) -> dict[str, Outcome]:
    """Distils one teacher, or one team of them, into several students at once: each (block, view)
    is labelled once for all. The configs differ in `student`, `train` and run folder alone. To
    `resume` is to go on with those that have begun and not ended, and to begin the others.

    Gives each student's summary, or why it has failed, which disturbs no other. Raises UserError
    and Drained as distill() does.
    """
    configs = {name: absolute(config) for name, config in configs.items()}
    check_together(configs)
    with ExitStack() as stack:
        sigterm = stack.enter_context(Sigterm())
        leases = {}
        for name, config in configs.items():
            run_folder.check(config, resume)
            if config.folder.exists() and not (resume and run_folder.ended(config)):
                leases[name] = stack.enter_context(closing(lease.take(config.folder)))
        # Known for good only now: the driver that had the lease may have brought it to its end.
        summaries = {
            name: run_folder.ended(one) if resume else None for name, one in configs.items()
        }
        outcomes: dict[str, Outcome] = {name: one for name, one in summaries.items() if one}
        for name in outcomes:
            say(f"{configs[name].folder} has ended already")
        if left := {name: one for name, one in configs.items() if name not in outcomes}:
            outcomes |= _distill(left, resume, leases, sigterm, stack)
    return {name: outcomes[name] for name in configs}


def _distill(
    configs: dict[str, RunConfig],
    resume: bool,
    leases: dict[str, lease.Lease],
    sigterm: Sigterm,
    stack: ExitStack,
) -> dict[str, Outcome]:
    """distill_students(), of those that have not ended; leases are of folders that are there."""
    started = time.perf_counter()
    if resume:
        configs = _with_old_classes(configs)
    first, *others = configs.values()
    names = check(first)
    for other in others:
        check(other)
    may_stream = first.targets.source in ("auto", "stream")
    students = [config.student for config in configs.values()]
    needed = cluster.wanted(first, students, may_stream)["CPU"]
    stack.enter_context(cluster.session(first.ray.address, needed))
    sigterm.listen()
    configs = {name: cluster.resolve(config) for name, config in configs.items()}
    begun = {name for name in leases if resume}
    for name in begun:
        if different := run_folder.differences(configs[name]):
            listed = "".join(f"\n  {line}" for line in different)
            raise UserError(f"name: {configs[name].folder} was begun as another run:{listed}")
    assignment, choice = arranged([*configs.values()], names)
    streams = choice.source == "stream"
    students = [config.student for config in configs.values()]
    cluster.wait_for_room(assignment.config, students, streams)
    zero_shots = {name: _zero_shot(config, names) for name, config in configs.items()}
    before_s = dict.fromkeys(configs, 0.0)
    for name, config in configs.items():
        if name in begun:
            before_s[name] = _go_on(config)
        else:
            folder = run_folder.create(config, workers=config.student.workers)
            leases[name] = stack.enter_context(closing(lease.take(folder)))
        vectors = config.folder / "class_vectors.safetensors"
        if not vectors.exists():
            assignment.labels.teachers[0].classes.save(vectors)
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
            leases[name].owner,
        )
        for name, config in configs.items()
    }
    for config in configs.values():
        say(recipe(config, len(names)))
    say(placement([*configs.values()], choice))
    with sigterm.workers([leases[name] for name in tasks]):
        return _train(tasks, pool, sigterm, {name: started - one for name, one in before_s.items()})


def _with_old_classes(configs: dict[str, RunConfig]) -> dict[str, RunConfig]:
    """With the class vectors that one of the runs was begun with: made again, elsewhere, they might
    differ in the last bits."""
    files = [config.folder / "class_vectors.safetensors" for config in configs.values()]
    if not (found := [str(file) for file in files if file.exists()]):
        return configs
    return {
        name: dataclasses.replace(
            config, classes=dataclasses.replace(config.classes, vectors=found[0])
        )
        for name, config in configs.items()
    }


def _go_on(config: RunConfig) -> float:
    """Begins another life of a run, and says so. Gives the seconds that the earlier ones took."""
    life, before_s = run_folder.go_on(config, workers=config.student.workers)
    saved = checkpoint.load_latest(config.folder / "checkpoints")
    where = f"step {saved.step}" if saved else "step 0: there is no checkpoint yet"
    text = f"resumed, on {config.student.workers} workers, from {where}; life {life} of the run"
    recorder = Recorder(config.folder)
    recorder.record("resumed", text=text, step=saved.step if saved else 0, life=life)
    recorder.close()
    say(text)
    return before_s


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
    tasks: Mapping[str, Task], pool: Pool | None, sigterm: Sigterm, started: Mapping[str, float]
) -> dict[str, Outcome]:
    with Watch({name: task.config.folder / "metrics.jsonl" for name, task in tasks.items()}):
        if len(tasks) == 1:  # Ray Train hears Ctrl-C in the main thread alone
            return {n: _outcome(task, pool, sigterm, started[n]) for n, task in tasks.items()}
        outcomes: dict[str, Outcome] = {}

        def train(name: str) -> None:
            try:
                outcomes[name] = _outcome(tasks[name], pool, sigterm, started[name])
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


def _outcome(task: Task, pool: Pool | None, sigterm: Sigterm, started: float) -> Outcome:
    """Trains a student to its end, and writes what became of it."""
    config = task.config
    try:
        told = run_gang(task)
        while told.get("stopped") == Stop.WORKER and not sigterm.asked:
            say(f"a worker is to leave: step {told['step']} is committed; starting workers again")
            told = run_gang(task)
    except TrainingFailedError as failure:
        _write_ledger(config)
        return _plain(failure, config.folder / "failure.txt")
    except KeyboardInterrupt:
        _write_ledger(config)
        raise
    if told.get("stopped") == Stop.LOST:  # and nothing here is ours to write
        return RunFailed(
            f"{config.folder} has been taken over by another driver; lease.json names it"
        )
    if told.get("stopped"):
        _write_ledger(config)
        return Drained(f"ended by SIGTERM after step {told['step']}; --resume goes on from there")
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
            "labels": told["waited_labels_s"] / told["life_s"],
            "data": told["waited_data_s"] / told["life_s"],
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
