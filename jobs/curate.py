"""`promptkd store curate`: lists the samples worth training on, by what recorded labels say."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from engine.config import Range, Section, UserError
from engine.labels.curate.rules import Rules
from engine.parse import Flat, Positional, parse
from jobs.cli import run


@dataclass(frozen=True, kw_only=True)
class CurateConfig(Section):
    """Lists the samples of a corpus worth training on, by recorded labels: without images that fit
    no class, and without near-duplicates. A run trains on them by corpus.samples = "list.parquet".

    Beside the list come list.md, which sums up what was left out, and list.scores.parquet with the
    scores of every sample. Without rules all is kept and scored.
    """

    store: Positional[str]
    """Folder, or s3 or gs URL, of recorded labels (targets.store of a run)."""
    corpus: str
    """The indexed shards that were labelled, as corpus.shards of the run names them."""
    classes: str
    """The class vectors they were labelled with: class_vectors.safetensors of the run folder."""
    out: str
    """List to write, a .parquet file."""
    rules: Flat[Rules] = field(default_factory=Rules)
    labelling: str = ""
    """Where the store has several of this corpus: which, as `promptkd store ls` names it."""
    view: Annotated[int | None, Range(0)] = None
    """View to go by. None: the test view if it is recorded, else the lowest."""
    hosts: tuple[str, ...] = ()
    """Hosts of URLs that may lie on private addresses, or be redirected to."""


def main(args: Sequence[str]) -> int:
    config = parse(CurateConfig, args, prog="promptkd store curate")
    out = Path(config.out)
    if out.suffix != ".parquet" or not out.absolute().parent.is_dir():
        raise UserError(f"out: {out} must be a .parquet file in a folder that is there")
    from engine.clip.class_vectors import ClassVectors
    from engine.curate import make_list, open_corpus
    from engine.labels.store import Store

    told = make_list(
        Store(config.store, "store"),
        open_corpus(config.corpus, config.hosts),
        ClassVectors.load(Path(config.classes), "classes"),
        out,
        config.rules,
        config.labelling,
        config.view,
    )
    print("\n".join(told))
    print(f"{out}: train on it by --corpus.samples {out}; {out.with_suffix('.md')} tells more")
    return 0


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:], "store curate"))
