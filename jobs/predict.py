"""Classifies images with a bundle: JSON lines on standard output, one an image."""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from engine.config import Range, Section, UserError
from engine.parse import Positional, parse
from jobs.cli import run


@dataclass(frozen=True)
class PredictConfig(Section):
    """Classifies images with a bundle and its backbone: no teacher, no text tower.

    A line an image: its path and the top classes with their probabilities, or why it has none.
    """

    bundle: Positional[str]
    """bundle.safetensors of a run."""
    images: Positional[tuple[str, ...]]
    """Images, or folders of them."""
    top: Annotated[int, Range(1)] = 5
    """Classes an image gets."""
    model: str = ""
    """Backbone: open_clip architecture or local-dir:FOLDER. Empty: where the run had it."""
    weights: str = ""
    """Its checkpoint. Empty: as in the run."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to predict."""
    batch: Annotated[int, Range(1)] = 64
    """Images of a forward."""


def main(args: Sequence[str]) -> None:
    config = parse(PredictConfig, args, prog="promptkd predict")
    files = list(_files(config.images))
    if not files:
        raise UserError("images: there are none")
    import torch

    from engine.clip.bundle import Bundle
    from engine.data.corpus import Sample
    from engine.data.decode import Decoder
    from engine.data.views import TEST_VIEW, ViewPolicy

    bundle = Bundle.load(Path(config.bundle))
    predictor = bundle.predictor(config.device, "fp32", config.model, config.weights)
    decoder = Decoder(ViewPolicy(0, predictor.pixels), config.device, threads=2)
    for low in range(0, len(files), config.batch):
        part = files[low : low + config.batch]
        samples = [Sample(0, i, memoryview(f.read_bytes()), None, None) for i, f in enumerate(part)]
        images, reasons = decoder.decode(samples, TEST_VIEW)
        logits_BN = predictor(torch.from_numpy(images).permute(0, 3, 1, 2))
        top = logits_BN.softmax(-1).topk(min(config.top, len(bundle.class_names)))
        for file, reason, values, rows in zip(
            part, reasons, top.values.tolist(), top.indices.tolist(), strict=True
        ):
            line: dict[str, object] = {"image": str(file)}
            if reason is None:
                pairs = zip(rows, values, strict=True)
                line["top"] = {bundle.class_names[row]: round(p, 4) for row, p in pairs}
            else:
                line["error"] = reason
            print(json.dumps(line))


def _files(names: Sequence[str]) -> Iterator[Path]:
    for path in map(Path, names):
        if path.is_dir():
            files = (f.relative_to(path) for f in path.rglob("*") if f.is_file())
            yield from sorted(path / f for f in files if not f.as_posix().startswith("."))
        elif path.is_file():
            yield path
        else:
            raise UserError(f"images: {path}: no such file or folder")


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:], "predict"))
