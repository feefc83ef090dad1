"""Proposes class names for images that have none, from a vocabulary: `promptkd classes --mine`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from engine.config import Range, Section, UserError
from engine.parse import Positional, parse
from jobs.cli import run


@dataclass(frozen=True)
class MineConfig(Section):
    """Proposes class names for a corpus from a vocabulary, by what a teacher sees in a sample of
    its images, for `classes.names` of a run.

    Beside OUT comes a table, OUT.csv: the images that each name explains, its mean probability, and
    the near-synonyms that it has dropped. Read both before you train: the teacher knows no better.
    """

    vocabulary: Positional[str]
    """Text file of words and phrases, one a line."""
    out: Positional[str]
    """Text file to write: class names, the strongest first."""
    corpus: str
    """Indexed shards, as corpus.shards of a run."""
    model: str
    """Teacher: open_clip architecture, or local-dir:FOLDER."""
    weights: str = ""
    """Checkpoint file or open_clip tag of the architecture."""
    prompts: str = ""
    """Learned prompts: a file of `promptkd pretrain`, or of the reference's PromptSRC or MaPLe."""
    template: str = "a photo of a {}."
    """Sentence around a word; for a mean over several, imagenet-80, -60, -7, or a file of them.
    Learned prompts bring their own."""
    classes: Annotated[int, Range(1)] = 100
    """Names to propose, at most."""
    sample: Annotated[int, Range(1)] = 4096
    """Images to look at, about; spread evenly over the corpus."""
    similar: Annotated[float, Range(0, 1, above=True)] = 0.8
    """Cosine of text features, less their mean, from which the weaker of two words is dropped."""
    seed: Annotated[int, Range(0, 2**63 - 1)] = 1
    """Of the sample."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the teacher works."""
    batch: Annotated[int, Range(1)] = 64
    """Images of a forward."""


def main(args: Sequence[str]) -> None:
    config = parse(MineConfig, args, prog="promptkd classes --mine")
    out = Path(config.out)
    evidence = out.with_name(f"{out.name}.csv")
    for file in (out, evidence):
        if file.exists():
            raise UserError(f"out: {file} exists; remove it or name another file")
    import torch

    from engine.clip.class_vectors import own_templates
    from engine.clip.names import read_vocabulary
    from engine.clip.templates import read_templates
    from engine.clip.towers import load_clip
    from engine.data.corpus import Corpus
    from engine.mine import BLOCK_SAMPLES, encode_vocabulary, look, propose, spread, write
    from engine.progress import say

    words, left_out = read_vocabulary(config.vocabulary, "vocabulary")
    for reason, count in left_out.items():
        say(f"{config.vocabulary}: {count} {reason} lines are left out")
    if len(words) < config.classes:
        raise UserError(
            f"classes: {config.classes} are asked for, {config.vocabulary} has {len(words)} words"
        )
    templates = read_templates(config.template, "template")
    if config.prompts and config.template != MineConfig.template:
        raise UserError("template: learned prompts bring their own words; leave out one of the two")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda is asked for, but there is no GPU")
    corpus = Corpus.open(config.corpus, BLOCK_SAMPLES, "corpus")
    clip = load_clip(config.model, config.weights, "", config.prompts)
    clip.text.to(config.device)
    say(f"encoding {len(words):,} words")
    templates = own_templates(clip, templates)
    vocabulary = encode_vocabulary(clip, words, templates, f"vocabulary: {config.vocabulary}")
    blocks = spread(len(corpus.blocks), corpus.samples, config.sample, config.seed)
    say(f"looking at {len(blocks):,} of {len(corpus.blocks):,} blocks of {config.corpus}")
    responses, unusable = look(clip, vocabulary, corpus, blocks, config.device, config.batch)
    proposals = propose(vocabulary, responses, config.classes, config.similar)
    write(out, evidence, proposals)
    seen = sum(one.images for one in proposals)
    print(
        f"{out}: {len(proposals)} of {len(words):,} words; among them, with what they have dropped,"
        f" are the most probable of {seen:,} of {responses.images:,} images ({unusable} unusable)"
    )
    if silent := sum(not one.images for one in proposals):
        print(f"{silent} of them are the most probable word of no image: see {evidence}")


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:], "classes"))
