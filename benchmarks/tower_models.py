"""CLIPs with random weights, the product's step of distillation with them, and what it costs.

Letters: B images, N classes, P prompts, K prompted layers, C tower width, D class vector width.
"""

import copy
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import open_clip
import torch
from photos import Photos
from reference_peer import TeacherPrompts
from torch import Tensor
from torch.nn import functional as F

from engine.clip.compiled import Run, compiled
from engine.clip.prompts import PromptedTower
from engine.clip.quantized import full_precision, quantized, require_device
from engine.clip.towers import DTYPES, ImageTower, half_precision, trained_precision
from kernels.kl import Features, distillation

if TYPE_CHECKING:
    from engine.data.decode import Decoder

__all__ = [
    "BACKWARD",
    "FORWARD",
    "KD_WEIGHT",
    "PRECISIONS",
    "SCALE",
    "TEXT",
    "Ours",
    "Pair",
    "default_precisions",
    "draw_images",
    "fast",
    "gflops",
    "image_tower",
    "normalised",
    "our_loader",
    "peer_precisions",
    "student_gflops",
    "student_of",
    "text_gflops",
]

PRECISIONS = {"cuda": ("fp32", "bf16", "fp16", "fp8", "int8"), "cpu": ("fp32", "bf16")}
PROMPTS, DEPTH, KD_WEIGHT, SCALE = 4, 9, 1000.0, 100.0
MEAN, STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
SMALL = {  # for smoke tests
    "embed_dim": 64,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"layers": 2, "width": 64, "heads": 2},
    "quick_gelu": True,
}

# FLOPs of an image in the plain tower: a trick that leaves work out is to show as speed.
# n layers of width C, L tokens of which P are prompts, patches of side p.
FORWARD = "n(24LC^2 + 4L^2C) + 6(L-1-P)p^2C"
BACKWARD = "n(24LC^2 + 8L^2C)"  # to the input alone: no gradients of weights
TEXT = "n(24LC^2 + 4L^2C)"


class Pair(NamedTuple):
    """Teacher and student, on the CPU in fp32, as open_clip makes them."""

    teacher: Any
    student: Any
    prompts: TeacherPrompts
    tokens_NL: Tensor
    w_ND: Tensor

    @classmethod
    def drawn(cls, teacher: str, student: str, classes: int) -> "Pair":
        torch.manual_seed(0)
        made = [_clip(name) for name in (teacher, student)]
        wide = made[0]
        text, vision = (
            0.02 * torch.randn(min(DEPTH, len(tower.resblocks)), PROMPTS, tower.width)
            for tower in (wide.transformer, wide.visual.transformer)
        )
        tokens_NL = open_clip.tokenize([f"a photo of a thing {n}." for n in range(classes)])
        w_ND = F.normalize(torch.randn(classes, wide.visual.output_dim), dim=-1)
        return cls(*made, TeacherPrompts(text, vision), tokens_NL, w_ND)

    @property
    def pixels(self) -> int:
        return int(self.student.visual.image_size[0])


def _clip(name: str) -> Any:
    built = open_clip.CLIP(**SMALL) if name == "small" else open_clip.create_model(name)
    return built.eval().requires_grad_(False)


def default_precisions(device: torch.device) -> tuple[str, str]:
    """The product's own choice, for a teacher and for a student."""
    return half_precision("auto", device), trained_precision("auto", device.type)


def peer_precisions(device: torch.device) -> tuple[str, str]:
    """Of open_clip's towers: bf16 on a GPU, else as ours."""
    return ("bf16", "bf16") if device.type == "cuda" else default_precisions(device)


def draw_images(batch: int, pixels: int, device: torch.device) -> Tensor:
    """uint8 [B, 3, S, S]."""
    generator = torch.Generator().manual_seed(batch)
    images = torch.randint(0, 256, (batch, 3, pixels, pixels), generator=generator)
    return images.to(device, torch.uint8)


def normalised(images_BCHW: Tensor, dtype: torch.dtype) -> Tensor:
    mean, std = (images_BCHW.new_tensor(v, dtype=torch.float).view(3, 1, 1) for v in (MEAN, STD))
    return ((images_BCHW / 255 - mean) / std).to(dtype)


def gflops(visual: Any, prompts: int = PROMPTS) -> float:
    """FORWARD of an image, in a tower with prompts, whose tokens count in all layers."""
    patches, side, width = _patches(visual), visual.patch_size[0], visual.transformer.width
    layers = _layers(visual.transformer, patches + 1 + prompts, attention=4)
    return (layers + 6 * patches * side**2 * width) / 1e9


def student_gflops(visual: Any) -> float:
    """FORWARD and BACKWARD."""
    tokens = _patches(visual) + 1 + PROMPTS
    return gflops(visual) + _layers(visual.transformer, tokens, attention=8) / 1e9


def text_gflops(clip: Any) -> float:
    """TEXT, of a sentence."""
    return _layers(clip.transformer, clip.context_length, attention=4) / 1e9


def _patches(visual: Any) -> int:
    return int(visual.image_size[0] // visual.patch_size[0]) ** 2


def _layers(tower: Any, tokens: int, attention: int) -> int:
    width = int(tower.width)
    return len(tower.resblocks) * (24 * tokens * width**2 + attention * tokens**2 * width)


# ---------------------------------------------------------------- ours


def image_tower(visual: Any, precision: str, device: torch.device) -> ImageTower:
    """The product's tower, of a copy of the weights."""
    tower = ImageTower(copy.deepcopy(visual), MEAN, STD)
    tower.to(device, DTYPES[full_precision(precision, device)])
    if precision in DTYPES:
        return tower
    require_device(precision, device)
    return quantized(tower, precision)


def fast(tower: ImageTower, images: int, prompts_KPC: Tensor) -> Run:
    """The product's tower, compiled as the product does it."""
    return compiled(tower, images, prompts_KPC, "on", "tower.compile")


def student_of(pair: Pair, precision: str, device: torch.device, images: int = 0) -> PromptedTower:
    """Compiled for batches of so many `images`, if any."""
    tower = image_tower(pair.student.visual, precision, device)
    width = pair.w_ND.shape[1]
    depth, run = min(DEPTH, tower.layers), None
    if images:
        start_KPC = 0.02 * torch.randn(depth, PROMPTS, tower.width, device=device)
        run = fast(tower, images, start_KPC.requires_grad_())
    student = PromptedTower(tower, PROMPTS, depth, hidden=width, outputs=width, seed=1, run=run)
    return student.to(device)


class Ours:
    """A step by the product's towers, prompts and kernels; with torch's SGD, as its peers have it:
    not DeepSpeed's engine, nor Ray."""

    def __init__(
        self, pair: Pair, device: torch.device, precisions: tuple[str, str], images: int = 0
    ) -> None:
        """Compiled for batches of so many `images`, if any."""
        self._prompts, self._w_ND = pair.prompts.vision_KPC.to(device), pair.w_ND.to(device)
        self._student = student = student_of(pair, precisions[1], device, images)
        tower = image_tower(pair.teacher.visual, precisions[0], device)
        self._teacher = fast(tower, images, self._prompts) if images else tower
        self._optimizer = torch.optim.SGD(
            student.parameters(), lr=0.005, momentum=0.9, weight_decay=5e-4
        )

    def step(self, images_BCHW: Tensor) -> Tensor:
        """Learns from uint8 images; the loss, on the device."""
        self._optimizer.zero_grad()
        with torch.inference_mode():
            u_BD = F.normalize(self._teacher(images_BCHW, self._prompts).float(), dim=-1)
        losses = distillation(
            self._student(images_BCHW, unit=False),
            Features(u_BD, SCALE),
            self._w_ND,
            SCALE,
            kl_weight=KD_WEIGHT / len(self._w_ND),
        )
        loss = losses.loss_B.mean()
        loss.backward()
        self._optimizer.step()
        return loss.detach()


def our_loader(
    photos: Photos, decoder: "Decoder", batch: int, device: torch.device
) -> tuple[Iterator[Tensor], Callable[[], None]]:
    """Batches on the device, without end, by the product's loader; and how to close it."""
    from engine.data.batches import training_works
    from engine.data.corpus import Corpus
    from engine.data.loader import Loader
    from engine.data.order import Order

    corpus = Corpus.open(str(photos.folder), photos.images // len(photos.shards))
    order = Order(corpus.blocks, 4, batch, 4 * corpus.blocks.block_samples, seed=1)
    passes = 10**6
    works = training_works(order, passes, passes, 0, 1, 0)
    made = Loader(corpus, decoder, works, 1 << 30, device=device)

    def close() -> None:
        made.close()
        corpus.close()

    return (one.here() for one in made), close
