"""The student worker's loop: batches and labels in; steps, records and checkpoints out.

Plain torch.distributed: it runs the same under Ray Train, torchrun or a test's own processes.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from engine.config import CorpusConfig, RunFailed, TrainConfig
from engine.data.corpus import Corpus
from engine.data.isolate import AnyDecoder
from engine.data.loader import Loader, Work
from engine.data.order import Order
from engine.labels.targets import BlockView, TargetSource
from engine.telemetry import GpuSampler, Recorder
from engine.train.checkpoint import Checkpoint, Saver
from engine.train.health import Health
from engine.train.identity import Identity
from engine.train.ledger import Ledger, Spoilt, Watch
from engine.train.stops import Stop, Stopped, Stops

if TYPE_CHECKING:
    from engine.train.student import StudentTrainer  # DeepSpeed is slow to import

__all__ = ["Trained", "kept", "merged", "train", "training_works"]


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


def training_works(
    order: Order, passes: int, views: int, rank: int, world: int, start: int
) -> Iterator[Work]:
    """The batches of this rank, from step `start` of the run on."""
    for step in range(start, passes * order.steps):
        pass_, within = divmod(step, order.steps)
        coming = order.coming(pass_, within, rank, world, afresh=step == start)
        soon = tuple((p % views, block) for p, block in coming if p < passes)
        share = order.share(pass_, within, rank, world)
        yield Work("shards", step, pass_ % views, share, soon)


def train(
    trainer: "StudentTrainer",
    source: TargetSource,
    corpus: Corpus,
    decoder: AnyDecoder,
    order: Order,
    config: TrainConfig,
    data: CorpusConfig,
    folder: Path,
    start: Checkpoint | None,
    identity: Identity,
    device: torch.device,
    after_pass: Callable[[int], None],
    stops: Stops,
) -> Trained:
    """Trains from `start`, or from the beginning, to the last step.

    Rank 0 appends records to `folder`/metrics.jsonl and writes `folder`/checkpoints, of the run of
    this `identity`, while training goes on; on return or raise nothing is being written. All
    workers call `after_pass` with the number of each pass they complete, and raise Collapse, Spoilt
    or Stopped at the same step: the last with that step committed, unless the run is another's. Or
    RunFailed, where the last checkpoint cannot be written.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    total_steps = config.passes * order.steps
    first = start.step if start else 0
    # What earlier lives of the run have done is counted once, by rank 0.
    ledger = Ledger.total([start.ledger]) if start and rank == 0 else Ledger()
    before_s = start.train_s if start else 0.0
    recorder = Recorder(folder) if rank == 0 else None
    saver = None
    if rank == 0:
        saver = Saver(folder / "checkpoints", config.keep_last, config.keep_every)
    gpu = GpuSampler(device.index or 0) if rank == 0 and device.type == "cuda" else None
    works = training_works(order, config.passes, config.views or config.passes, rank, world, first)
    loader = Loader(corpus, decoder, works, int(data.memory_gb * 2**30), device=device)
    # A collapse is not to cost more than a pass, where a pass is short.
    period = min(config.checkpoint_steps, max(order.steps, _SHORTEST_PERIOD))
    health = start.health if start else Health()
    before = start.ledger if start else Ledger()
    watch = Watch(data.max_skipped, order.samples, order.blocks.largest, before)
    counts = torch.zeros(5, device=device)
    recorded = first
    started = logged = time.perf_counter()
    try:
        for batch in loader:
            source.request([BlockView("shards", block, view) for view, block in batch.work.soon])
            targets = source.targets(batch)
            counts += trainer.step(batch.work.step, batch.here(), targets)
            ledger.add(batch, targets.valid_B)
            done = batch.work.step + 1
            stop = stops.agreed()
            saves = done % period == 0 or done == total_steps or stop is not Stop.NONE
            if saves:
                stop = max(stop, stops.now())
            if stop is Stop.LOST:
                raise Stopped(stop, done)
            if done % config.log_steps == 0 or saves:  # what is saved has been looked at
                seen = torch.tensor([ledger.failed, ledger.visited], device=device)
                totals = _sum(torch.cat([counts.double(), seen.double()]))
                images, kl, agreeing, loss, not_finite, failed, visited = totals.tolist()
                now = time.perf_counter()
                if recorder:
                    recorder.record(
                        "train",
                        step=done,
                        steps=total_steps,
                        pass_=batch.work.step // order.steps,
                        loss=loss / max(images, 1),
                        kl=kl / max(images, 1),
                        agreement=agreeing / max(images, 1),
                        not_finite=not_finite,
                        lr=trainer.learning_rate(batch.work.step),
                        images_per_second=images / (now - logged),
                        waited_labels_s=source.waited_s,
                        waited_data_s=loader.waited_s,
                        labels=source.statement(),
                        **(gpu.means() if gpu else {}),
                    )
                health.observe(
                    images,
                    kl,
                    agreeing,
                    (done - recorded) * world,
                    not_finite,
                    classes=trainer.classes,
                    enough=config.judge_images,
                )
                try:
                    watch.require_usable(int(failed), int(visited))
                except Spoilt:  # what is learned is kept, for who mends the corpus
                    train_s = before_s + time.perf_counter() - started
                    _save(trainer, saver, done, train_s, ledger, health, identity)
                    raise
                counts.zero_()
                logged, recorded = now, done
            if done % order.steps == 0:  # before it is saved, which ends the pass for good
                after_pass(batch.work.step // order.steps)
            if saves:
                train_s = before_s + time.perf_counter() - started
                _save(trainer, saver, done, train_s, ledger, health, identity)
            if stop is not Stop.NONE:
                _require_saved(saver)
                raise Stopped(stop, done)
        _require_saved(saver)
        life_s = time.perf_counter() - started
    finally:
        loader.close()
        if saver:
            saver.close()
        if gpu:
            gpu.close()
        if recorder:
            recorder.close()
    everyone = merged(ledger)
    assert everyone.visited == config.passes * order.samples, "samples were left out of the run"
    waits = _sum(torch.tensor([source.waited_s, loader.waited_s], device=device)) / world
    labels_s, data_s = waits.tolist()
    return Trained(
        total_steps, before_s + life_s, everyone, life_s, labels_s, data_s, loader.stages()
    )


def kept(order: Order, world: int) -> int:
    """Samples of blocks to hold so that labels are not dropped while a window still needs them.

    An average where many blocks lie in two units: one that is dropped is labelled again.
    """
    window = int(order.window_samples * (1 + order.torn)) + 2 * order.blocks.largest
    return 2 * (order.lanes // world) * window


def _save(
    trainer: "StudentTrainer",
    saver: Saver | None,
    step: int,
    train_s: float,
    ledger: Ledger,
    health: Health,
    identity: Identity,
) -> None:
    if saver:
        saver.failure()  # so that not more than one state is held; the next one is a new try
    student, optimizer = trainer.state()
    everyone = merged(ledger)
    if saver:
        saver.save(Checkpoint(step, train_s, everyone, health, identity, student, optimizer))


def _require_saved(saver: Saver | None) -> None:
    """Waits for the last checkpoint. All workers raise RunFailed where it could not be written."""
    failure = saver.failure() if saver else None
    told = [f"the last checkpoint could not be written: {failure}" if failure else ""]
    dist.broadcast_object_list(told)
    if told[0]:
        raise RunFailed(told[0])


def merged(ledger: Ledger) -> Ledger:
    """The ledgers of all workers, added up."""
    everyone: list[Ledger] = [Ledger()] * dist.get_world_size()
    dist.all_gather_object(everyone, ledger)
    return Ledger.total(everyone)


def _sum(x: Tensor) -> Tensor:
    dist.all_reduce(x)
    return x
