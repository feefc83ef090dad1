"""The student worker's loop: batches and labels in; steps, records and checkpoints out.

Plain torch.distributed: it runs the same under Ray Train, torchrun or a test's own processes.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from engine.config import CorpusConfig, RunFailed, TrainConfig
from engine.data.batches import training_works
from engine.data.corpus import Corpus
from engine.data.isolate import AnyDecoder
from engine.data.loader import Loader
from engine.data.order import Order
from engine.labels.targets import BlockView, TargetSource
from engine.telemetry import GpuSampler, Recorder
from engine.train.account import Account
from engine.train.bad_numbers import require_finite
from engine.train.checkpoint import Checkpoint, Saver
from engine.train.checkpoint_copy import copy_of
from engine.train.identity import Identity
from engine.train.ledger import Ledger, Spoilt
from engine.train.probe import Probes, Skipped
from engine.train.reports import Reports
from engine.train.schedule import effective_weight
from engine.train.stops import Stop, Stopped, Stops

if TYPE_CHECKING:
    from engine.train.student import StudentTrainer  # DeepSpeed is slow to import

__all__ = ["Setting", "Trained", "kept", "merged", "train"]

_SHORTEST_PERIOD = 20  # steps between checkpoints, unless told otherwise


@dataclass(frozen=True)
class Trained:
    """What a worker's training came to; all but the waits are over all workers, and all lives."""

    steps: int
    train_s: float
    ledger: Ledger
    life_s: float  # of train_s, since these workers were started
    waited_labels_s: float  # of that, mean over workers
    waited_data_s: float
    stages: dict[str, Any]  # of rank 0's loader


class Setting(NamedTuple):
    """What a worker trains with, in each of its lives."""

    source: TargetSource
    corpus: Corpus
    decoder: AnyDecoder
    order: Order
    config: TrainConfig
    data: CorpusConfig
    folder: Path  # of the run
    identity: Identity
    device: torch.device
    stops: Stops


def train(
    trainer: "StudentTrainer",
    setting: Setting,
    start: Checkpoint | None,
    after_pass: Callable[[int], None],
) -> Trained:
    """Trains from `start`, or from the beginning, to the last step.

    Rank 0 appends records and probes to the run folder, every rank its reports and what it has
    skipped, and rank 0 writes checkpoints, while training goes on; on return or raise nothing is
    being written. All workers call `after_pass` with the number of each pass they complete, and
    raise Collapse, Spoilt or Stopped at the same step: the last two with that step committed,
    unless the run is another's. Or RunFailed, where the last checkpoint cannot be written.
    """
    source, order, config, device = setting.source, setting.order, setting.config, setting.device
    rank, world = dist.get_rank(), dist.get_world_size()
    total_steps = config.passes * order.steps
    first = start.step if start else 0
    before_s = start.train_s if start else 0.0
    recorder = Recorder(setting.folder / "metrics.jsonl") if rank == 0 else None
    probes = Probes(setting.folder, order, total_steps, config.log_steps) if rank == 0 else None
    skipped = Skipped(setting.folder, order, rank)
    gpu = GpuSampler(device.index or 0 if device.type == "cuda" else None)
    works = training_works(order, config.passes, config.views or config.passes, rank, world, first)
    memory_bytes = int(setting.data.memory_gb * 2**30)
    loader = Loader(setting.corpus, setting.decoder, works, memory_bytes, device=device)
    checkpoints, held = setting.folder / "checkpoints", setting.stops.require_held
    copy = copy_of(config.checkpoint_copy, setting.folder)
    saver = Saver(checkpoints, config.keep_last, config.keep_every, held, copy)
    # A collapse is not to cost more than a pass, where a pass is short.
    period = min(config.checkpoint_steps, max(order.steps, _SHORTEST_PERIOD))
    account = Account(start, order, config, setting.data, trainer.classes, device)
    reports = Reports(setting.folder, rank, source, loader, account.ledger, gpu)
    started = time.perf_counter()
    if recorder:
        recorder.record(
            "started",
            step=first,
            steps=total_steps,
            passes=config.passes,
            workers=world,
            effective_weight=effective_weight(config, trainer.classes),
        )

    def save(step: int) -> None:
        if rank == 0:
            saver.failure()  # so that not more than one state is held; the next one is a new try
        student, optimizer = trainer.state()
        require_finite(student | optimizer)
        everyone, train_s = merged(account.ledger), before_s + time.perf_counter() - started
        if rank == 0:
            saver.save(
                Checkpoint(
                    step, train_s, everyone, account.health, setting.identity, student, optimizer
                )
            )

    ended: Spoilt | Stopped | None = None
    try:
        for batch in loader:
            step = batch.work.step
            source.request([BlockView("shards", block, view) for view, block in batch.work.soon])
            targets = source.targets(batch)
            account.add(batch, targets.valid_B, trainer.step(step, batch.here(), targets))
            done = step + 1
            skipped.add(done, batch, targets.valid_B)
            stop = setting.stops.agreed()
            saves = done % period == 0 or done == total_steps or stop is not Stop.NONE
            if saves:
                stop = max(stop, setting.stops.now())
            if stop is Stop.LOST:
                raise Stopped(stop, done)
            if done % config.log_steps == 0 or saves:  # what is saved has been looked at
                totals = account.settle(done)
                if recorder:
                    recorder.record(
                        "train",
                        step=done,
                        steps=total_steps,
                        pass_=step // order.steps,
                        **totals.record(),
                        lr=trainer.learning_rate(step),
                        waited_labels_s=source.waited_s,
                        waited_data_s=loader.waited_s,
                        labels=source.statement(),
                        **gpu.means(totals.took_s),
                    )
                reports.tell(done, last=done == total_steps or stop is not Stop.NONE)
                if probes:
                    probes.look(done, batch, targets.valid_B, partial(trainer.answers, targets))
                try:
                    account.judge(totals)
                except Spoilt as spoilt:  # what is learned is kept, for who mends the corpus
                    ended, saves = spoilt, True
            if done % order.steps == 0:  # before it is saved, which ends the pass for good
                after_pass(step // order.steps)
            if saves:
                save(done)
            if stop is not Stop.NONE:
                ended = ended or Stopped(stop, done)
            if ended:
                break
        _require_saved(saver)
        if ended:
            raise ended
        life_s = time.perf_counter() - started
    finally:
        loader.close()
        saver.close()
        gpu.close()
        reports.close()
        if recorder:
            recorder.close()
        if probes:
            probes.close()
        skipped.close()
    everyone = merged(account.ledger)
    assert everyone.visited == config.passes * order.samples, "samples were left out of the run"
    waits = torch.tensor([source.waited_s, loader.waited_s], device=device)
    dist.all_reduce(waits)
    labels_s, data_s = (waits / world).tolist()
    return Trained(
        total_steps, before_s + life_s, everyone, life_s, labels_s, data_s, loader.stages()
    )


def kept(order: Order, world: int) -> int:
    """Samples of blocks to hold so that labels are not dropped while a window still needs them.

    An average where many blocks lie in two units, or hold samples that are not listed: one that is
    dropped is labelled again.
    """
    window = int(order.window_samples * order.spread) + 2 * order.blocks.largest
    return 2 * (order.lanes // world) * window


def merged(ledger: Ledger) -> Ledger:
    """The ledgers of all workers, added up."""
    everyone: list[Ledger] = [Ledger()] * dist.get_world_size()
    dist.all_gather_object(everyone, ledger)
    return Ledger.total(everyone)


def _require_saved(saver: Saver) -> None:
    """Waits for the last checkpoint. All workers raise RunFailed where it could not be written."""
    failure = saver.failure()
    where = f"the last checkpoint could not be written to {saver.folder}"
    on = "once that is mended, --resume goes on from the newest one that is there"
    told = [f"{where}: {failure}; {on}" if failure else ""]
    dist.broadcast_object_list(told)
    if told[0]:
        raise RunFailed(told[0])
