"""A student worker: builds its part of a run, trains, evaluates. Plain torch.distributed.

It needs Ray only where the run streams its labels, and runs as well under torchrun or in a test.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from engine.clip.bundle import Bundle
from engine.clip.class_vectors import ClassVectors
from engine.clip.compiled import Run, compiled
from engine.clip.names import base_count
from engine.clip.prompts import PromptedTower
from engine.clip.towers import DTYPES, ImageTower, load_clip
from engine.clip.trained import TrainedTower
from engine.config import RunConfig, RunFailed, UserError
from engine.data.corpus import open_corpora
from engine.data.isolate import decoder_of
from engine.data.listed_order import order_of
from engine.data.views import ViewPolicy
from engine.labels.assignment import Assignment
from engine.labels.sources import Place, source_of
from engine.labels.targets import Targets, TargetSource, unpack
from engine.progress import say
from engine.train import checkpoint, rollback
from engine.train.bad_numbers import NotFinite, write_samples
from engine.train.evaluate import Model, Score, evaluate, zero_shot
from engine.train.health import Collapse
from engine.train.identity import Identity
from engine.train.ledger import Ledger, Spoilt
from engine.train.loop import Setting, Trained, kept, merged, train
from engine.train.selection import Selection
from engine.train.stops import Stop, Stopped, Stops
from kernels.kl import Impl, chosen
from kernels.trial import trial

if TYPE_CHECKING:
    from engine.train.student import StudentTrainer

__all__ = ["Task", "Worker", "work"]


class Task(NamedTuple):
    """What every worker is told; `config` is resolved."""

    config: RunConfig
    assignment: Assignment
    zero_shot: ClassVectors | None  # of the student's own text tower, where there is an evaluation
    source: str  # where labels come from: inline, stream, store or synthetic
    roster: Any = None  # the stream's
    who: str = ""  # which of several students it is
    shared: bool = False  # there are others
    owner: str = ""  # of the run folder's lease


def work(task: Task, device: torch.device) -> dict[str, Any]:
    """Trains, writes the bundle and evaluates, on the process group that is already there.

    Gives the same on every worker: steps, seconds, ledgers and scores; or, under `collapsed` or
    `spoilt`, why the student, or the corpus, was given up; or, under `failed`, what would not be
    mended by another try; or, under `stopped`, a Stop, and `step`, that of the last checkpoint.
    Raises RuntimeError where labels do not come.
    """
    torch.set_num_threads(task.config.student.threads)
    worker = Worker(task, device)
    try:
        return worker.run()
    finally:
        for corpus in worker.corpora.values():  # a stalled read would hold the process
            corpus.close()
        worker.decoder.close()
        worker.source.close()
        worker.setting.stops.close()


class Worker:
    """What one worker has loaded, and keeps through roll-backs."""

    def __init__(self, task: Task, device: torch.device) -> None:
        config, self.classes = task.config, task.assignment.labels.teachers[0].classes
        self.task, self.config, self.device = task, config, device
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.clip = load_clip(config.student.model, config.student.weights, "student.")
        self.clip.image.to(device, DTYPES[config.student.precision])
        # Before decoders and collectives, whose threads a CUDA graph must not see at work.
        self.run_tower = self._compiled()
        self.w_ND = torch.from_numpy(self.classes.vectors).to(device)
        self.kernels = _kernels(config.train.kernels, self.w_ND)
        self.corpora = open_corpora(config.corpus)
        shards = self.corpora["shards"]
        task.assignment.require_list(shards.listed)
        batch, seed = config.train.batch, config.seed
        self.order = order_of(config.corpus, shards.blocks, shards.listed, batch, seed)
        policy = ViewPolicy(config.view_seed, self.clip.image.pixels, config.train.crop_scale)
        threads = config.student.threads
        self.decoder = decoder_of(policy, str(device), threads, config.corpus)
        labelling = task.assignment.labellings["shards"]
        self.identity = Identity.of(
            config, labelling, self.clip.fingerprint, task.source, task.assignment.samples
        )
        self.selection = Selection(config.train.selection, config.folder)
        place = Place(
            f"{task.who}/{self.rank}",
            self.world,
            kept(self.order, self.world),
            self.clip.image.pixels,
            device,
        )
        self.source = source_of(
            task.source, task.assignment, task.roster, self.corpora, place, task.shared
        )
        self.setting = Setting(
            self.source,
            self.corpora["shards"],
            self.decoder,
            self.order,
            config.train,
            config.corpus,
            config.folder,
            self.identity,
            device,
            Stops(config.folder, task.owner, device),
        )

    def run(self) -> dict[str, Any]:
        """All of a run; see work()."""
        try:
            return self._run()
        except Stopped as stopped:
            return {"stopped": int(stopped.stop), "step": stopped.step}
        except Spoilt as spoilt:
            return {"spoilt": str(spoilt)}
        except RunFailed as failure:  # all workers have come to it
            return {"failed": str(failure)}

    def _run(self) -> dict[str, Any]:
        config = self.config
        while True:
            try:
                trained, weights = self._trained()
                break
            except Collapse as collapse:
                self._require_ours()
                why = self._reason(collapse)
                if rollback.take(config.folder, why, config.train.rollbacks, self.rank) is None:
                    return {"collapsed": why}
        self._require_ours()
        bundle = self._bundle(weights)
        if self.rank == 0:
            bundle.save(config.folder / "bundle.safetensors")
        scores: dict[str, Any] = {}
        evaluation = None
        if "evaluation" in self.corpora:
            # A fresh student, as it is deployed: ZeRO may hold the trained one in parts.
            models: dict[str, Model] = {"student_after": bundle.attached(self.clip, self.device)}
            if own := self.task.zero_shot:
                models["student_before"] = zero_shot(self.clip, own, self.device)
            scores, ledger = self._scores(models, self._teaches())
            counted = ledger.statement(self.corpora["evaluation"].samples)
            evaluation = {"scored": counted["trained"], "skipped": counted["skipped"]}
        return {
            "steps": trained.steps,
            "train_s": trained.train_s,
            "life_s": trained.life_s,
            "waited_labels_s": trained.waited_labels_s,
            "waited_data_s": trained.waited_data_s,
            "data": trained.stages,
            "labels": self._labels(),
            "ledger": trained.ledger.statement(config.train.passes * self.order.samples),
            "scores": scores,
            "evaluation": evaluation,
            "selection": self.selection.statement(),
            "rollbacks": rollback.taken(config.folder),
        }

    def _trained(self) -> tuple[Trained, dict[str, Tensor]]:
        """Trains from the newest checkpoint to the end; gives the weights to keep, too."""
        start, rollbacks = self._start()
        first = start.step if start else 0
        if (stop := self.setting.stops.now()) is not Stop.NONE:
            raise Stopped(stop, first)
        if self.rank == 0:
            # What was selected after it was of a lineage that has not survived.
            self.selection.forget(first // self.order.steps)
            say(f"{self.world} student workers start from step {first}")
        trainer = self.trainer(start, rollbacks)
        if start:  # the trainer has them now, and they are large
            start = replace(start, student={}, optimizer={})
        try:
            trained = train(
                trainer, self.setting, start, lambda pass_: self._after_pass(pass_, trainer)
            )
            last, _ = trainer.state()
        finally:
            trainer.engine.destroy()
        dist.barrier()  # rank 0 may still be writing the pass it has selected
        return trained, self.selection.choice(last)

    def _start(self) -> tuple[checkpoint.Checkpoint | None, int]:
        """The newest checkpoint that rank 0 finds sound, and how often the run has gone back. All
        workers raise RunFailed where one of them cannot go on from there."""
        folder, start = self.config.folder / "checkpoints", None
        try:
            if self.rank == 0:
                start = checkpoint.load_latest(folder)
            found = [(start.step if start else 0, len(rollback.taken(self.config.folder)))]
            fault = ""
        except UserError as error:
            found, fault = [(0, 0)], str(error)
        dist.broadcast_object_list(found)
        (step, rollbacks), *_ = found
        try:
            if self.rank and step:
                start = checkpoint.load(folder, step)
            if start:
                self.identity.require(start.identity, f"{folder}")
        except UserError as error:
            fault = str(error)
        faults = [fault] * self.world
        dist.all_gather_object(faults, fault)
        if any(faults):
            raise RunFailed(next(filter(None, faults)))
        return start, rollbacks

    def _require_ours(self) -> None:
        """Before something is written or removed. All workers raise Stopped where the run is
        another driver's by now."""
        if (stop := self.setting.stops.now()) is Stop.LOST:
            raise Stopped(stop, 0)

    def _reason(self, collapse: Collapse) -> str:
        """Why a student has collapsed, with the file that tells more."""
        if not isinstance(collapse, NotFinite):
            return str(collapse)
        file = self.config.folder / "not_finite.jsonl"
        if self.rank == 0:
            write_samples(file, self.order, collapse.steps, self.corpora["shards"].shards)
        return f"{collapse}; their samples are in {file}"

    def trainer(self, start: checkpoint.Checkpoint | None, rollbacks: int) -> "StudentTrainer":
        """Of a student that starts from there, or from its first weights."""
        from engine.train.student import StudentTrainer  # the driver can do without DeepSpeed

        config, width = self.config, self.w_ND.shape[1]
        student = PromptedTower(
            self._tower(),
            config.student.prompts,
            config.student.depth,
            config.student.projector_width or width,
            width,
            config.seed,
            self.run_tower,
        )
        if start:
            student.load_state_dict(start.student)
        trainer = StudentTrainer(
            student.to(self.device),
            self.w_ND,
            self.clip.logit_scale,
            self.classes.logit_scale,
            replace(config.train, kernels=self.kernels),
            config.student.zero_stage,
            config.train.passes * self.order.steps,
            rollbacks,
            config.student.offload,
        )
        if start:
            trainer.load_optimizer(start.optimizer)
        return trainer

    def _tower(self) -> ImageTower:
        """The tower to train: the run's own, frozen, or a fresh one of its own fp32 weights."""
        told = self.config.student
        if told.trained_layers == 0:
            return self.clip.image
        clip = load_clip(told.model, told.weights, "student.")
        return TrainedTower(clip, told.trained_layers, told.precision == "bf16")

    def _compiled(self) -> Run | None:
        """What runs a frozen tower on this worker's share of a step."""
        told, tower = self.config.student, self.clip.image
        if told.trained_layers != 0 or not told.prompts:
            return None
        start_KPC = 0.02 * torch.randn(told.depth, told.prompts, tower.width, device=self.device)
        images = self.config.train.batch // self.world
        return compiled(tower, images, start_KPC.requires_grad_(), told.compile, "student.compile")

    def _after_pass(self, pass_: int, trainer: "StudentTrainer") -> None:
        if self.config.train.selection == "last":
            return
        weights, _ = trainer.state()
        student = self._bundle(weights).attached(self.clip, self.device)
        scores, _ = self._scores({"student": student}, None)
        self.selection.offer(pass_, scores["student"], weights, self.rank)

    def _teaches(self) -> TargetSource | None:
        return None if self.task.source == "synthetic" else self.source

    def _told(self, targets: Targets) -> Tensor:
        return unpack(targets.form, targets.values_BX, self.w_ND, self.classes.logit_scale)

    def _labels(self) -> dict[str, float]:
        """What the sources of all workers have done."""
        everyone: list[dict[str, float]] = [{}] * self.world
        dist.all_gather_object(everyone, self.source.statement())
        total: Counter[str] = Counter()
        for told in everyone:
            total.update(told)
        return dict(total)

    def _scores(
        self, models: dict[str, Model], source: TargetSource | None
    ) -> tuple[dict[str, Any], Ledger]:
        """Of all workers together, on the evaluation images."""
        held_out = self.corpora["evaluation"]
        mine = range(self.rank, len(held_out.blocks), self.world)
        base, batch = base_count(len(self.classes.names)), self.config.teacher.batch
        policy, threads = self.decoder.policy, self.config.student.threads
        data = self.config.corpus
        told: Callable[[Targets], Tensor] | None = self._told if source else None
        tallies, ledger = evaluate(
            models, source, held_out, mine, policy, threads, base, batch, self.device, data, told
        )
        scores = {}
        for name, counts in tallies.items():
            everyone = counts.to(self.device)
            dist.all_reduce(everyone)
            scores[name] = asdict(Score.of(everyone.cpu()))
        return scores, merged(ledger)

    def _bundle(self, weights: dict[str, Tensor]) -> Bundle:
        return Bundle.of(self.clip, self.config.student.weights, weights, self.classes)


def _kernels(asked: Impl, w_ND: Tensor) -> Impl:
    """What computes the losses on this worker's device: what was asked for, if it works here."""
    impl = chosen(asked, w_ND.device)
    why = trial(w_ND, impl) if impl == "triton" else ""
    if not why:
        return impl
    if asked == "triton":
        raise UserError(f"train.kernels: triton fails on {w_ND.device}: {why}")
    say(f"warning: losses by torch, since Triton's kernels fail on {w_ND.device}: {why}")
    return "torch"
