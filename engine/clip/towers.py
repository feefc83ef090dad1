"""CLIP towers: built by open_clip, loaded from disk, run the way distillation needs them.

Letters: B images, L tokens, P prompts, C tower width, D embedding width.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
from open_clip.transformer import VisionTransformer
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from engine.config import Precision, UserError

__all__ = [
    "Clip",
    "ImageTower",
    "check_weights",
    "half_precision",
    "load_clip",
    "vision_shape",
]

LOCAL = "local-dir:"
Tokenizer = Callable[[list[str]], Tensor]
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
        self.patch = _folded(visual.conv1, torch.tensor(mean), torch.tensor(std))
        self.class_embedding = visual.class_embedding
        self.positional_embedding = visual.positional_embedding
        self.ln_pre = visual.ln_pre
        self.blocks = visual.transformer.resblocks
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
        x = self.patch(images_BCHW.to(self.dtype)).flatten(2).transpose(1, 2)
        batch = x.shape[0]  # len() would fix it where the model is exported
        x = torch.cat([self.class_embedding.expand(batch, 1, -1), x], dim=1)
        x = x + self.positional_embedding
        depth = 0 if prompts_KPC is None else len(prompts_KPC)
        for i, block in enumerate(self.blocks):
            if i == 0 and prompts_KPC is not None:
                x = torch.cat([x, prompts_KPC[0].to(x.dtype).expand(batch, -1, -1)], dim=1)
            elif i < depth and prompts_KPC is not None:
                kept = x[:, : -prompts_KPC.shape[1]]
                x = torch.cat([kept, prompts_KPC[i].to(x.dtype).expand(batch, -1, -1)], dim=1)
            x = block(self.ln_pre(x) if i == 0 else x)
        return self.ln_post(x[:, 0]) @ self.proj


def _folded(conv1: nn.Conv2d, mean: Tensor, std: Tensor) -> nn.Conv2d:
    weight = conv1.weight.detach().double()
    scaled = weight / (255 * std.double()).view(1, 3, 1, 1)
    shift = -(weight * (mean.double() / std.double()).view(1, 3, 1, 1)).sum(dim=(1, 2, 3))
    side = conv1.weight.shape[-1]
    patch = nn.Conv2d(3, len(weight), side, stride=side)
    patch.weight = nn.Parameter(scaled.float())
    patch.bias = nn.Parameter(shift.float())
    return patch


@dataclass(frozen=True)
class Clip:
    """A loaded CLIP: its image tower, its text tower, and what belongs to them."""

    name: str
    whole: Any  # open_clip's own model, both towers
    image: ImageTower
    encode_text: Callable[[Tensor], Tensor]  # token ids [N, context] -> features [N, D]
    tokenizer: Tokenizer
    logit_scale: float  # exp of the learned log scale, about 100
    fingerprint: str  # sha256 over the weights of both towers and the preprocessing


def load_clip(model: str, weights: str, prefix: str) -> Clip:
    """Loads a CLIP onto the CPU in fp32, frozen, in eval mode.

    `model` is an open_clip architecture, with `weights` a checkpoint file or an open_clip tag, or
    `local-dir:FOLDER` (open_clip_config.json and weights). Only plain ViT towers that read their
    feature from the class token are supported. Errors are UserErrors, and name the fields that
    follow `prefix` (`teacher.`).
    """
    check_weights(model, weights, prefix)
    return _clip(_built(model, weights, prefix), model)


def _built(model: str, weights: str, prefix: str) -> Any:
    try:
        if model.startswith(LOCAL):
            return open_clip.create_model(model)
        return open_clip.create_model(model, pretrained=weights)
    except RuntimeError as error:  # torch lists all keys that do not fit; the first lines will do
        why = " ".join(str(error).split()[:60])
        raise UserError(f"{prefix}weights: not a checkpoint of {model}: {why}") from None


def _clip(built: Any, name: str) -> Clip:
    built.requires_grad_(False).eval()
    visual = built.visual
    cfg = visual.preprocess_cfg
    preprocessing = (*cfg["mean"], *cfg["std"], *cfg["size"])  # tuples or, from a file, lists
    digest = hashlib.sha256(str(preprocessing).encode())
    for key, tensor in sorted(built.state_dict().items()):
        digest.update(f"{key} {tuple(tensor.shape)}".encode())
        digest.update(tensor.float().contiguous().numpy())
    return Clip(
        name=name,
        whole=built,
        image=ImageTower(visual, cfg["mean"], cfg["std"]),
        encode_text=built.encode_text,
        tokenizer=_tokenizer(name),
        logit_scale=float(built.logit_scale.exp()),
        fingerprint=digest.hexdigest(),
    )


def _tokenizer(model: str) -> Tokenizer:
    if not model.startswith(LOCAL):
        return open_clip.get_tokenizer(model)
    folder = Path(model.removeprefix(LOCAL))
    kwargs = dict(_local_config(model)["text_cfg"].get("tokenizer_kwargs", {}))
    if "bpe_path" in kwargs:  # relative to the folder, so that it can be moved
        kwargs["bpe_path"] = str(folder / kwargs["bpe_path"])
    return open_clip.get_tokenizer(model, **kwargs)


def _local_config(model: str) -> dict[str, Any]:
    config = Path(model.removeprefix(LOCAL)) / "open_clip_config.json"
    return json.loads(config.read_text())["model_cfg"]


class VisionShape(NamedTuple):
    """What can be known of an image tower without building it."""

    pixels: int  # side of the square images it takes
    layers: int


def vision_shape(model: str) -> VisionShape:
    """Of an open_clip architecture or a local-dir."""
    local = model.startswith(LOCAL)
    vision = (_local_config(model) if local else open_clip.get_model_config(model))["vision_cfg"]
    size = vision["image_size"]
    return VisionShape(int(size[0] if isinstance(size, list) else size), int(vision["layers"]))


def half_precision(precision: Precision, device: torch.device) -> Precision:
    """Resolves "auto": fp16 on a GPU; on a CPU bf16 where it has AMX tiles, else fp32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "fp16"
    return "bf16" if torch.cpu._is_amx_tile_supported() else "fp32"


# ---------------------------------------------------------------- checks before a model is built


def check_weights(model: str, weights: str, prefix: str) -> None:
    """Raises UserError unless the model is a plain ViT CLIP that its checkpoint's tensors fit."""
    path = _checkpoint(model, weights, prefix)
    bare = _bare(model, prefix)
    _require_plain(bare.visual, model, prefix)
    if path is None:
        return  # open_clip downloads it, and checks it then
    field = f"{prefix}model" if model.startswith(LOCAL) else f"{prefix}weights"
    found = _shapes(path, field)
    for key, tensor in bare.state_dict().items():
        if "positional_embedding" in key or (key not in found and not key.startswith("visual.")):
            continue  # open_clip fits positions to the model, and names of older text towers
        if key not in found:
            raise UserError(f"{field}: {path} is not a checkpoint of {model}: it lacks {key}")
        if found[key] != tuple(tensor.shape) and tensor.ndim:
            raise UserError(
                f"{field}: {path} is not a checkpoint of {model}: {key} is {found[key]}, "
                f"the architecture wants {tuple(tensor.shape)}"
            )


def _checkpoint(model: str, weights: str, prefix: str) -> Path | None:
    """The file the weights are in; None for an open_clip tag."""
    if not model:
        raise UserError(f"{prefix}model is not set")
    if model.startswith(LOCAL):
        folder = Path(model.removeprefix(LOCAL))
        if weights:
            raise UserError(f"{prefix}weights: {model} holds its own; leave the field empty")
        if not (folder / "open_clip_config.json").is_file():
            raise UserError(f"{prefix}model: {folder} holds no open_clip_config.json")
        files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
        if not files:
            raise UserError(f"{prefix}model: {folder} holds no weights")
        return files[0]
    if model not in open_clip.list_models():
        raise UserError(f"{prefix}model: open_clip knows no architecture {model!r}")
    if not weights:
        raise UserError(f"{prefix}weights is not set: name a checkpoint of {model}")
    if Path(weights).is_file():
        return Path(weights)
    if not open_clip.get_pretrained_cfg(model, weights):
        raise UserError(f"{prefix}weights: {weights} is neither a file nor an open_clip tag")
    return None


def _bare(model: str, prefix: str) -> Any:
    """The model without storage: shapes only."""
    logging.disable(logging.WARNING)  # that it has no weights is what we want here
    try:
        with torch.device("meta"):
            return open_clip.create_model(
                model, device="meta", load_weights=False, pretrained_text=False
            )
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise UserError(f"{prefix}model: open_clip cannot build {model} ({error})") from None
    finally:
        logging.disable(logging.NOTSET)


def _require_plain(visual: Any, model: str, prefix: str) -> None:
    plain = isinstance(visual, VisionTransformer) and visual.attn_pool is None
    if not plain or visual.pool_type != "tok" or visual.final_ln_after_pool:
        raise UserError(f"{prefix}model: {model} has no plain ViT tower with a class token")
    preprocessing = visual.preprocess_cfg["interpolation"], visual.preprocess_cfg["resize_mode"]
    if preprocessing != ("bicubic", "shortest"):
        raise UserError(
            f"{prefix}model: {model} resizes its images by {preprocessing}; only bicubic, by the "
            "shorter side, is supported"
        )


def _shapes(path: Path, field: str) -> dict[str, tuple[int, ...]]:
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as tensors:
                return {k: tuple(tensors.get_slice(k).get_shape()) for k in tensors.keys()}
        except SafetensorError as error:
            raise UserError(f"{field}: {path} is not a safetensors file ({error})") from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises several kinds for a file that is not its own
        if "TorchScript" in str(error):
            raise UserError(
                f"{field}: {path} is a TorchScript archive, as OpenAI publishes them; name the "
                'open_clip tag "openai", or a file of its state dict'
            ) from None
        raise UserError(f"{field}: {path} cannot be read as weights ({error})") from None
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    state = {k: v for k, v in state.items() if isinstance(v, Tensor)}
    return {k.removeprefix("module."): tuple(v.shape) for k, v in state.items()}
