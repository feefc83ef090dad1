"""Bundles of students that nobody has trained, and what their model cards say to type."""

import contextlib
import io
import re
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from engine.clip.bundle import Bundle
from engine.clip.prompts import PromptedTower
from engine.clip.towers import load_clip
from engine.clip.trained import TrainedTower

NAMES = ("daisy", "oak tree", "ü")


def make_bundle(
    model: str, weights: str = "", depth: int = 3, prompts: int = 2, layers: int | None = 0
) -> Bundle:
    """`layers` of the tower are trained, so that they are not what they were; None: all."""
    clip = load_clip(model, weights, "")
    tower = clip.image if layers == 0 else TrainedTower(clip, layers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        student = PromptedTower(tower, prompts, depth, hidden=12, outputs=10, seed=3)
        for name, param in student.named_parameters():
            if name == "prompts":
                param.data.normal_()
            elif name.startswith("tower.") and param.requires_grad:
                param.data += 0.1 * torch.randn_like(param)
        pixels = clip.image.pixels
        for _ in range(3):  # the running statistics leave their start
            student(torch.randint(0, 256, (4, 3, pixels, pixels), dtype=torch.uint8))
        student.projector.norm.weight.data.normal_()
        vectors = torch.nn.functional.normalize(torch.randn(3, 10), dim=-1)
    return Bundle(
        learned=student.state_dict(),
        class_vectors=vectors,
        class_names=NAMES,
        model=model,
        weights=weights,
        backbone=clip.fingerprint,
        teacher="t" * 64,
        logit_scale=20.0,
        pixels=pixels,
    )


def photo(folder: Path) -> Path:
    """A picture that is not square."""
    pixels = np.random.default_rng(3).integers(0, 256, (24, 37, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((111, 72)).save(folder / "photo.jpg")
    return folder / "photo.jpg"


def printed_by(card: str, folder: Path) -> str:
    """What the Python of a card, its longest indented block, prints in a folder."""
    blocks = re.findall(r"(?:^    .*\n|^\n(?=    ))+", card, re.MULTILINE)
    code = textwrap.dedent(max(blocks, key=len))
    sys.path.insert(0, str(folder))
    try:
        with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, {})  # in a process of its own, torch would be loaded anew
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop("promptkd_student", None)
    return printed.getvalue().strip()
