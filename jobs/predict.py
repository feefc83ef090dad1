"""Classifies images with a bundle: JSON lines or CSV, a line an image."""

import csv
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal, TextIO

from engine.config import Range, Section, UserError
from engine.parse import Positional, parse
from jobs.cli import run

Top = list[tuple[str, float]]  # classes and their probabilities, best first
Write = Callable[[str, str | None, Top], object]  # image, why it has no classes, its classes


@dataclass(frozen=True)
class PredictConfig(Section):
    """Classifies images with a bundle and its backbone: no teacher, no text tower.

    A line an image: its name and the top classes with their probabilities, or why it has none.
    """

    bundle: Positional[str]
    """bundle.safetensors of a run."""
    images: Positional[tuple[str, ...]]
    """Images, indexed shards (.tar), folders of either, or globs."""
    out: str = ""
    """File to write. Empty: standard output."""
    format: Literal["jsonl", "csv"] = "jsonl"
    """JSON lines, or a table: image, error, class_1, probability_1, ..."""
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
    from engine.clip.bundle import Bundle
    from engine.data.decode import Decoder
    from engine.data.images import Decoded, decoded, find, samples
    from engine.data.views import ViewPolicy
    from engine.progress import say, track

    if not config.images:
        raise UserError("images: name images, shards or folders, behind the bundle")
    named = samples(find(config.images))
    if (first := next(named, None)) is None:
        raise UserError(f"images: there are none in {', '.join(config.images)}")
    bundle = Bundle.load(Path(config.bundle))
    predictor = bundle.predictor(config.device, "fp32", config.model, config.weights)
    decoder = Decoder(ViewPolicy(0, predictor.pixels), config.device, threads=2)
    top = min(config.top, len(bundle.class_names))
    started, images, failed = time.perf_counter(), 0, 0
    with _opened(config.out) as out:
        write = _csv(out, top) if config.format == "csv" else _jsonl(out)
        batches: Iterable[Decoded] = decoded(chain([first], named), decoder, config.batch)
        if not out.isatty():  # a bar would run through the lines
            batches = track(batches, "predicting")
        for names, images_BCHW, reasons in batches:
            logits_BN = predictor(images_BCHW)
            best = logits_BN.softmax(-1).topk(top)
            for name, reason, probabilities, rows in zip(
                names, reasons, best.values.tolist(), best.indices.tolist(), strict=True
            ):
                classes = [bundle.class_names[row] for row in rows]
                write(name, reason, list(zip(classes, probabilities, strict=True)))
            images += len(names)
            failed += sum(reason is not None for reason in reasons)
    speed = images / (time.perf_counter() - started)
    say(f"{images:,} images, {failed:,} of them without a prediction; {speed:,.0f} images/s")


def _opened(file: str) -> AbstractContextManager[TextIO]:
    return open(file, "w", encoding="utf-8", newline="") if file else nullcontext(sys.stdout)


def _jsonl(out: TextIO) -> Write:
    def write(image: str, reason: str | None, top: Top) -> None:
        answer = {"error": reason} if reason else {"top": {name: round(p, 4) for name, p in top}}
        print(json.dumps({"image": image} | answer), file=out)

    return write


def _csv(out: TextIO, top: int) -> Write:
    writer = csv.writer(out, lineterminator="\n")
    header = [f"{what}_{place}" for place in range(1, top + 1) for what in ("class", "probability")]
    writer.writerow(["image", "error", *header])

    def write(image: str, reason: str | None, top: Top) -> None:
        cells = [] if reason else [cell for name, p in top for cell in (name, round(p, 4))]
        readable = image.encode(errors="backslashreplace").decode()  # names may be any bytes
        writer.writerow([readable, reason, *cells, *[None] * (len(header) - len(cells))])

    return write


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:], "predict"))
