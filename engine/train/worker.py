"""A student worker: builds its part of a run, trains, evaluates. Plain torch.distributed.

It needs Ray only where the run streams its labels, and runs as well under torchrun or in a test.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from engine.clip.bundle import Bundle
from engine.clip.class_vectors import ClassVectors
from engine.clip.names import base_count
from engine.clip.prompts import PromptedTower
from engine.clip.towers import DTYPES, Clip, load_clip
from engine.clip.weights import vision_shape
from engine.config import RunConfig, UserError
from engine.data.corpus import open_corpora
from engine.data.decode import Decoder
from engine.data.order import Order
from engine.data.views import ViewPolicy
from engine.labels.pool import StreamSource
from engine.labels.targets import TargetSource
from engine.labels.teacher import InlineSource, Teacher, fingerprint
from engine.train import checkpoint, rollback
from engine.train.evaluate import Model, Score, evaluate, zero_shot
from engine.train.health import Collapse
from engine.train.ledger import Ledger
from engine.train.loop import Trained, kept, merged, train
from engine.train.selection import Selection

if TYPE_CHECKING:
    from engine.train.student import StudentTrainer

__all__ = ["Task", "work"]


class Task(NamedTuple):
    """What every worker is told; `config` is resolved."""

    config: RunConfig
    classes: ClassVectors
    zero_shot: ClassVectors | None  # of the student's own text tower, where there is an evaluation
    teachers: Sequence[Any]  # actor handles of the stream


def work(task: Task, device: torch.device) -> dict[str, Any]:
    """Trains, writes the bundle and evaluates, on the process group that is already there.

    Gives the same on every worker: steps, seconds, ledgers and scores; or, under `collapsed`, why
    the student was given up. Raises UserError where workers do not see the same run folder,
    RuntimeError where labels do not come.
    """
    config, classes = task.config, task.classes
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(config.student.threads)
    clip = load_clip(config.student.model, config.student.weights, "student.")
    clip.image.to(device, DTYPES[config.student.precision])
    w_ND = torch.from_numpy(classes.vectors).to(device)

    corpora = open_corpora(config.corpus)
    order = Order(
        corpora["shards"].counts,
        config.corpus.lanes,
        config.train.batch,
        config.corpus.window_blocks * config.corpus.block_samples,
        config.seed,
    )
    policy = ViewPolicy(config.seed, clip.image.pixels, config.train.crop_scale)
    decoder = Decoder(policy, str(device), config.student.threads)
    base = base_count(len(classes.names))
    selected = Selection(config.train.selection, config.folder)

    def scores(models: dict[str, Model], source: TargetSource | None) -> tuple[dict, Ledger]:
        """Of all workers together, on the evaluation images."""
        held_out = corpora["evaluation"]
        mine = range(rank, len(held_out.blocks), world)
        batch = config.teacher.batch
        tallies, ledger = evaluate(models, source, held_out, mine, decoder, base, batch, device)
        for name, counts in tallies.items():
            everyone = counts.to(device)
            dist.all_reduce(everyone)
            tallies[name] = everyone.cpu()
        return {name: asdict(Score.of(counts)) for name, counts in tallies.items()}, merged(ledger)

    def life(source: TargetSource) -> tuple[Trained, dict[str, Tensor]]:
        """The run from its newest checkpoint to its end, and the weights it comes to."""
        start = checkpoint.load_latest(config.folder / "checkpoints")
        _require_one_start(start.step if start else 0, world)
        trainer = _trainer(task, clip, w_ND, start, order, device)

        def after_pass(pass_: int) -> None:
            if selected.rule == "paper":
                weights, _ = trainer.state()
                student = _bundle(config, clip, classes, weights).attached(clip, device)
                told, _ = scores({"student": student}, None)
                selected.offer(pass_, told["student"], weights, rank)

        shards = corpora["shards"]
        trained = train(
            trainer,
            source,
            shards,
            decoder,
            order,
            config.train,
            config.folder,
            start,
            device,
            after_pass,
        )
        weights, _ = trainer.state()
        dist.barrier()
        return trained, selected.choice(weights)

    source = _source(task, w_ND, kept(order, world), rank, device)
    try:
        while True:
            try:
                trained, weights = life(source)
                break
            except Collapse as collapse:
                if not rollback.take(config.folder, str(collapse), config.train.rollbacks, rank):
                    return {"collapsed": str(collapse)}
        bundle = _bundle(config, clip, classes, weights)
        if rank == 0:
            bundle.save(config.folder / "bundle.safetensors")
        told: dict[str, Any] = {}
        evaluation = None
        if "evaluation" in corpora:
            # A fresh student, as it is deployed: ZeRO may hold the trained one in parts.
            models: dict[str, Model] = {"student_after": bundle.attached(clip, device)}
            if task.zero_shot:
                models["student_before"] = zero_shot(clip, task.zero_shot, device)
            told, ledger = scores(models, source)
            counted = ledger.statement(corpora["evaluation"].samples)
            evaluation = {"scored": counted["trained"], "skipped": counted["skipped"]}
    finally:
        source.close()
    return {
        "steps": trained.steps,
        "train_s": trained.train_s,
        "waited_labels_s": trained.waited_labels_s,
        "waited_data_s": trained.waited_data_s,
        "ledger": trained.ledger.statement(config.train.passes * order.samples),
        "scores": told,
        "evaluation": evaluation,
        "selection": selected.statement(),
        "rollbacks": rollback.taken(config.folder),
    }


def _trainer(
    task: Task,
    clip: Clip,
    w_ND: Tensor,
    start: checkpoint.Checkpoint | None,
    order: Order,
    device: torch.device,
) -> "StudentTrainer":
    from engine.train.student import StudentTrainer  # the driver can do without DeepSpeed

    config, (_, width) = task.config, task.classes.vectors.shape
    told = config.student
    hidden = told.projector_width or width
    student = PromptedTower(clip.image, told.prompts, told.depth, hidden, width, config.seed)
    if start:
        student.load_state_dict(start.student)
    trainer = StudentTrainer(
        student.to(device),
        w_ND,
        clip.logit_scale,
        config.train,
        told.zero_stage,
        config.train.passes * order.steps,
        len(rollback.taken(config.folder)),
    )
    if start:
        trainer.load_optimizer(start.optimizer)
    return trainer


def _require_one_start(step: int, world: int) -> None:
    """Workers that start at different steps would wait for each other for ever."""
    steps = [0] * world
    dist.all_gather_object(steps, step)
    if len(set(steps)) > 1:
        raise UserError(f"runs_dir must be one folder for all nodes: checkpoints differ, {steps}")


def _source(
    task: Task, w_ND: Tensor, kept_samples: int, rank: int, device: torch.device
) -> TargetSource:
    config, classes = task.config, task.classes
    if config.targets.source == "inline":
        told = config.teacher
        clip = load_clip(told.model, told.weights, "teacher.", told.prompts)
        precision = told.precision
        return InlineSource(Teacher(clip, classes, precision, device, config.teacher.batch))
    pixels = vision_shape(config.teacher.model).pixels
    policy = ViewPolicy(config.seed, pixels, config.train.crop_scale)
    return StreamSource(
        task.teachers,
        fingerprint(classes, policy, config.teacher.precision),
        w_ND,
        classes.logit_scale,
        config.targets.outstanding,
        config.targets.timeout_s,
        kept_samples,
        rank,
    )


def _bundle(
    config: RunConfig, clip: Clip, classes: ClassVectors, weights: dict[str, Tensor]
) -> Bundle:
    return Bundle(
        learned=weights,
        class_vectors=torch.from_numpy(classes.vectors),
        class_names=classes.names,
        model=config.student.model,
        weights=config.student.weights,
        backbone=clip.fingerprint,
        teacher=classes.teacher,
        logit_scale=clip.logit_scale,
        pixels=clip.image.pixels,
    )
