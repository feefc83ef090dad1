"""A student worker: builds its part of a run, trains, evaluates. Plain torch.distributed.

It needs Ray only where the run streams its labels, and runs as well under torchrun or in a test.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from engine.clip.bundle import Bundle
from engine.clip.class_vectors import ClassVectors
from engine.clip.names import base_count
from engine.clip.prompts import PromptedTower
from engine.clip.towers import DTYPES, Clip, load_clip, vision_shape
from engine.config import RunConfig, UserError
from engine.data.corpus import open_corpora
from engine.data.decode import Decoder
from engine.data.order import Order
from engine.data.views import ViewPolicy
from engine.labels.pool import StreamSource
from engine.labels.targets import TargetSource
from engine.labels.teacher import InlineSource, Teacher, fingerprint
from engine.train import checkpoint
from engine.train.evaluate import Score, evaluate
from engine.train.loop import kept, merged, train
from kernels.reference import logits

__all__ = ["Task", "work"]


class Task(NamedTuple):
    """What every worker is told; `config` is resolved."""

    config: RunConfig
    classes: ClassVectors
    zero_shot: ClassVectors | None  # of the student's own text tower, where there is an evaluation
    teachers: Sequence[Any]  # actor handles of the stream


def work(task: Task, device: torch.device) -> dict[str, Any]:
    """Trains, writes the bundle and evaluates, on the process group that is already there.

    Gives the same on every worker: steps, seconds, ledgers and scores. Raises UserError where
    workers do not see the same run folder, RuntimeError where the loss is not finite or labels do
    not come.
    """
    from engine.train.student import StudentTrainer  # the driver can do without DeepSpeed

    config, classes = task.config, task.classes
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(config.student.threads)

    clip = load_clip(config.student.model, config.student.weights, "student.")
    student = PromptedTower(
        clip.image,
        config.student.prompts,
        config.student.depth,
        config.student.projector_width or classes.vectors.shape[1],
        classes.vectors.shape[1],
        config.seed,
    )
    start = checkpoint.load_latest(config.folder / "checkpoints")
    _require_one_start(start.step if start else 0, world)
    if start:
        student.load_state_dict(start.student)
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
    source = _source(task, w_ND, kept(order, world), rank, device)
    trainer = StudentTrainer(
        student.to(device),
        w_ND,
        clip.logit_scale,
        config.train,
        config.student.zero_stage,
        config.train.passes * order.steps,
    )
    if start:
        trainer.load_optimizer(start.optimizer)
    try:
        trained = train(
            trainer,
            source,
            corpora["shards"],
            decoder,
            order,
            config.train,
            config.folder,
            start,
            device,
        )
        weights, _ = trainer.state()
        bundle = _bundle(config, clip, classes, weights)
        if rank == 0:
            bundle.save(config.folder / "bundle.safetensors")
        scores, evaluation = {}, None
        if "evaluation" in corpora:
            # A fresh student, as it is deployed: ZeRO may hold the trained one in parts.
            models: dict[str, Callable[[Tensor], Tensor]] = {
                "student_after": bundle.attached(clip, device)
            }
            if task.zero_shot:
                models["student_before"] = _zero_shot(clip, task.zero_shot, device)
            held_out = corpora["evaluation"]
            tallies, ledger = evaluate(
                models,
                source,
                held_out,
                range(rank, len(held_out.blocks), world),
                decoder,
                base_count(len(classes.names)),
                config.teacher.batch,
                device,
            )
            counted = merged(ledger).statement(held_out.samples)
            evaluation = {"scored": counted["trained"], "skipped": counted["skipped"]}
            for name, counts in tallies.items():
                everyone = counts.to(device)
                dist.all_reduce(everyone)
                scores[name] = asdict(Score.of(everyone.cpu()))
    finally:
        source.close()
    return {
        "steps": trained.steps,
        "train_s": trained.train_s,
        "waited_labels_s": trained.waited_labels_s,
        "waited_data_s": trained.waited_data_s,
        "ledger": trained.ledger.statement(config.train.passes * order.samples),
        "scores": scores,
        "evaluation": evaluation,
    }


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
        clip = load_clip(config.teacher.model, config.teacher.weights, "teacher.")
        precision = config.teacher.precision
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


def _zero_shot(clip: Clip, own: ClassVectors, device: torch.device) -> Callable[[Tensor], Tensor]:
    w_ND = torch.from_numpy(own.vectors).to(device)

    def answer(images_BCHW: Tensor) -> Tensor:
        u_BD = F.normalize(clip.image(images_BCHW).float(), dim=-1)
        return logits(u_BD, w_ND, clip.logit_scale)

    return answer
