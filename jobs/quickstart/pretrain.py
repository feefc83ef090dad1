"""Train the two small CLIP models of the quickstart: `python -m jobs.quickstart.pretrain`.

Both learn from images of the *general* style and their captions; of the *domain* style neither
pixels nor labels are seen here. The teacher is larger, is trained for longer and on strongly
disturbed images, so it survives the shift; the student is smaller and has seen tidier images, so it
does not. Writes `models/teacher` and `models/student`, each a folder that open_clip reads as
`local-dir:`, with a small byte-pair vocabulary of its own. Takes about 20 minutes on one CPU core.
"""

import argparse
import gzip
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.tokenizer import SimpleTokenizer, default_bpe
from PIL import ImageOps
from safetensors.torch import save_file
from torch import Tensor

from .domain import CLASSES, render

MODELS = Path(__file__).parent / "models"
SIZE = 64  # pixels a side of the models' input
POOL = 76  # pixels a side of the stored training images, a little larger, to leave room for crops
TEMPLATES = (
    "a photo of a {}.",
    "a picture of a {}.",
    "a drawing of a {}.",
    "an image of one {}.",
    "a close-up photo of the {}.",
    "there is a {} in the scene.",
    "{}",
)
COMMON_MERGES = 600  # of CLIP's 48,894 byte-pair merges; other words fall apart into short pieces


@dataclass(frozen=True)
class Recipe:
    """How one of the two models is built and trained."""

    embed_dim: int
    width: int
    layers: int
    patch: int
    text_width: int
    views: int  # images seen in training, counting repeats
    window: tuple[float, float, float]  # the arguments of `crop`
    disturbance: float  # strength of `disturb`, 0 to 1
    batch: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.05

    def config(self, vocab_size: int) -> dict:
        """The open_clip model configuration."""
        return {
            "embed_dim": self.embed_dim,
            "vision_cfg": {
                "image_size": SIZE,
                "layers": self.layers,
                "width": self.width,
                "head_width": 32,
                "patch_size": self.patch,
            },
            "text_cfg": {
                "context_length": 24,
                "vocab_size": vocab_size,
                "width": self.text_width,
                "heads": self.text_width // 32,
                "layers": 2,
                "tokenizer_kwargs": {"bpe_path": "bpe.txt.gz"},
            },
        }


RECIPES = {
    "teacher": Recipe(96, 160, 6, 16, 96, 220_000, window=(0.5, 0.75, 1.4), disturbance=1.0),
    "student": Recipe(64, 128, 4, 16, 64, 150_000, window=(0.2, 0.6, 1.1), disturbance=0.25),
}


def write_vocabulary(path: Path) -> None:
    """Write CLIP's most common byte-pair merges, and those that build the words used here."""
    with gzip.open(default_bpe(), "rt", encoding="utf-8") as file:
        header, *merges = file.read().split("\n")[: 49152 - 256 - 2 + 1]
    rank = {merge.replace(" ", ""): i for i, merge in enumerate(merges)}
    kept = set(range(COMMON_MERGES))
    pieces = [f"{w}</w>" for text in (*CLASSES, *TEMPLATES) for w in text.strip("{}.").split()]
    while pieces:  # a word's merge, then those of its two parts, down to single bytes
        if (i := rank.get(pieces.pop())) is not None:
            kept.add(i)
            pieces.extend(merges[i].split())
    text = "\n".join([header, *(merges[i] for i in sorted(kept))])
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def image_pool(per_class: int, seed: int) -> tuple[Tensor, Tensor]:
    """General images [n, 3, POOL, POOL] uint8 and their labels [n]."""
    images, labels = [], []
    for label in range(len(CLASSES)):
        for i in range(per_class):
            image = render(label, "general", seed + i)
            images.append(np.asarray(ImageOps.fit(image, (POOL, POOL))))
            labels.append(label)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)


def uniform(low: float, high: float, *shape: int) -> Tensor:
    """Uniform random numbers."""
    return torch.empty(shape).uniform_(low, high)


def crop(images: Tensor, turn: float, low: float, high: float) -> Tensor:
    """Random windows [n, 3, SIZE, SIZE] of images [n, 3, POOL, POOL].

    A window is turned by up to `turn` radians, is `low` to `high` times as wide as the image (where
    it reaches beyond, the image is mirrored), and is flipped at random.
    """
    n = len(images)
    angle, scale = uniform(-turn, turn, n, 1), uniform(low, high, n, 1)
    stretch = uniform(math.log(0.85), -math.log(0.85), n, 1).exp()
    flip = torch.randint(0, 2, (n, 1)) * 2.0 - 1
    shift = uniform(-1, 1, n, 2) * (1 - scale).abs() * 0.7
    cos, sin = angle.cos() * scale, angle.sin() * scale
    rows = [cos * flip * stretch, -sin / stretch, shift[:, :1]]
    rows += [sin * flip * stretch, cos / stretch, shift[:, 1:]]
    grid = F.affine_grid(torch.cat(rows, 1).view(n, 2, 3), [n, 3, SIZE, SIZE], align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def disturb(images: Tensor, strength: float) -> Tensor:
    """Ghosts, blotches, coloured light, haze and noise over images [n, 3, h, w] in 0..1."""
    n = len(images)
    images = images.lerp(images.roll(1, 0).flip(3), strength * uniform(0, 0.25, n, 1, 1, 1))
    blotches = F.interpolate(torch.randn(n, 3, 6, 6), SIZE, mode="bicubic", align_corners=False)
    images = images + blotches * (strength * uniform(0, 0.12, n, 1, 1, 1))
    lit = images * uniform(0.6, 1.15, n, 1, 1, 1) * uniform(0.6, 1.1, n, 3, 1, 1)
    images = images.lerp(lit, strength)
    images = images.lerp(uniform(0, 1, n, 3, 1, 1), strength * uniform(0, 0.45, n, 1, 1, 1))
    noise = torch.randn_like(images) * (strength * uniform(0, 0.1, n, 1, 1, 1))
    return (images + noise).clamp(0, 1)


def caption_loss(images: Tensor, captions: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
    """InfoNCE between unit images [n, d] and the unit captions [N, d] of all classes.

    Each class has one caption in a batch but any number of images, so an image has one match, and a
    caption spreads its target evenly over its images.
    """
    logits = scale * images @ captions.T
    match = F.one_hot(labels, len(captions)).T.float()
    present = match.sum(1) > 0
    match = match[present] / match[present].sum(1, keepdim=True)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T[present], match)) / 2


def train(recipe: Recipe, model: open_clip.CLIP, tokens: Tensor, seed: int = 0) -> None:
    """Train a model in place; tokens: [templates, N, context]."""
    torch.manual_seed(seed)
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(3, 1, 1)
    std = torch.tensor(open_clip.OPENAI_DATASET_STD).view(3, 1, 1)
    pool, labels = image_pool(per_class=250, seed=1_000_000)
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups: list[dict] = [{"params": decay, "weight_decay": recipe.weight_decay}, {"params": rest}]
    optimizer = torch.optim.AdamW(groups, recipe.learning_rate, (0.9, 0.98), weight_decay=0.0)
    steps = recipe.views // recipe.batch
    warmup = steps // 20
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda t: min((t + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * t / steps)),
    )
    start = time.monotonic()
    for step in range(steps):
        chosen = torch.randint(len(pool), (recipe.batch,))
        images = crop(pool[chosen].float() / 255, *recipe.window)
        images = disturb(images, recipe.disturbance)
        template = torch.randint(len(tokens), (len(CLASSES),))
        captions = model.encode_text(tokens[template, torch.arange(len(CLASSES))], normalize=True)
        features = model.encode_image((images - mean) / std, normalize=True)
        loss = caption_loss(features, captions, labels[chosen], model.logit_scale.exp())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        if (step + 1) % 400 == 0:
            seen, seconds = (step + 1) * recipe.batch, time.monotonic() - start
            print(f"  {seen:6d} images, {seconds:4.0f} s, loss {loss.item():.3f}", flush=True)


def build(recipe: Recipe, folder: Path) -> None:
    """Train one model and write its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_vocabulary(folder / "bpe.txt.gz")
    tokenizer = SimpleTokenizer(bpe_path=str(folder / "bpe.txt.gz"), context_length=24)
    config = recipe.config(tokenizer.vocab_size)
    torch.manual_seed(0)
    model = open_clip.CLIP(**config)
    captions = [tokenizer([template.format(name) for name in CLASSES]) for template in TEMPLATES]
    train(recipe, model, torch.stack(captions))
    weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    settings = {"model_cfg": config, "preprocess_cfg": {"size": SIZE}}
    (folder / "open_clip_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def main() -> None:
    """Train both models, or one of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=RECIPES)
    only = parser.parse_args().only
    torch.set_num_threads(1)
    for name, recipe in RECIPES.items():
        if only in (None, name):
            print(name)
            build(recipe, MODELS / name)


if __name__ == "__main__":
    main()
