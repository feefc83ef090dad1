"""What became of every sample of a curated corpus: a table of all, and a page that sums it up."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from engine.config import UserError
from engine.data.corpus import Corpus
from engine.data.sample_list import places
from engine.data.tables import write_table
from engine.labels.curate.choose import REASONS, Curated
from engine.labels.curate.scan import Scan

__all__ = ["page", "totals", "write_scores"]

_ROWS = 1 << 20  # at once
_BINS, _BAR = 20, 40
_COSINES = (0.8, 0.85, 0.9, 0.92, 0.94, 0.95, 0.96, 0.97, 0.98, 0.99, 0.995, 0.999)
_LISTED = 20  # classes, and groups of duplicates
_MEMBERS = 5  # of a group
SCORES = pa.schema(
    {
        "shard": pa.int32(),
        "position": pa.int32(),
        "reason": pa.dictionary(pa.int8(), pa.string()),  # of REASONS
        "class": pa.int32(),  # the teacher's nearest; null: no label
        "in_domain": pa.float32(),
        "probability": pa.float32(),
        "nearest": pa.float32(),  # cosine to the nearest image that stays; null: was not compared
        "original_shard": pa.int32(),  # of a duplicate: the image that stays
        "original_position": pa.int32(),
    }
)


def write_scores(path: Path, corpus: Corpus, found: Scan, told: Curated) -> None:
    """Writes a parquet file with a row for each sample of the corpus."""

    def batches() -> Iterator[pa.RecordBatch]:
        for start in range(0, corpus.samples, _ROWS):
            rows = np.arange(start, min(start + _ROWS, corpus.samples))
            unlabelled, alone = ~found.valid[rows], told.originals[rows] < 0
            shards, positions = places(corpus.blocks, rows)
            originals = places(corpus.blocks, np.maximum(told.originals[rows], 0))
            reasons = pa.DictionaryArray.from_arrays(told.reasons[rows], list(REASONS))
            columns = [
                pa.array(shards, pa.int32()),
                pa.array(positions, pa.int32()),
                reasons,
                pa.array(found.classes[rows], pa.int32(), mask=unlabelled),
                pa.array(found.in_domain[rows], mask=unlabelled),
                pa.array(found.probability[rows], mask=unlabelled),
                pa.array(told.nearest[rows], mask=np.isnan(told.nearest[rows])),
                *(pa.array(column, pa.int32(), mask=alone) for column in originals),
            ]
            yield pa.record_batch(columns, schema=SCORES)

    write_table(path, SCORES, batches())


def totals(told: Curated) -> Iterator[str]:
    """Lines: what became of how many samples."""
    counts = np.bincount(told.reasons, minlength=len(REASONS)).tolist()
    for name, count in zip(REASONS, counts, strict=True):
        if count or name == REASONS[0]:
            yield f"{name:<12}{count:>12,}{100 * count / len(told.reasons):>8.1f} %"


def page(
    corpus: Corpus, names: Sequence[str], found: Scan, told: Curated, how: Sequence[str]
) -> str:
    """The page, in Markdown. `how`: lines on how the list was made."""
    parts = [
        ["# Curated samples", *(f"- {line}" for line in how)],
        ["## What became of them", "", "```", *totals(told), "```"],
        ["## In the domain", "", *_in_domain(found, told)],
        ["## Near-duplicates", "", *_near(told)],
        ["## Classes", "", *_classes(names, found, told)],
        ["## Largest groups of duplicates", "", *_groups(corpus, told)],
    ]
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def _in_domain(found: Scan, told: Curated) -> Iterator[str]:
    """A histogram of the scores; `o` where outliers were left out."""
    yield "Maximum concept matching (1 / classes: equally near to all of them), and images:"
    yield ""
    yield "```"
    scores = found.in_domain[found.valid]
    edges = np.histogram_bin_edges(scores, _BINS)
    outlier = told.reasons[found.valid] == REASONS.index("outlier")
    counts, gone = np.histogram(scores, edges)[0], np.histogram(scores[outlier], edges)[0]
    for low, count, out in zip(edges, counts.tolist(), gone.tolist(), strict=False):
        bar = round(_BAR * count / max(counts.max(), 1))
        marked = round(bar * out / max(count, 1))
        yield f"{low:>12.6g}{count:>12,}  {'o' * marked}{'#' * (bar - marked)}".rstrip()
    yield "```"


def _near(told: Curated) -> Iterator[str]:
    nearest = told.nearest[~np.isnan(told.nearest)]
    yield "Images whose cosine to one that stays, and fits the classes better, is at least:"
    yield ""
    yield "```"
    for cosine in _COSINES:
        count = int((nearest >= cosine).sum())
        yield f"{cosine:>12g}{count:>12,}{100 * count / max(len(nearest), 1):>8.1f} %"
    yield "```"


def _classes(names: Sequence[str], found: Scan, told: Curated) -> Iterator[str]:
    """Of the classes that lose most, and of how many none is left."""
    table = np.zeros((len(names), len(REASONS)), np.int64)
    np.add.at(table, (found.classes[found.valid], told.reasons[found.valid]), 1)
    before, kept = table.sum(axis=1), table[:, 0]
    shown = np.argsort(kept - before, kind="stable")[:_LISTED].tolist()
    yield (
        f"By the teacher's nearest class: {int((before > 0).sum()):,} of {len(names):,} classes "
        f"have images, and {int((kept > 0).sum()):,} when it is done. Those that lose most:"
    )
    yield ""
    yield "| class | images | " + " | ".join(REASONS) + " |"
    yield "|---" * (2 + len(REASONS)) + "|"
    for row in shown:
        cells = (f"{count:,}" for count in (before[row], *table[row]))
        yield f"| {names[row].replace('|', ' ')} | " + " | ".join(cells) + " |"


def _groups(corpus: Corpus, told: Curated) -> Iterator[str]:
    originals, counts = np.unique(told.originals[told.originals >= 0], return_counts=True)
    if not len(originals):
        yield "None was left out."
        return
    yield f"{len(originals):,} images stay for {counts.sum():,} that go."
    yield ""
    yield "| stays | go | among them |"
    yield "|---|---|---|"
    for row in np.argsort(-counts, kind="stable")[:_LISTED].tolist():
        members = np.flatnonzero(told.originals == originals[row])[:_MEMBERS]
        first, *others = (_named(corpus, int(n)) for n in (originals[row], *members))
        yield f"| {first} | {counts[row]:,} | {', '.join(others)} |"


def _named(corpus: Corpus, number: int) -> str:
    """A sample by its shard, position and key."""
    (shard,), (position,) = (c.tolist() for c in places(corpus.blocks, np.array([number])))
    name = corpus.shards[shard].rstrip("/").rpartition("/")[2]
    try:
        (key,) = corpus.keys(shard, [position])
    except (OSError, UserError):  # of an index that lies afar
        key = "?"
    return f"{name}:{position} `{key.replace('`', ' ').replace('|', ' ')}`"
