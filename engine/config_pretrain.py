"""What stage I can be told."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from engine.config import Range, Run, Section, UserError, path_field, shards_field

__all__ = ["LearnConfig", "NamesConfig", "PretrainConfig", "PromptsConfig", "ShotsConfig"]


@dataclass(frozen=True, kw_only=True)
class ShotsConfig(Section):
    """The labelled images."""

    prefix: ClassVar[str] = "corpus."

    shards: str = shards_field()
    """Folder or glob of labelled shards (.cls), indexed; a few samples of each class are used."""
    evaluation: str = shards_field()
    """Folder or glob of held-out labelled shards. Empty: none."""
    shots: Annotated[int, Range(1)] = 16
    """Samples of a class."""
    hosts: tuple[str, ...] = ()
    """Hosts of URLs that may lie on private addresses, or be redirected to; HOST or HOST:PORT."""
    classes: Literal["base", "all"] = "base"
    """Classes to learn from: the first half, or (cross-dataset, few-shot) all."""


@dataclass(frozen=True, kw_only=True)
class NamesConfig(Section):
    """The class names."""

    prefix: ClassVar[str] = "classes."

    names: str = path_field()
    """Text file, one class name a line, in label order; the first half (rounded up) is base."""
    repeats: bool = False
    """Take names that come twice, as some of ImageNet's do."""


@dataclass(frozen=True, kw_only=True)
class ClipConfig(Section):
    """The CLIP that becomes the teacher; its own weights stay as they are."""

    prefix: ClassVar[str] = "teacher."

    model: str = ""
    """open_clip architecture (ViT-L-14-quickgelu), or local-dir:FOLDER."""
    weights: str = path_field()
    """Checkpoint file (.pt, .safetensors) or an open_clip tag. Not for local-dir."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the frozen towers; prompts stay fp32. auto: bf16 on a GPU, else fp32."""
    threads: Annotated[int, Range(0, 1024)] = 0
    """CPU threads; 0: one a core. Where others compute too, fewer may be much faster."""


@dataclass(frozen=True, kw_only=True)
class PromptsConfig(Section):
    """What is learned."""

    prefix: ClassVar[str] = "prompts."

    method: Literal["promptsrc", "maple"] = "promptsrc"
    """promptsrc: prompts of both towers, regulated by the zero-shot model; maple: text prompts, and
    couplers that make the vision prompts of them."""
    text: Annotated[int, Range(1, 1024)] = 4
    """Text prompts of a layer."""
    vision: Annotated[int, Range(1, 1024)] = 4
    """Vision prompts of a layer; with maple, as many as text prompts."""
    depth: Annotated[int, Range(1, 1024)] = 9
    """Layers of each tower with prompts of their own."""
    words: str = "a photo of a"
    """What stands before a class name; its first tokens are where the text prompts start from."""


@dataclass(frozen=True, kw_only=True)
class LearnConfig(Section):
    """How the prompts are learned."""

    prefix: ClassVar[str] = "train."

    passes: Annotated[int, Range(1, 1_000_000)] = 20
    """Traversals of the chosen samples."""
    crop_scale: Annotated[float, Range(0, 1, above=True)] = 0.08
    """Smallest share of the image's area that a view keeps."""
    batch: Annotated[int, Range(1, 65536)] = 8
    """Images of a step."""
    lr: Annotated[float, Range(0, above=True)] = 0.005
    """Peak learning rate of SGD, momentum 0.9; one pass at 1e-5, then a cosine, a step a pass."""
    weight_decay: Annotated[float, Range(0)] = 5e-4
    """L2 weight decay."""
    text_weight: Annotated[float, Range(0)] = 25.0
    """Of the L1 between prompted and zero-shot text features (promptsrc)."""
    image_weight: Annotated[float, Range(0)] = 10.0
    """Of the L1 between prompted and zero-shot image features (promptsrc)."""
    average_mean: Annotated[float, Range(0)] = 15.0
    """Pass at which the Gaussian average over passes peaks; 0: the last prompts are kept."""
    average_std: Annotated[float, Range(0, above=True)] = 1.0
    """Its standard deviation, in passes."""
    log_steps: Annotated[int, Range(1)] = 20
    """Steps between metric records."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(Run):
    """Adapts a CLIP teacher to a domain from a few labelled images, by learning prompts."""

    preset: Literal["promptsrc", "promptsrc-xd", "promptsrc-few-shot", "maple", "maple-xd"] = (
        "promptsrc"
    )
    """Settings to start from: the reference's, base-to-novel, cross-dataset (xd) or few-shot."""
    corpus: ShotsConfig = field(default_factory=ShotsConfig)
    classes: NamesConfig = field(default_factory=NamesConfig)
    teacher: ClipConfig = field(default_factory=ClipConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    train: LearnConfig = field(default_factory=LearnConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train.average_mean > self.train.passes:
            raise UserError(
                f"train.average_mean ({self.train.average_mean:g}) must be at most train.passes "
                f"({self.train.passes}); 0 keeps the last prompts"
            )
        if self.prompts.method == "maple" and self.prompts.text != self.prompts.vision:
            raise UserError(
                f"prompts.vision ({self.prompts.vision}) must be prompts.text "
                f"({self.prompts.text}) with prompts.method=maple"
            )
