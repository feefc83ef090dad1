"""The driver of a run: check, start, place, watch, finish. Several students may share a run.

A run may have several lives, each with a driver of its own: --resume begins the next one.
"""

import dataclasses
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from engine import lease
from engine.config import RunConfig, RunFailed, UserError, absolute
from engine.imports import uncollected
from engine.progress import Watch, say
from engine.signals import Signals
from engine.telemetry import Recorder
from engine.together import check_together

with uncollected():
    import torch

    from engine import cluster, run_folder
    from engine.announce import placement, recipe
    from engine.clip.class_vectors import ClassVectors, encode_classes
    from engine.clip.names import read_names
    from engine.clip.templates import read_templates
    from engine.clip.towers import Clip, load_clip
    from engine.closing import close_run
    from engine.labels.scaling import Pool
    from engine.outcome import Outcome, Summary, outcome_of, write_ledger
    from engine.preflight import check
    from engine.staff import arranged
    from engine.track.tracking import Tracking, require_installed
    from engine.train import checkpoint, checkpoint_copy
    from engine.train.gang import allow_silence
    from engine.train.identity import Identity
    from engine.train.worker import Task

__all__ = ["distill", "distill_students"]


def distill(config: RunConfig, resume: bool = False) -> Summary:
    """Runs a distillation to its end and gives what its `summary.json` says. To `resume` is to go
    on from the newest checkpoint of its folder; of a run that has ended, only the summary is given.

    Raises UserError for what the user can mend, before any model is built, RunFailed where the
    student workers fail for good, Drained where a signal has ended it with nothing lost, and
    KeyboardInterrupt where Ctrl-C has stopped it at once.
    """
    if resume:
        checkpoint_copy.prepare(config, resume)
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
    for config in configs.values():
        require_installed(config.track)
    with ExitStack() as stack:
        signals = stack.enter_context(Signals())
        leases = {}
        for name, config in configs.items():
            checkpoint_copy.prepare(config, resume)
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
            outcomes |= _distill(left, resume, leases, signals, stack)
    return {name: outcomes[name] for name in configs}


def _distill(
    configs: dict[str, RunConfig],
    resume: bool,
    leases: dict[str, lease.Lease],
    signals: Signals,
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
    signals.listen()
    configs = {name: cluster.resolve(config) for name, config in configs.items()}
    clips = _clips(configs)
    assignment, choice = arranged([*configs.values()], clips.values(), names)
    identities = {
        name: Identity.of(
            config,
            assignment.labellings["shards"],
            clips[name].fingerprint,
            choice.source,
            assignment.samples,
        )
        for name, config in configs.items()
    }
    begun = {name for name in configs if resume and name in leases}
    for name in begun:  # before others are begun
        run_folder.require_like(configs[name], identities[name])
    streams = choice.source == "stream"
    students = [config.student for config in configs.values()]
    cluster.wait_for_room(assignment.config, students, streams)
    zero_shots = {name: _zero_shot(one, clips[name], names) for name, one in configs.items()}
    clips.clear()  # they are large
    before_s = dict.fromkeys(configs, 0.0)
    for name, config in configs.items():
        if name in begun:
            before_s[name] = _go_on(config)
        else:
            workers = config.student.workers
            folder = run_folder.create(config, identities[name], workers=workers)
            leases[name] = stack.enter_context(closing(lease.take(folder)))
            copy = checkpoint_copy.copy_of(config.train.checkpoint_copy, folder)
            if config.overwrite and copy:
                copy.clear()
        vectors = config.folder / "class_vectors.safetensors"
        if not vectors.exists():
            assignment.labels.teachers[0].classes.save(vectors)
    folders = [config.folder for config in configs.values()]
    pool = stack.enter_context(closing(Pool(assignment, folders))) if streams else None
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
    held = [leases[name] for name in tasks]
    return _train(tasks, pool, signals, held, {n: started - one for n, one in before_s.items()})


def _with_old_classes(configs: dict[str, RunConfig]) -> dict[str, RunConfig]:
    """With the class vectors that one of the runs was begun with, where none are given: made again,
    elsewhere, they might differ in the last bits."""
    files = [config.folder / "class_vectors.safetensors" for config in configs.values()]
    if not (found := [str(file) for file in files if file.exists()]):
        return configs
    first = next(iter(configs.values())).classes
    stored = ClassVectors.load(Path(found[0]), "name")
    if not first.vectors and stored.names != read_names(first.names, repeats=first.repeats):
        raise UserError(f"classes.names: {first.names} has not the classes that {found[0]} has")
    return {
        name: dataclasses.replace(
            config,
            classes=dataclasses.replace(config.classes, vectors=config.classes.vectors or found[0]),
        )
        for name, config in configs.items()
    }


def _go_on(config: RunConfig) -> float:
    """Begins another life of a run, and says so. Gives the seconds that the earlier ones took."""
    life, before_s = run_folder.go_on(config, workers=config.student.workers)
    saved = checkpoint.load_latest(config.folder / "checkpoints")
    saved = saved or checkpoint_copy.restored(config)
    where = f"step {saved.step}" if saved else "step 0: there is no checkpoint yet"
    text = f"resumed, on {config.student.workers} workers, from {where}; life {life} of the run"
    recorder = Recorder(config.folder / "metrics.jsonl")
    recorder.record("resumed", text=text, step=saved.step if saved else 0, life=life)
    recorder.close()
    say(text)
    return before_s


def _clips(configs: Mapping[str, RunConfig]) -> dict[str, Clip]:
    """The students' own, on the CPU; one where several have the same."""
    models = {name: (one.student.model, one.student.weights) for name, one in configs.items()}
    loaded = {model: load_clip(*model, "student.") for model in sorted({*models.values()})}
    return {name: loaded[model] for name, model in models.items()}


def _zero_shot(config: RunConfig, clip: Clip, names: tuple[str, ...]) -> ClassVectors | None:
    """The student's own class vectors, for the zero-shot accuracy it starts from, where there is an
    evaluation."""
    if not config.corpus.evaluation:
        return None
    say(f"encoding {len(names)} class names with the student's text tower, for its zero-shot score")
    if torch.cuda.is_available():
        clip.text.to("cuda")
    return encode_classes(clip, names, read_templates(config.classes.template))


def _train(
    tasks: Mapping[str, Task],
    pool: Pool | None,
    signals: Signals,
    leases: Sequence[lease.Lease],
    started: Mapping[str, float],
) -> dict[str, Outcome]:
    allow_silence(max(task.config.student.timeout_s for task in tasks.values()))
    outcomes: dict[str, Outcome] = {}

    def train(name: str) -> None:
        try:
            outcomes[name] = outcome_of(tasks[name], pool, signals, started[name])
        except Exception as error:  # the other students are to end in peace
            outcomes[name] = error
        except BaseException as error:
            outcomes[name] = RunFailed(f"{type(error).__name__}: {error}")
            raise

    # Daemons, since one that waits for Ray would keep an interrupted process alive.
    threads = [threading.Thread(target=train, args=(name,), daemon=True) for name in tasks]
    files = {name: task.config.folder / "metrics.jsonl" for name, task in tasks.items()}
    asked = {name: task.config for name, task in tasks.items()}
    tracking = Tracking(asked, hurries=lambda: signals.heard is not None)
    with tracking, Watch(files, [tracking]) as watch, signals.workers(leases, watch.at_work):
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.5)
        except KeyboardInterrupt as stopped:
            for name, task in tasks.items():
                if name not in outcomes:
                    write_ledger(task)
                    close_run(task.config.folder, stopped)
            raise
    return {name: outcomes[name] for name in tasks}
