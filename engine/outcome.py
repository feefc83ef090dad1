"""What becomes of a student: its training, a summary or why there is none, the files that tell."""

import time
from dataclasses import fields, replace
from typing import Any

from engine import lease, run_folder
from engine.closing import close_run
from engine.config import Drained, RunConfig, RunFailed, UserError
from engine.data.corpus import open_corpora
from engine.labels.scaling import Pool
from engine.progress import say
from engine.signals import Signals
from engine.train import checkpoint
from engine.train.evaluate import Score
from engine.train.gang import run_gang
from engine.train.ledger import Ledger
from engine.train.stops import Stop
from engine.train.worker import Task

__all__ = ["Outcome", "Summary", "outcome_of", "write_ledger"]

Summary = dict[str, Any]
Outcome = Summary | Exception | Drained


def outcome_of(task: Task, pool: Pool | None, signals: Signals, started: float) -> Outcome:
    """Trains a student to its end, and writes what became of it."""
    config = task.config
    failure: Exception | Drained | None
    try:
        told = run_gang(task)
        while told.get("stopped") == Stop.WORKER and not signals.heard:
            say(f"a worker is to leave: step {told['step']} is committed; starting workers again")
            told = run_gang(task)
        failure = _failure(config, told, signals)
    except (UserError, RunFailed) as error:
        failure = error
    if _is_lost(task):
        return RunFailed(
            f"{config.folder} has been taken over by another driver; lease.json names it"
        )
    if failure:
        write_ledger(task)
        close_run(config.folder, failure, config.corpus.hosts)
        return failure
    told["labels"] |= {"source": task.source}
    if pool:
        told["labels"] |= pool.statement()
    summary = _summary(config.name, told, time.perf_counter() - started)
    run_folder.write(config.folder / "ledger.json", told["ledger"])
    run_folder.write(config.folder / "summary.json", summary)
    close_run(config.folder, hosts=config.corpus.hosts)
    return summary


def _failure(
    config: RunConfig, told: dict[str, Any], signals: Signals
) -> RunFailed | Drained | None:
    """Why there is no summary."""
    if told.get("stopped"):
        return signals.drained(f" after step {told['step']}; --resume goes on from there")
    if why := told.get("failed"):
        return RunFailed(why)
    if why := told.get("spoilt"):
        return RunFailed(f"{why}. What was learned is in {config.folder / 'checkpoints'}")
    if why := told.get("collapsed"):
        good = checkpoint.newest_good(config.folder / "checkpoints")
        return RunFailed(
            f"the student has collapsed, after {config.train.rollbacks} roll-backs: {why}. "
            "A smaller train.lr, a longer train.warmup_steps or a smaller train.kd_weight may "
            f"help. {f'The last good checkpoint is of step {good}' if good else 'None is good'}"
        )
    return None


def _is_lost(task: Task) -> bool:
    """Whether nothing in the run folder is ours to write any more."""
    try:
        return lease.state(task.config.folder, task.owner) == "lost"
    except OSError as error:
        say(f"warning: the lease of {task.config.folder} cannot be read: {error}")
        return False


def write_ledger(task: Task) -> None:
    """Of a run that has come to no good end: what its last checkpoint says."""
    config = task.config
    if not (config.folder / "metrics.jsonl").exists() or _is_lost(task):  # or has not begun
        return
    try:
        saved = checkpoint.load_latest(config.folder / "checkpoints")
        once = replace(config.corpus, retries=0, timeout_s=5.0)  # somebody may wait for the end
        planned = config.train.passes * open_corpora(once)["shards"].pass_samples
        statement = (saved.ledger if saved else Ledger()).statement(planned)
        run_folder.write(config.folder / "ledger.json", statement)
    except (UserError, OSError) as error:  # told beside the failure that brought us here
        say(f"warning: no ledger.json: {error}")


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
