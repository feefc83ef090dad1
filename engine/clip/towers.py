"""CLIP towers: built by open_clip, loaded from disk, run the way distillation needs them.

Letters: B images, L tokens, P prompts, C tower width, D embedding width.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import open_clip
import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from engine.clip.archive import is_archive, read_archive
from engine.clip.layers import Layer, Tricks, fp32_norm
from engine.clip.learned import LearnedPrompts, read_prompts
from engine.clip.text import TextTower, plain_text
from engine.clip.weights import LOCAL, check_weights, local_config
from engine.config import UserError
from engine.progress import say

__all__ = [
    "DTYPES",
    "Clip",
    "ImageTower",
    "PatchEmbedding",
    "bf16_instructions",
    "folded",
    "half_precision",
    "load_clip",
    "trained_precision",
]

P = TypeVar("P", bound=str)
Tokenizer = Callable[..., Tensor]  # sentences -> token ids [N, L]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class ImageTower(nn.Module):
    """A CLIP vision transformer that takes raw pixels and, in any of its layers, prompts.

    The normalisation (x / 255 - mean) / std is folded into the patch embedding, exactly, so that
    uint8 pixels go in as they are.
    """

    def __init__(self, visual: VisionTransformer, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.pixels = int(visual.image_size[0])
        self.width = int(visual.transformer.width)
        self.layers = len(visual.transformer.resblocks)
        self.embed_dim = int(visual.output_dim)
        self.mean, self.std = tuple(mean), tuple(std)
        self.tricks = Tricks()
        self.patch = folded(visual.conv1.weight, mean, std)
        self.class_embedding = visual.class_embedding
        self.positional_embedding = visual.positional_embedding
        self.ln_pre = visual.ln_pre
        self.blocks = nn.ModuleList(Layer(block) for block in visual.transformer.resblocks)
        self.ln_post = visual.ln_post
        self.proj = visual.proj
        self.requires_grad_(False).eval()

    @property
    def dtype(self) -> torch.dtype:
        return self.patch.weight.dtype

    def forward(self, images_BCHW: Tensor, prompts_KPC: Tensor | None = None) -> Tensor:
        """Image features [B, D], not normalised, of uint8 images [B, 3, pixels, pixels].

        `prompts_KPC` are the prompts of the first K layers: those of layer 0 are appended after the
        patch tokens, without positional embedding and before `ln_pre`; those of layer i < K replace
        the prompts' outputs of layer i - 1 (PromptKD, section 3.3).
        """
        x = self.ln_pre(self._embedded(images_BCHW))
        batch, tokens = x.shape[:2]  # len() would fix it where the model is exported
        depth = 0 if prompts_KPC is None else len(prompts_KPC)
        last = self.layers - 1
        for i, layer in enumerate(self.blocks):
            prompts_PC = None
            if prompts_KPC is not None and i < depth:
                prompts_PC = prompts_KPC[i] if i else fp32_norm(self.ln_pre, prompts_KPC[0])
                replaced = i + 1 < depth or i == last
                if not (replaced and self.tricks.prompts_once):
                    # Widened before it is cast: so its gradient is summed over the images in fp32.
                    prompts_BPC = prompts_PC.expand(batch, -1, -1).to(x.dtype)
                    x, prompts_PC = torch.cat([x[:, :tokens], prompts_BPC], dim=1), None
            x = layer(x, prompts_PC, self.tricks.class_token and i == last)
        return self.ln_post(x[:, 0]) @ self.proj

    def _embedded(self, images_BCHW: Tensor) -> Tensor:
        """Tokens [B, L, C]: the class token, and patches in rows."""
        x = self.patch(images_BCHW, self.tricks.patch_product)
        x = torch.cat([self.class_embedding.expand(x.shape[0], 1, -1), x], dim=1)
        return x + self.positional_embedding


class PatchEmbedding(nn.Conv2d):
    """CLIP's first layer: a convolution whose steps are as long as its kernel."""

    def __init__(self, width: int, side: int, bias: bool = True) -> None:
        super().__init__(3, width, side, stride=side, bias=bias)

    def forward(self, images_BCHW: Tensor, product: bool = True) -> Tensor:
        """Patches [B, L, C], by one matrix `product` or by a convolution."""
        if not product:
            return super().forward(images_BCHW.to(self.weight.dtype)).flatten(2).transpose(1, 2)
        side = self.kernel_size[0]
        patches = images_BCHW.unfold(2, side, side).unfold(3, side, side)
        patches_BLX = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        return F.linear(patches_BLX.to(self.weight.dtype), self.weight.flatten(1), self.bias)


def folded(weight: Tensor, mean: Sequence[float], std: Sequence[float]) -> PatchEmbedding:
    """The patch embedding of raw pixels, fp32, from the weight of that of normalised ones."""
    exact = weight.detach().double()
    mean_3, std_3 = (exact.new_tensor(values) for values in (mean, std))
    scaled = exact / (255 * std_3).view(1, 3, 1, 1)
    shift = -(exact * (mean_3 / std_3).view(1, 3, 1, 1)).sum(dim=(1, 2, 3))
    patch = PatchEmbedding(len(weight), weight.shape[-1])
    patch.weight = nn.Parameter(scaled.float())
    patch.bias = nn.Parameter(shift.float())
    return patch


@dataclass(frozen=True)
class Clip:
    """A loaded CLIP: its two towers, the prompts it has learned, and what belongs to them."""

    name: str
    whole: Any  # open_clip's own model, both towers
    image: ImageTower
    text: TextTower
    prompts: LearnedPrompts | None
    tokenizer: Tokenizer
    logit_scale: float  # exp of the learned log scale, about 100
    backbone: str  # sha256 over the weights of both towers and the preprocessing
    fingerprint: str  # the same, with the prompts


def load_clip(model: str, weights: str, prefix: str, prompts: str = "") -> Clip:
    """Loads a CLIP onto the CPU in fp32, frozen, in eval mode.

    `model` is an open_clip architecture, with `weights` a checkpoint file (open_clip's own, or
    OpenAI's archive) or an open_clip tag, or `local-dir:FOLDER` (open_clip_config.json and
    weights). `prompts` is a file that read_prompts() reads. Only plain ViT towers that read their
    feature from the class token are supported. Errors are UserErrors, and name the fields that
    follow `prefix` (`teacher.`).
    """
    check_weights(model, weights, prefix)
    built = _built(model, weights, prefix)
    if not prompts:
        return _clip(built, model, None)
    where = f"{prefix}prompts: {prompts}"
    learned, tensors = read_prompts(Path(prompts), f"{prefix}prompts")
    _take_up(built, tensors, where)
    clip = _clip(built, model, learned)
    text, image = clip.text, clip.image
    learned.check((text.layers, text.width), (image.layers, image.width), where)
    if learned.backbone not in ("", clip.backbone):
        raise UserError(
            f"{where} belongs to another backbone: it was trained in {learned.backbone[:16]}, "
            f"{weights or model} is {clip.backbone[:16]}"
        )
    return clip


def _built(model: str, weights: str, prefix: str) -> Any:
    try:
        if model.startswith(LOCAL):
            return open_clip.create_model(model)
        if Path(weights).is_file() and is_archive(Path(weights)):
            built = open_clip.create_model(model, load_weights=False)
            built.load_state_dict(read_archive(Path(weights)))
            return built
        return open_clip.create_model(model, pretrained=weights)
    except RuntimeError as error:  # torch lists all keys that do not fit; the first lines will do
        why = " ".join(str(error).split()[:60])
        raise UserError(f"{prefix}weights: not a checkpoint of {model}: {why}") from None


def _take_up(built: Any, tensors: dict[str, Tensor], where: str) -> None:
    """Puts the backbone that a reference checkpoint holds in place of the one it started from, as
    the reference does. They differ by rounding alone: it averages frozen fp16 weights too."""
    if not tensors:
        return
    own = built.state_dict()
    strange = sorted(tensors.keys() - own.keys())
    lacking = sorted(own.keys() - tensors.keys() - {"token_embedding.weight"})
    if strange or lacking:
        what = f"holds {strange[0]}" if strange else f"lacks {lacking[0]}"
        raise UserError(f"{where} belongs to another backbone: it {what}")
    for key, tensor in tensors.items():
        if tensor.shape != own[key].shape:
            raise UserError(
                f"{where} belongs to another backbone: {key} is {tuple(tensor.shape)}, the model's "
                f"{tuple(own[key].shape)}"
            )
        if (tensor - own[key]).norm() > 0.1 * own[key].norm():
            raise UserError(f"{where} belongs to another backbone: its {key} is a different one")
    say(f"{where} brings its own copy of the backbone, which is used")
    built.load_state_dict(tensors, strict=False)


def _clip(built: Any, name: str, prompts: LearnedPrompts | None) -> Clip:
    built.requires_grad_(False).eval()
    visual = built.visual
    cfg = visual.preprocess_cfg
    preprocessing = (*cfg["mean"], *cfg["std"], *cfg["size"])  # tuples or, from a file, lists
    digest = hashlib.sha256(str(preprocessing).encode())
    for key, tensor in sorted(built.state_dict().items()):
        digest.update(f"{key} {tuple(tensor.shape)}".encode())
        digest.update(tensor.float().contiguous().numpy())
    backbone = digest.hexdigest()
    if prompts:
        digest.update(prompts.digest.encode())
    return Clip(
        name=name,
        whole=built,
        image=ImageTower(visual, cfg["mean"], cfg["std"]),
        text=TextTower(plain_text(built)),
        prompts=prompts,
        tokenizer=_tokenizer(name),
        logit_scale=float(built.logit_scale.exp()),
        backbone=backbone,
        fingerprint=digest.hexdigest(),
    )


def _tokenizer(model: str) -> Tokenizer:
    if not model.startswith(LOCAL):
        return open_clip.get_tokenizer(model)
    folder = Path(model.removeprefix(LOCAL))
    kwargs = dict(local_config(model)["text_cfg"].get("tokenizer_kwargs", {}))
    if "bpe_path" in kwargs:  # relative to the folder, so that it can be moved
        kwargs["bpe_path"] = str(folder / kwargs["bpe_path"])
    return open_clip.get_tokenizer(model, **kwargs)


def trained_precision(precision: P, device: str) -> P | Literal["fp32", "bf16"]:
    """Resolves "auto" for a frozen tower that gradients pass through: bf16 on a GPU, else fp32."""
    if precision != "auto":
        return precision
    return "bf16" if device == "cuda" else "fp32"


def bf16_instructions() -> str:
    """What this machine's CPU multiplies bf16 by, twice as fast as fp32 or more; empty: nothing."""
    if torch.cpu._is_amx_tile_supported():
        return "AMX"
    return "AVX512-BF16" if torch.cpu._is_avx512_bf16_supported() else ""


def half_precision(precision: P, device: torch.device) -> P | Literal["fp32", "bf16", "fp16"]:
    """Resolves "auto": fp16 on a GPU; on a CPU bf16 where it multiplies that faster, else fp32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "fp16"
    return "bf16" if bf16_instructions() else "fp32"
