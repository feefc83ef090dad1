"""What a run can be told: frozen dataclasses that check their own ranges."""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

from braceexpand import braceexpand

__all__ = [
    "ClassesConfig",
    "Colleague",
    "Compile",
    "CorpusConfig",
    "Drained",
    "Precision",
    "Range",
    "RayConfig",
    "Run",
    "RunConfig",
    "RunFailed",
    "Section",
    "StudentConfig",
    "TargetsConfig",
    "TeacherConfig",
    "TeacherPrecision",
    "TrackConfig",
    "TrainConfig",
    "UserError",
    "absolute",
    "shards_field",
    "share_of",
    "to_dict",
]

Precision = Literal["auto", "fp32", "bf16", "fp16"]
Compile = Literal["auto", "on", "off"]
TeacherPrecision = Literal["auto", "fp32", "bf16", "fp16", "fp8", "int8"]
# Metadata of fields that name them.
PATH, PATHS, SHARDS = {"path": "one"}, {"path": "each"}, {"path": "several"}


class UserError(ValueError):
    """The user can mend this: printed as one message, without a traceback."""


class RunFailed(RuntimeError):
    """A run has come to nothing; one message tells why, and no traceback is shown."""


class Drained(KeyboardInterrupt):
    """A signal has stopped a run, which `--resume` goes on with. No `except Exception` is to keep
    it."""

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Range:
    """Bounds of a number in a config field, both included; `above` excludes the lower one."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False

    def complaint(self, value: float) -> str | None:
        below = value <= self.low if self.above else value < self.low
        if not (below or value > self.high or not math.isfinite(value)):
            return None
        floor = f"{'greater than' if self.above else 'at least'} {self.low:g}"
        ceiling = "" if self.high == math.inf else f" and at most {self.high:g}"
        return f"must be {floor}{ceiling}, got {value}"


class Section:
    """Base of every config dataclass: checks the `Range` of its fields when it is made."""

    prefix: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            if get_origin(hint) is not Annotated:
                continue
            for bound in get_args(hint)[1:]:
                value = getattr(self, name)
                if isinstance(bound, Range) and value is not None:
                    if why := bound.complaint(value):
                        raise UserError(f"{self.prefix}{name} {why}")


def shards_field() -> Any:
    """A field that names shards: folders, globs, URLs, with braces, `::` between."""
    return field(default="", metadata=SHARDS)


def path_field(default: str = "") -> Any:
    """A field that names a file, folder or glob."""
    return field(default=default, metadata=PATH)


@dataclass(frozen=True, kw_only=True)
class CorpusConfig(Section):
    """The unlabeled images, and the images to evaluate on."""

    prefix: ClassVar[str] = "corpus."

    shards: str = shards_field()
    """Shards that `promptkd index` has indexed: a folder, glob or URL (https, s3, gs, hf), with
    {000..999} for numbers and :: between several."""
    evaluation: str = shards_field()
    """Held-out shards, named likewise; labels (.cls) give base/novel accuracy. Empty: none."""
    samples: str = path_field()
    """List of the samples to train on, as `promptkd store curate` writes it; the evaluation is not
    touched by it. Empty: all."""
    block_samples: Annotated[int, Range(1, 65536)] = 512
    """Most samples in a block, the unit of reading and labelling."""
    window_blocks: Annotated[int, Range(1, 4096)] = 4
    """Samples are shuffled within this many blocks of a lane."""
    lanes: Annotated[int, Range(1, 65536)] = 4
    """Lanes of a pass: a multiple of every number of student workers the run may have."""
    memory_gb: Annotated[float, Range(0, above=True)] = 4.0
    """Most encoded images a worker holds; blocks beyond it are read again when they are needed."""
    view_seed: Annotated[int | None, Range(0, 2**63 - 1)] = None
    """Of the views alone, so that runs of several seeds can share a store. None: the run's seed."""
    max_skipped: Annotated[float, Range(0, 1)] = 0.1
    """Largest share of images that may turn out unusable, beyond those that the index excludes,
    before the run stops."""
    hardware_jpeg: Annotated[float, Range(0, 1)] = 0.65
    """Share of a batch's JPEGs for the hardware decoder of a GPU that has one."""
    isolate: bool = False
    """Decode in a child process, so that an image that crashes or hangs a decoder costs itself and
    no worker; CPU decoding only."""
    hosts: tuple[str, ...] = ()
    """Hosts of URLs that may lie on private addresses, or be redirected to; HOST or HOST:PORT."""
    timeout_s: Annotated[float, Range(0, above=True)] = 30.0
    """Of a URL: longest wait for a byte."""
    retries: Annotated[int, Range(0, 1000)] = 5
    """Of a URL: times that a read is tried again, from where it broke off."""
    cache: str = path_field()
    """Folder for blocks read from URLs, shared by what runs on a node. Empty: none."""
    cache_gb: Annotated[float, Range(0, above=True)] = 50.0
    """Most the cache holds; what was used longest ago goes first."""


@dataclass(frozen=True, kw_only=True)
class ClassesConfig(Section):
    """The class names and their vectors, shared by teacher and student."""

    prefix: ClassVar[str] = "classes."

    names: str = path_field()
    """Text file, one class name a line, in label order; the first half (rounded up) is base."""
    repeats: bool = False
    """Take names that come twice, as some of ImageNet's do."""
    vectors: str = path_field()
    """Class vectors stored by `promptkd classes`. Empty: computed from the teacher at the start."""
    template: str = "a photo of a {}."
    """Sentence around a class name; for a mean over several, imagenet-80, -60, -7, or a file of
    them. Learned prompts bring their own."""


@dataclass(frozen=True, kw_only=True)
class TeacherConfig(Section):
    """The frozen CLIP that labels."""

    prefix: ClassVar[str] = "teacher."

    model: str = ""
    """open_clip architecture (ViT-L-14-quickgelu), or local-dir:FOLDER."""
    weights: str = path_field()
    """Checkpoint file (.pt, .safetensors) or an open_clip tag. Not for local-dir."""
    prompts: str = path_field()
    """Prompts learned by `promptkd pretrain`, or a checkpoint of the reference's PromptSRC or MaPLe
    (model.pth.tar-20). Empty: zero-shot."""
    precision: TeacherPrecision = "auto"
    """auto: fp16 on a GPU; on a CPU bf16 where it has AMX or AVX512-BF16, else fp32. fp8 (GPUs of
    compute capability 8.9 or more) and int8 (8.0 or more) are faster there, and are compared with
    fp16 on the run's first 256 images. On a CPU they are slow, and for trying out."""
    compile: Compile = "auto"
    """The tower by torch.compile, which takes a minute or so of the start; auto: on GPUs, where it
    works there; on: or not at all."""
    max_kl: Annotated[float, Range(0)] = 0.02
    """Of fp8 and int8: largest mean KL, in nats, of the teacher's answers from those in fp16 (CPU:
    fp32); beyond it the run stops. Features of cosine 0.999 to those of fp16 come to about 0.01."""
    min_agreement: Annotated[float, Range(0, 1)] = 0.93
    """Of fp8 and int8: smallest share of images whose top class is that of fp16."""
    weight: Annotated[float, Range(0, above=True)] = 1.0
    """Of this teacher's probabilities, where there are several."""
    actors: Annotated[int, Range(0, 100_000)] = 0
    """Teacher actors in the pool (targets.source = stream), the fewest; 0: chosen."""
    max_actors: Annotated[int, Range(0, 100_000)] = 0
    """Most teacher actors, started where students wait for labels. 0: as many as actors."""
    gpus: Annotated[float | None, Range(0, 1)] = None
    """GPUs of one actor. None: one where the cluster has GPUs, else none."""
    cpus: Annotated[float, Range(0, 1024)] = 0
    """Ray CPUs reserved for one actor; 0 lets it share."""
    resource: str = ""
    """Custom resource of the nodes that teachers may run on, as their `ray start --resources` names
    it; each takes a thousandth. Empty: any node."""
    threads: Annotated[int, Range(0, 1024)] = 0
    """CPU threads of one actor, for decoding and for a forward on CPU. 0: its GPUs' share of the
    cluster's CPUs, or 1 where it has no GPU."""
    batch: Annotated[int, Range(1, 65536)] = 256
    """Images of one forward."""


@dataclass(frozen=True, kw_only=True)
class StudentConfig(Section):
    """The CLIP image tower that learns: through prompts and a projector, or as a whole."""

    prefix: ClassVar[str] = "student."

    model: str = ""
    """open_clip architecture (ViT-B-16-quickgelu), or local-dir:FOLDER."""
    weights: str = path_field()
    """Checkpoint file (.pt, .safetensors) or an open_clip tag. Not for local-dir."""
    precision: Precision = "auto"
    """Of a frozen tower; what is trained stays fp32, and bf16 is then autocast around it. auto:
    bf16 on a GPU, else fp32."""
    compile: Compile = "auto"
    """The frozen tower by torch.compile, which takes a minute or so of the start; auto: on GPUs,
    where it works there; on: or not at all."""
    trainable: str = "prompts"
    """What is trained, beside the projector: prompts; last:K, them and the tower's last K layers;
    full, them and all of the tower."""
    prompts: Annotated[int, Range(0, 1024)] = 4
    """Visual prompts of a layer; 0: none."""
    depth: Annotated[int, Range(1, 1024)] = 9
    """Layers with prompts of their own."""
    projector_width: Annotated[int, Range(0, 65536)] = 0
    """Hidden width of the projector; 0: the teacher's embedding width."""
    workers: Annotated[int, Range(1, 65536)] = 1
    """Student workers (DeepSpeed ranks)."""
    gpus: Annotated[float | None, Range(0, 1)] = None
    """GPUs of one worker. None: one where the cluster has GPUs, else none."""
    cpus: Annotated[float, Range(0, 1024, above=True)] = 1
    """Ray CPUs reserved for one worker."""
    resource: str = ""
    """Custom resource of the nodes that workers may run on, as for teachers. Empty: any node."""
    threads: Annotated[int, Range(0, 1024)] = 0
    """CPU threads of one worker, for decoding and for a step on CPU. 0: its GPUs' share of the
    cluster's CPUs, or 1 where it has no GPU."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage."""
    offload: bool = False
    """Keep the optimizer's state, and its step, on the CPU (ZeRO-Offload)."""
    timeout_s: Annotated[float, Range(1)] = 60.0
    """A worker that gives no sign of life for so long is given up, and all are restarted from the
    last checkpoint. One that is alive may wait for labels, and others for it, targets.timeout_s
    longer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        kind, colon, layers = self.trainable.partition(":")
        counted = kind == "last" and layers.isascii() and layers.isdigit() and int(layers) > 0
        if not counted and (colon or kind not in ("prompts", "full")):
            raise UserError(
                f"student.trainable must be prompts, full or last:K, got {self.trainable!r}"
            )
        if self.trained_layers != 0 and self.precision == "fp16":
            raise UserError(
                "student.precision: fp16 is for frozen towers; with student.trainable = "
                f"{self.trainable} it must be bf16 or fp32"
            )
        if self.compile == "on" and (self.trained_layers != 0 or not self.prompts):
            raise UserError("student.compile: on is for frozen towers with prompts")
        if self.offload and self.zero_stage == 0:
            raise UserError("student.offload needs student.zero_stage 1, 2 or 3")

    @property
    def trained_layers(self) -> int | None:
        """The tower's last layers that are trained; None: all of it, its embeddings too."""
        if self.trainable == "full":
            return None
        return int(self.trainable.removeprefix("last:")) if self.trainable != "prompts" else 0


@dataclass(frozen=True, kw_only=True)
class TargetsConfig(Section):
    """Where a student's soft targets come from."""

    prefix: ClassVar[str] = "targets."

    source: Literal["auto", "inline", "stream", "store", "synthetic"] = "auto"
    """inline: a teacher in every student worker; stream: a pool of teacher actors; store: recorded
    labels alone; auto: of these three what serves best; synthetic: noise, to time a student by."""
    store: str = path_field()
    """Folder or URL (s3, gs) of recorded labels: what is there is not asked again, and what is not
    is recorded. Empty: none."""
    add_labelling: bool = False
    """Record into a store that holds other labellings alone."""
    precision: Literal["fp16", "int8"] = "fp16"
    """Of labels as they are sent and stored; int8 is half as large, and tells what KL it costs."""
    fusion: Literal["mean", "confidence"] = "mean"
    """Of several teachers: mean of their probabilities by teacher.weight, or by that times each
    one's largest probability."""
    outstanding: Annotated[int | None, Range(1, 1024)] = None
    """Blocks a student worker has asked for and not yet received, at most. None: four for each
    teacher, over all workers."""
    memory_gb: Annotated[float, Range(0)] = 1.0
    """Labels that a teacher holds for other students of the run."""
    timeout_s: Annotated[float, Range(1)] = 600.0
    """A label that takes longer stops the run."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Section):
    """How the student learns."""

    prefix: ClassVar[str] = "train."

    passes: Annotated[int, Range(1, 1_000_000)] = 20
    """Traversals of the corpus."""
    views: Annotated[int, Range(0, 1_000_000)] = 0
    """Different random views of an image the passes cycle through; 0: one a pass."""
    crop_scale: Annotated[float, Range(0, 1, above=True)] = 0.08
    """Smallest share of the image's area that a view keeps."""
    batch: Annotated[int, Range(1, 16_777_216)] = 256
    """Images of a step, over all workers: a multiple of corpus.lanes."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum 0.9, or AdamW."""
    lr: Annotated[float, Range(0, above=True)] = 0.005
    """Peak learning rate; for sgd that of a step of lr_batch images."""
    lr_batch: Annotated[int, Range(0, 16_777_216)] = 8
    """With sgd the learning rate grows in proportion to batch / lr_batch. 0: it stays as it is."""
    schedule: Literal["steps", "epochs"] = "steps"
    """steps: warm-up, then a cosine to zero; epochs: the paper's, stepped once a pass."""
    weight_decay: Annotated[float, Range(0)] = 5e-4
    """L2 (sgd) or decoupled (adamw) weight decay."""
    warmup_steps: Annotated[int, Range(0)] = 20
    """Linear warm-up of schedule = steps; at most a fifth of the run."""
    temperature: Annotated[float, Range(0, above=True)] = 1.0
    """tau of the KL; both logit scales are divided by it."""
    kd_weight: Annotated[float, Range(0)] = 1000.0
    """Factor of the KL after its reduction; the paper has 200 for Aircraft, Flowers and DTD."""
    reduction: Literal["paper", "batchmean"] = "paper"
    """batchmean: sum over classes, mean over images; paper: that divided by N classes as well."""
    cosine_weight: Annotated[float, Range(0)] = 0.0
    """Factor of 1 - cosine between teacher's and student's logits, each less their mean."""
    feature_weight: Annotated[float, Range(0)] = 0.0
    """Factor of the distance between teacher's and student's unit features."""
    feature: Literal["l1", "mse"] = "l1"
    """That distance: absolute (l1) or squared (mse) differences, summed over the dimensions."""
    kernels: Literal["auto", "reference", "torch", "triton"] = "auto"
    """What computes KL and cosine: fused kernels (triton), tiles in plain torch, or the definitions
    (reference). auto: triton on GPUs, else torch."""
    selection: Literal["last", "paper", "paper-xd"] = "last"
    """Which weights are kept: the last, or those of the pass with the best accuracy on
    corpus.evaluation, among base classes (paper) or all (paper-xd), as the paper does, which looks
    at the test labels."""
    judge_images: Annotated[int, Range(1)] = 2000
    """Images between judgements of whether the student still learns."""
    rollbacks: Annotated[int, Range(0, 100)] = 2
    """Times a collapsed student goes back to its last good checkpoint, at half the learning rate;
    after that the run stops."""
    max_not_finite: Annotated[int, Range(1)] = 10
    """Steps in a row whose loss or gradients are not finite on any worker; a student that comes to
    so many has collapsed. Their samples are told in not_finite.jsonl of the run folder."""
    checkpoint_steps: Annotated[int, Range(1)] = 500
    """Steps between checkpoints, or fewer where a pass is shorter; one is always written at the
    end."""
    keep_last: Annotated[int, Range(1)] = 2
    """Checkpoints that are kept, the newest; and beside them the newest of a student that learns
    well."""
    keep_every: Annotated[int, Range(0)] = 0
    """Also keep the first checkpoint of every so many steps. 0: none."""
    checkpoint_copy: str = path_field()
    """Folder or URL (s3, gs) to which every checkpoint is copied too, under the run's name; from
    there --resume goes on where the run folder is lost, or has no checkpoint. Empty: none."""
    log_steps: Annotated[int, Range(1)] = 10
    """Steps between metric records."""
    max_failures: Annotated[int, Range(-1)] = 3
    """Times the student workers are restarted from the last checkpoint; -1: without limit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kd_weight == self.cosine_weight == self.feature_weight == 0:
            raise UserError(
                "train.kd_weight, train.cosine_weight and train.feature_weight are all 0: "
                "nothing would be learned"
            )


@dataclass(frozen=True, kw_only=True)
class RayConfig(Section):
    """The Ray cluster to use."""

    prefix: ClassVar[str] = "ray."

    address: str = ""
    """Cluster to join (host:port, or auto). Empty: RAY_ADDRESS if set, else a local one."""
    start_timeout_s: Annotated[float, Range(1)] = 300.0
    """Longest wait for the cluster to have room."""


@dataclass(frozen=True, kw_only=True)
class TrackConfig(Section):
    """Who is told a run's numbers as they come, beside its own files. None of them can stop it."""

    prefix: ClassVar[str] = "track."

    to: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = ("tensorboard",)
    """tensorboard: event files in the run folder; wandb, trackio, mlflow: where they are installed,
    set up as each is by its own environment variables."""
    project: str = "promptkd"
    """The project, or experiment, that the run belongs to there."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len({*self.to}) < len(self.to):
            raise UserError(f"track.to names one twice: {', '.join(self.to)}")
        if not self.project.strip() or "/" in self.project:
            raise UserError(f"track.project must be a plain name, got {self.project!r}")


@dataclass(frozen=True, kw_only=True)
class Run(Section):
    """What every run has: a name, a folder, a seed and a device."""

    name: str
    """Name of the run; its folder is runs_dir/name."""
    runs_dir: str = path_field("runs")
    """Where run folders are kept."""
    overwrite: bool = False
    """Replace the run folder if it holds a finished or broken run."""
    seed: Annotated[int, Range(0, 2**63 - 1)] = 1
    """Of the order, the views, the first weights, and the choice of samples in stage I."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is a GPU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.name or self.name in (".", "..") or "/" in self.name or "\\" in self.name:
            raise UserError(f"name must be a plain folder name, got {self.name!r}")

    @property
    def folder(self) -> Path:
        return Path(self.runs_dir) / self.name


@dataclass(frozen=True, kw_only=True)
class Colleague(Section):
    """One more teacher of a run, by a file of its own."""

    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    classes: ClassesConfig = field(default_factory=ClassesConfig)


@dataclass(frozen=True, kw_only=True)
class RunConfig(Run):
    """Distils a teacher into a student over unlabeled images."""

    preset: Literal["fast", "paper", "paper-xd"] = "fast"
    """Settings to start from: large steps (fast), the paper's, or its cross-dataset ones."""
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    classes: ClassesConfig = field(default_factory=ClassesConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    teachers: tuple[str, ...] = field(default=(), metadata=PATHS)
    """TOML files of more teachers ([teacher] and, without names, [classes]), whose answers are
    fused with the first one's into one soft target."""
    student: StudentConfig = field(default_factory=StudentConfig)
    targets: TargetsConfig = field(default_factory=TargetsConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    track: TrackConfig = field(default_factory=TrackConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.corpus.lanes % self.student.workers:
            raise UserError(
                f"corpus.lanes ({self.corpus.lanes}) must be a multiple of "
                f"student.workers ({self.student.workers})"
            )
        most, least = self.teacher.max_actors, self.teacher.actors
        if 0 < most < least:
            raise UserError(f"teacher.max_actors ({most}) is less than teacher.actors ({least})")
        if self.targets.source == "store" and not self.targets.store:
            raise UserError("targets.store: targets.source is store, so it must name one")
        if self.train.batch % self.corpus.lanes:
            raise UserError(
                f"train.batch ({self.train.batch}) must be a multiple of "
                f"corpus.lanes ({self.corpus.lanes})"
            )

    @property
    def views(self) -> int:
        return min(self.train.views or self.train.passes, self.train.passes)

    @property
    def view_seed(self) -> int:
        return self.seed if self.corpus.view_seed is None else self.corpus.view_seed


T = TypeVar("T")


def share_of(resource: str) -> dict[str, float]:
    """What an actor takes of a custom Ray resource, "" for none: so little that a node with one of
    it has room for a thousand."""
    return {resource: 0.001} if resource else {}


def to_dict(config: Any) -> dict[str, Any]:
    """The resolved config as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def absolute(config: T) -> T:
    """The same config with every path made absolute, so that it means the same on another node."""
    changes: dict[str, Any] = {}
    for f in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            changes[f.name] = absolute(value)
        elif f.metadata == PATH and value and "://" not in value:
            is_tag = f.name == "weights" and not Path(value).exists()
            changes[f.name] = value if is_tag else str(Path(value).absolute())
        elif f.metadata == PATHS:
            changes[f.name] = tuple(str(Path(path).absolute()) for path in value)
        elif f.metadata == SHARDS and value:
            parts = [value] if Path(value).exists() else value.split("::")
            changes[f.name] = "::".join(map(_absolute, parts))
        elif f.name == "model" and value.startswith("local-dir:"):
            folder = Path(value.removeprefix("local-dir:"))
            changes[f.name] = f"local-dir:{folder.absolute()}"
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]


def _absolute(part: str) -> str:
    """Some shards, by absolute paths: where a brace comes first, each of what it stands for."""
    if "://" in part:
        return part
    names = braceexpand(part) if part.startswith("{") and not Path(part).exists() else [part]
    return "::".join(str(Path(name).absolute()) for name in names)
