"""Evaluates a bundle over labelled shards, by a protocol of the paper."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from engine.config import Range, Section, UserError
from engine.data.datasets import DATASETS, DatasetName
from engine.parse import Positional, parse
from engine.published import HEADLINE, Protocol, Row, table
from jobs.cli import run


@dataclass(frozen=True)
class EvaluateConfig(Section):
    """Accuracy of a bundle: over base and novel classes, each image among those of its own half,
    and over all classes.
    """

    bundle: Positional[str]
    """bundle.safetensors of a run."""
    shards: Positional[str]
    """Folder or glob of labelled, indexed shards."""
    protocol: Protocol = "base-to-novel"
    """Which score counts: the harmonic mean of base and novel, or else that over all classes."""
    dataset: DatasetName | None = None
    """Data set of the shards: shows what the paper prints of it beside."""
    classes: str = ""
    """Text file of class names, some of the bundle's: the labels of the shards count in its order,
    and predictions are among them alone. Empty: the bundle's own names."""
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
    from engine.clip.names import base_count, read_names
    from engine.data.corpus import Corpus
    from engine.data.views import ViewPolicy
    from engine.train.evaluate import Score, evaluate

    corpus = Corpus.open(config.shards, config.batch, "shards")
    bundle = Bundle.load(Path(config.bundle))
    if config.classes:
        bundle = bundle.kept(read_names(config.classes, "classes", repeats=True), "classes")
    classes = len(bundle.class_names)
    if corpus.largest_label >= classes:
        raise UserError(
            f"shards: {config.shards} has labels up to {corpus.largest_label}, "
            f"{config.classes or 'the bundle'} has {classes} classes"
        )
    device = torch.device(config.device)
    predictor = bundle.predictor(config.device, "fp32", config.model, config.weights)
    tallies, ledger = evaluate(
        {"student": predictor},
        None,
        corpus,
        range(len(corpus.blocks)),
        ViewPolicy(0, predictor.pixels),
        2,
        base_count(classes),
        config.batch,
        device,
    )
    score = Score.of(tallies["student"])
    headline = HEADLINE[config.protocol]
    value = getattr(score, headline)
    print(f"{config.protocol}: {headline} " + ("-" if value is None else f"{value:.2f}"))
    ours = Row(score.base, score.novel, score.hm, score.all)
    print(table(ours, config.protocol, config.dataset))
    if config.dataset:
        _, base, _, novel, *_ = tallies["student"].tolist()
        scored = {"test": base + novel, "test base": base, "test novel": novel}
        for difference in DATASETS[config.dataset].differences({"classes": classes} | scored):
            print(f"not as published: {difference}")
    for reason, count in ledger.skipped.items():
        print(f"skipped {count} ({reason})")


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:], "evaluate"))
