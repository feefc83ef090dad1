"""Checkpoints of CLIP on disk: what they hold, and whether it fits, before a model is built.

Read are open_clip's own files (.safetensors, .bin, .pt), `local-dir:` folders, OpenAI's TorchScript
archives and whatever tag open_clip can download.
"""

import logging
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
from open_clip.transformer import VisionTransformer
from safetensors import SafetensorError
from torch import Tensor

from engine.clip.archive import is_archive, read_archive
from engine.clip.text import plain_text
from engine.config import UserError
from engine.json_text import parse_json
from engine.tensor_files import open_tensors

__all__ = ["LOCAL", "check_weights", "hub_model", "local_config", "named_tensors", "vision_shape"]

LOCAL = "local-dir:"


class VisionShape(NamedTuple):
    """What can be known of an image tower without building it."""

    pixels: int  # side of the square images it takes
    layers: int


def vision_shape(model: str) -> VisionShape:
    """Of an open_clip architecture or a local-dir."""
    local = model.startswith(LOCAL)
    vision = (local_config(model) if local else open_clip.get_model_config(model))["vision_cfg"]
    size = vision["image_size"]
    return VisionShape(int(size[0] if isinstance(size, list) else size), int(vision["layers"]))


def hub_model(model: str, weights: str) -> str | None:
    """OWNER/NAME on the Hugging Face Hub, where `weights` is a tag that open_clip finds there."""
    place = open_clip.get_pretrained_cfg(model, weights).get("hf_hub", "")
    owner, _, rest = place.partition("/")
    if not rest or Path(weights).is_file():
        return None
    return f"{owner}/{rest.partition('/')[0]}"


def local_config(model: str) -> dict[str, Any]:
    """The architecture of a local-dir."""
    config = Path(model.removeprefix(LOCAL)) / "open_clip_config.json"
    return parse_json(config.read_text())["model_cfg"]


def named_tensors(loaded: Any) -> dict[str, Tensor]:
    """The tensors by name of what torch.load() gave: a state dict, or a dict that holds one, with
    or without the prefix of a parallel wrapper. Empty for anything else."""
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else {}
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    return {key.removeprefix("module."): value for key, value in tensors.items()}


def check_weights(model: str, weights: str, prefix: str) -> None:
    """Raises UserError unless the model is a plain CLIP of two transformers, whose checkpoint's
    tensors fit."""
    path = _checkpoint(model, weights, prefix)
    bare = _bare(model, prefix)
    _require_plain(bare, model, prefix)
    if path is None:
        return  # open_clip downloads it, and checks it then
    field = f"{prefix}model" if model.startswith(LOCAL) else f"{prefix}weights"
    if is_archive(path) and "GELU" in str(bare) and "QuickGELU" not in str(bare):
        raise UserError(
            f"{prefix}model: {path} is OpenAI's archive, whose towers use QuickGELU; "
            f"{model} does not: name {model}-quickgelu"
        )
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


def _require_plain(built: Any, model: str, prefix: str) -> None:
    visual = built.visual
    plain = isinstance(visual, VisionTransformer) and visual.attn_pool is None
    if not plain or visual.pool_type != "tok" or visual.final_ln_after_pool:
        raise UserError(f"{prefix}model: {model} has no plain ViT tower with a class token")
    if plain_text(built) is None:
        raise UserError(f"{prefix}model: {model} has no text transformer of CLIP's own kind")
    preprocessing = visual.preprocess_cfg["interpolation"], visual.preprocess_cfg["resize_mode"]
    if preprocessing != ("bicubic", "shortest"):
        raise UserError(
            f"{prefix}model: {model} resizes its images by {preprocessing}; only bicubic, by the "
            "shorter side, is supported"
        )


def _shapes(path: Path, field: str) -> dict[str, tuple[int, ...]]:
    if path.suffix == ".safetensors":
        try:
            with open_tensors(path, "pt") as tensors:
                return {k: tuple(tensors.get_slice(k).get_shape()) for k in tensors.keys()}
        except SafetensorError as error:
            raise UserError(f"{field}: {path} is not a safetensors file ({error})") from None
    try:
        state: Any = (
            read_archive(path)
            if is_archive(path)
            else torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        )
    except Exception as error:  # torch raises several kinds for a file that is not its own
        raise UserError(f"{field}: {path} cannot be read as weights ({error})") from None
    return {key: tuple(tensor.shape) for key, tensor in named_tensors(state).items()}
