"""Prompts that a teacher has learned in stage I: our own files, and those of the reference project.

Letters: K prompted layers, P prompts, C tower width.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from engine.clip.weights import named_tensors
from engine.config import UserError
from engine.json_text import parse_json
from engine.tensor_files import open_tensors, write_tensors

__all__ = ["LearnedPrompts", "read_prompts"]

WORDS = "a photo of a"  # what all of the reference's contexts start from

# Token embeddings of the training classes, and the frozen tower that PromptSRC compares itself to:
# the reference saves them, and does not read them either.
_IGNORED = re.compile(r"prompt_learner\.(token_(prefix|suffix)2?|ZS_image_encoder\..*)")
_LAYER = r"\.transformer\.resblocks\.(\d+)\.VPT_shallow"
_FIRST = {"text": "prompt_learner.ctx", "vision": "image_encoder.VPT"}
_DEEP = {"text": f"text_encoder{_LAYER}", "vision": f"image_encoder{_LAYER}"}
_MAPLE = "prompt_learner.proj.weight"
_COMPOUND = r"prompt_learner\.compound_prompts_text\.(\d+)"
_COUPLER = r"prompt_learner\.(?:proj|compound_prompt_projections\.\d+)\.(?:weight|bias)"


@dataclass(frozen=True)
class LearnedPrompts:
    """Prompts of both towers of a CLIP. MaPLe's vision prompts are stored as its couplers made
    them, so both methods come to the same."""

    text_KPC: Tensor  # fp32; those of layer 0 stand for the first P tokens of `words`
    vision_KPC: Tensor  # fp32
    words: str = WORDS  # what stands before a class name
    method: str = ""  # how they were learned
    backbone: str = ""  # fingerprint of the CLIP they were trained in; empty: the file cannot tell

    @property
    def template(self) -> str:
        """The sentence around a class name."""
        return f"{self.words} {{}}."

    @property
    def digest(self) -> str:
        told = hashlib.sha256(self.words.encode())
        for prompts in (self.text_KPC, self.vision_KPC):
            told.update(f"{tuple(prompts.shape)}".encode())
            told.update(prompts.float().contiguous().numpy().tobytes())
        return told.hexdigest()

    def save(self, path: Path) -> None:
        """Writes atomically."""
        about = asdict(self)
        tensors = {key: about.pop(key) for key in ("text_KPC", "vision_KPC")}
        write_tensors(path, tensors, {"prompts": json.dumps(about)})

    def check(self, text: tuple[int, int], vision: tuple[int, int], where: str) -> None:
        """Raises UserError unless they fit towers of these (layers, width)."""
        for name, prompts, (layers, width) in (
            ("text", self.text_KPC, text),
            ("image", self.vision_KPC, vision),
        ):
            depth, _, own = prompts.shape
            if own != width or depth > layers:
                raise UserError(
                    f"{where} belongs to another backbone: its {name} prompts are {own} wide in "
                    f"{depth} layers, the {name} tower is {width} wide with {layers} layers"
                )


def read_prompts(path: Path, field: str) -> tuple[LearnedPrompts, dict[str, Tensor]]:
    """Learned prompts; and the backbone tensors that came with them, in CLIP's names, if any.

    Reads files of `promptkd pretrain` (.safetensors), and checkpoints of the reference's PromptSRC
    and MaPLe trainers (model.pth.tar-20), strictly: nothing in them may be missing or unknown.
    Raises UserError, naming the file and `field`.
    """
    if not path.is_file():
        raise UserError(f"{field}: {path}: no such file")
    backbone: dict[str, Tensor] = {}
    if path.suffix == ".safetensors":
        prompts = _read_own(path, field)
    else:
        prompts, backbone = _from_reference(_reference_state(path, field), f"{field}: {path}")
    for name, tensor in {
        "text": prompts.text_KPC,
        "vision": prompts.vision_KPC,
        **backbone,
    }.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{field}: {path}: {name} holds numbers that are not finite")
    return prompts, backbone


def _read_own(path: Path, field: str) -> LearnedPrompts:
    try:
        with open_tensors(path, "pt") as file:
            about = parse_json((file.metadata() or {})["prompts"])
            return LearnedPrompts(**{key: file.get_tensor(key) for key in file.keys()}, **about)
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise UserError(f"{field}: {path} holds no learned prompts ({error})") from None


class _Inert:
    """Stands for the optimizer and the schedulers that the reference saves beside its weights."""


def _plain_dict(*_: Any) -> dict:
    """Stands for defaultdict, which torch will not fill."""
    return {}


def _reference_state(path: Path, field: str) -> dict[str, Tensor]:
    classes = ("lr_scheduler.CosineAnnealingLR", "lr_scheduler.MultiStepLR", "sgd.SGD")
    harmless: list[Any] = [(_Inert, f"torch.optim.{name}") for name in classes]
    harmless += [(_plain_dict, "collections.defaultdict"), dict]
    try:
        with torch.serialization.safe_globals(harmless):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several kinds for a file that is not its own
        lines = str(error).splitlines() or [""]
        why = next((line.strip() for line in lines if "Unsupported" in line), lines[0])
        raise UserError(
            f"{field}: {path} cannot be read as weights ({why.split('. ')[0]}); tensors and plain "
            "values alone are read"
        ) from None
    return {key: tensor.float() for key, tensor in named_tensors(state).items()}


def _from_reference(
    state: Mapping[str, Tensor], where: str
) -> tuple[LearnedPrompts, dict[str, Tensor]]:
    if "prompt_learner.ctx" not in state:
        raise UserError(f"{where} is no teacher of PromptSRC or MaPLe: it lacks prompt_learner.ctx")
    prompts, used = _maple(state, where) if _MAPLE in state else _promptsrc(state, where)
    context = prompts.text_KPC.shape[1]
    if context > len(WORDS.split()):  # it started from "X X ...", which stands before no name here
        raise UserError(f"{where}: a context of {context} tokens has not started from {WORDS!r}")
    backbone: dict[str, Tensor] = {}
    for key in sorted(state.keys() - used):
        part, _, rest = key.partition(".")
        if part == "image_encoder" and "VPT" not in key:
            backbone[f"visual.{rest}"] = state[key]
        elif part == "text_encoder" and "VPT" not in key:
            backbone[rest] = state[key]
        elif key == "logit_scale":
            backbone[key] = state[key]
        elif not _IGNORED.fullmatch(key):
            raise UserError(f"{where} is no teacher of PromptSRC or MaPLe: it holds {key}")
    return prompts, backbone


def _promptsrc(state: Mapping[str, Tensor], where: str) -> tuple[LearnedPrompts, set[str]]:
    used: set[str] = set()
    stacked = {}
    for tower, first in _FIRST.items():
        names = {0: first} | _numbered(state, _DEEP[tower])
        stacked[tower] = _stack(state, names, where)
        used |= set(names.values())
    return LearnedPrompts(stacked["text"], stacked["vision"], method="promptsrc"), used


def _maple(state: Mapping[str, Tensor], where: str) -> tuple[LearnedPrompts, set[str]]:
    compound = _numbered(state, _COMPOUND)
    names = {0: _FIRST["text"]} | {layer + 1: name for layer, name in compound.items()}
    text_KPC = _stack(state, names, where)
    couplers = ["prompt_learner.proj"]
    couplers += [f"prompt_learner.compound_prompt_projections.{i}" for i in sorted(compound)]
    vision = []
    for text_PC, coupler in zip(text_KPC, couplers, strict=True):
        try:
            weight, bias = state[f"{coupler}.weight"], state[f"{coupler}.bias"]
        except KeyError as error:
            raise UserError(f"{where} lacks {error.args[0]}") from None
        vision.append(torch.nn.functional.linear(text_PC, weight, bias))
    used = set(names.values()) | {key for key in state if re.fullmatch(_COUPLER, key)}
    return LearnedPrompts(text_KPC, torch.stack(vision), method="maple"), used


def _numbered(state: Mapping[str, Tensor], pattern: str) -> dict[int, str]:
    found = ((re.fullmatch(pattern, key), key) for key in state)
    return {int(match[1]): key for match, key in found if match}


def _stack(state: Mapping[str, Tensor], names: Mapping[int, str], where: str) -> Tensor:
    """Prompts [K, P, C] of layers 0 to K - 1."""
    tensors = []
    for layer in range(len(names)):
        if names.get(layer) not in state:
            raise UserError(f"{where} lacks prompts of layer {layer}, and has some of deeper ones")
        tensors.append(state[names[layer]])
    if len({tensor.shape for tensor in tensors}) > 1:
        raise UserError(f"{where}: prompts differ in shape from layer to layer")
    return torch.stack(tensors)
