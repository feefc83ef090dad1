"""Indexes the shards of a folder, checking every sample's header on the way."""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.config import Section, UserError
from engine.parse import Positional, parse
from jobs.cli import run


@dataclass(frozen=True)
class IndexConfig(Section):
    """Indexes the .tar shards of a folder: a DALI-format .idx beside each, and one manifest.

    Every image's magic bytes and header are checked; those that cannot be used are excluded, with
    the reason, and counted as skipped by a run.
    """

    folder: Positional[str]
    """Folder of .tar shards."""


def main(args: Sequence[str]) -> None:
    config = parse(IndexConfig, args, prog="promptkd index")
    from engine.data.corpus import MANIFEST
    from engine.data.shards import index_shard, write_manifest
    from engine.progress import track

    folder = Path(config.folder)
    paths = sorted(path for path in folder.glob("*.tar") if path.is_file())
    if not paths:
        raise UserError(f"folder: no .tar shards in {folder}")
    shards = [index_shard(path) for path in track(paths, "indexing")]
    write_manifest(folder, shards)
    samples = sum(len(shard.rows) for shard in shards)
    print(f"{folder / MANIFEST}: {len(shards)} shards, {samples} samples")
    for shard in shards:
        if not shard.complete:
            print(f"warning: {shard.name} has no end mark; it may have lost its tail")
        if shard.extra_images:
            print(
                f"warning: {shard.name} has {shard.extra_images} more images than samples; the "
                "first of each sample is used (a sample's key ends at the first dot of its name)"
            )
    for reason, count in Counter(r for s in shards for r in s.excluded.values()).most_common():
        print(f"excluded {count} ({reason})")


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:], "index"))
