"""Indexes the shards of a corpus, checking every image on the way."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from engine.config import Range, Section, UserError
from engine.parse import Positional, parse
from jobs.cli import run


@dataclass(frozen=True)
class IndexConfig(Section):
    """Indexes shards: finds every sample, and checks its image's header, limits and completeness.

    Images that cannot be used are excluded, listed in excluded.csv with the reason, and counted as
    skipped by a run. Beside each shard come an index for this engine (.arrow) and one for DALI
    (.idx); corpus.parquet is the manifest. What is indexed already, and has not changed, is kept.
    """

    shards: Positional[str]
    """Folder, glob or URL (https, s3, gs, hf) of .tar or .parquet shards, or a folder of images;
    {000..999} stands for numbers, :: between several."""
    out: str = ""
    """Folder for the index, which is then the corpus to name. Empty: beside the shards."""
    image: str = ""
    """Suffix of the members (left.jpg), or name of the parquet column, that holds the images.
    Empty: the first image of each sample."""
    dedup: bool = False
    """Exclude images that are, byte for byte, an earlier one."""
    skip_bad_shards: bool = False
    """Leave out shards that cannot be read or hold no samples, and say which."""
    workers: Annotated[int, Range(0, 100_000)] = 0
    """Shards indexed at once, as Ray tasks; 1: here, one by one. 0: as many as there are CPUs, or 1
    where there is little to do."""
    address: str = ""
    """Ray cluster to join (host:port, or auto). Empty: RAY_ADDRESS if set, else a local one."""
    hosts: tuple[str, ...] = ()
    """Hosts of URLs that may lie on private addresses, or be redirected to."""


def main(args: Sequence[str]) -> None:
    config = parse(IndexConfig, args, prog="promptkd index")
    if "://" in config.out:
        raise UserError("out: name a local folder; it may be copied to where the shards lie")
    from engine.data.index import BESIDE
    from engine.index import index
    from engine.storage.ranges import Access

    report = index(
        config.shards,
        Path(config.out) if config.out else None,
        Access(config.hosts),
        config.image,
        config.dedup,
        config.skip_bad_shards,
        config.workers,
        config.address,
    )
    before = f" ({report.reused} indexed before)" if report.reused else ""
    print(f"{report.manifest}: {report.shards} shards{before}, {report.samples} samples")
    for shard in report.short:
        print(f"warning: {shard}: it has no end mark, or is damaged")
    for why in report.left_out:
        print(f"warning: left out: {why}")
    for note, count in report.notes.most_common():
        print(f"note: {count} {note}")
    if BESIDE in report.notes:
        print("      (a sample's key ends at the first dot of its name; --image takes others)")
    if report.excluded.total() == report.samples:
        print("warning: no image of it can be used")
    for reason, count in report.excluded.most_common():
        print(f"excluded {count} ({reason})")


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:], "index"))
