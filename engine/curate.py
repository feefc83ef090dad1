"""From a store's labels of a corpus to a list of the samples worth training on, and a report."""

from dataclasses import asdict
from pathlib import Path

import torch

from engine import durable
from engine.clip.class_vectors import ClassVectors
from engine.config import UserError
from engine.data.corpus import Corpus
from engine.data.order import Blocks
from engine.data.sample_list import write_list
from engine.data.views import TEST_VIEW
from engine.labels.curate.choose import choose
from engine.labels.curate.report import page, totals, write_scores
from engine.labels.curate.rules import Rules
from engine.labels.curate.scan import scan
from engine.labels.labelling import Labelling
from engine.labels.store import Store
from engine.labels.target_files import Name
from engine.progress import say
from engine.storage.access import Access

__all__ = ["make_list", "open_corpus"]


def make_list(
    store: Store,
    corpus: Corpus,
    vectors: ClassVectors,
    out: Path,
    rules: Rules,
    labelling: str = "",
    view: int | None = None,
) -> list[str]:
    """Writes a list of samples to `out`, and beside it the scores of all samples (.scores.parquet)
    and a page that sums them up (.md); gives lines on what became of how many.

    `labelling` is needed where several of the store fit; `view` is the test view where it is
    recorded, unless it is told, and else the lowest. Raises UserError.
    """
    fingerprint, told = _labelling(store, corpus, vectors, labelling)
    view = _view(store, fingerprint, view)
    blocks = Blocks(corpus.blocks.shard_samples, told.block_samples)
    form = (
        f"logits of {len(told.class_names)} classes, less their mean"
        if told.form == "logits"
        else "the teacher's features"
    )
    seen = "the test view" if view == TEST_VIEW else f"view {view}, random crops"
    how = [
        f"labelling {fingerprint} of {store.where}: {seen}",
        f"near-duplicates by the cosine of {form}",
    ]
    for line in how:
        say(line)
    if told.form == "logits":
        say(
            "warning: logits tell classes more than images: with few classes much is alike. Labels "
            "recorded with --train.feature_weight hold the teacher's features"
        )
    recorded, device = (
        store.recorded(told),
        torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )
    found = scan(recorded, blocks, view, vectors, out.absolute().parent, device)
    if found.missing:
        damaged = f", {recorded.damaged} files being damaged" if recorded.damaged else ""
        how.append(f"{found.missing:,} of {len(blocks):,} blocks have no labels{damaged}")
        say(how[-1])
    chosen = choose(found, rules, device)
    how += [f"{name}: {value}" for name, value in asdict(rules).items()]
    write_scores(out.with_suffix(".scores.parquet"), corpus, found, chosen)
    text = page(corpus, told.class_names, found, chosen, how)
    durable.replace(out.with_suffix(".md"), text.encode())
    made = asdict(rules) | {"labelling": fingerprint, "view": view, "form": told.form}
    write_list(out, chosen.kept, corpus.blocks, corpus.fingerprint, made)
    return list(totals(chosen))


def open_corpus(where: str, hosts: tuple[str, ...]) -> Corpus:
    """Of any size of blocks. Raises UserError."""
    return Corpus.open(where, 512, "corpus", Access(hosts))


def _labelling(
    store: Store, corpus: Corpus, vectors: ClassVectors, asked: str
) -> tuple[str, Labelling]:
    """The labelling of a corpus by these class vectors, and its fingerprint."""
    known = store.labellings()
    if not known:
        raise UserError(f"store: {store.where} holds no labels")
    ours = {f: one for f, one in known.items() if one.corpus == corpus.fingerprint}
    if not ours:
        raise UserError(
            f"corpus: {store.where} holds no labels of this corpus ({corpus.fingerprint[:16]}); "
            "`promptkd store ls` lists those it has"
        )
    if asked and asked not in ours:
        raise UserError(
            f"labelling: {asked} is none of this corpus, which are {', '.join(sorted(ours))}"
        )
    fitting = {
        fingerprint: one
        for fingerprint, one in ours.items()
        if one.class_vectors[0] == vectors.fingerprint and asked in ("", fingerprint)
    }
    if not fitting:
        raise UserError(
            "classes: these are not the class vectors that labels of this corpus were made with; a "
            "run leaves its own in its run folder, class_vectors.safetensors"
        )
    if len(fitting) > 1:
        raise UserError(f"labelling: name one of {', '.join(sorted(fitting))} by --labelling")
    return next(iter(fitting.items()))


def _view(store: Store, fingerprint: str, asked: int | None) -> int:
    """A view of which something is recorded."""
    try:
        folders = store.folder.entries(fingerprint)
    except OSError as error:
        raise UserError(f"store: {store.where} cannot be listed: {error}") from None
    names = (Name.parse(f"{folder}/000000/000000000.targets") for folder in folders)
    views = sorted(name.view for name in names if name)  # the test view is below 0
    if not views or (asked is not None and asked not in views):
        told = ", ".join("test" if one == TEST_VIEW else f"{one}" for one in views) or "none"
        raise UserError(f"view: the views that are recorded are {told}")
    return views[0] if asked is None else asked
