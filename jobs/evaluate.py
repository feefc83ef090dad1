"""Evaluates a bundle over labelled shards: base, novel and harmonic-mean accuracy."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from engine.config import Range, Section, UserError
from engine.parse import Positional, parse
from jobs.cli import run


@dataclass(frozen=True)
class EvaluateConfig(Section):
    """Accuracy of a bundle over base and novel classes; each image among those of its own half."""

    bundle: Positional[str]
    """bundle.safetensors of a run."""
    shards: Positional[str]
    """Folder or glob of labelled, indexed shards."""
    model: str = ""
    """Backbone: open_clip architecture or local-dir:FOLDER. Empty: where the run had it."""
    weights: str = ""
    """Its checkpoint. Empty: as in the run."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to predict."""
    batch: Annotated[int, Range(1)] = 64
    """Images of a forward."""


def main(args: Sequence[str]) -> None:
    config = parse(EvaluateConfig, args, prog="promptkd evaluate")
    import torch

    from engine.clip.bundle import Bundle
    from engine.clip.names import base_count
    from engine.data.corpus import Corpus
    from engine.data.decode import Decoder
    from engine.data.views import ViewPolicy
    from engine.train.evaluate import Score, evaluate

    corpus = Corpus.open(config.shards, config.batch, "shards")
    bundle = Bundle.load(Path(config.bundle))
    if corpus.largest_label >= len(bundle.class_names):
        raise UserError(
            f"shards: {config.shards} has labels up to {corpus.largest_label}, the bundle has "
            f"{len(bundle.class_names)} classes"
        )
    device = torch.device(config.device)
    predictor = bundle.predictor(config.device, "fp32", config.model, config.weights)
    decoder = Decoder(ViewPolicy(0, predictor.pixels), config.device, threads=2)
    tallies, ledger = evaluate(
        {"student": predictor},
        None,
        corpus,
        range(len(corpus.blocks)),
        decoder,
        base_count(len(bundle.class_names)),
        config.batch,
        device,
    )
    score = Score.of(tallies["student"])
    for name in ("base", "novel", "hm"):
        value = getattr(score, name)
        print(f"{name:<6}" + ("     -" if value is None else f"{value:6.2f}"))
    for reason, count in ledger.skipped.items():
        print(f"skipped {count} ({reason})")


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:], "evaluate"))
