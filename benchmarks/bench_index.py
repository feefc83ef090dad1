"""How fast is a corpus indexed, opened and ordered? `python benchmarks/bench_index.py [--quick]`.

- Indexing one shard, and several, in one process, against `cat`, from disk (cold) and from the page
  cache (warm). Rounds go through both in turn; a ratio is the median over the rounds.
- Opening the manifest of 100,000 shards: seconds, bytes of the file, and of memory.
- Planning a step of a billion samples.

Needs 1.6 GB of disk. `--quick` is a smoke test: its rows tell nothing.
"""

import argparse
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import numpy as np
from manifests import manifest_row
from meters import micros, resident_bytes
from photos import Photos, draw, packed
from rows import Bench

from engine.data.batches import training_works
from engine.data.corpus import Corpus
from engine.data.index import index_shard
from engine.data.manifest import MANIFEST, write_manifest
from engine.data.order import Blocks, Order
from engine.data.places import Shard
from engine.index import index
from engine.progress import say
from engine.storage.ranges import Access, Storage

SIZE = (500, 375)
ROUNDS = 7


def against_cat(bench: Bench, name: str, made: Photos, rounds: int) -> list[str]:
    """Lines of ratios."""
    several = len(made.shards) > 1
    providers = {
        "ours": partial(_index_all if several else _index_one, made.shards),
        "cat": partial(_cat, made.shards),
    }
    total = sum(map(os.path.getsize, made.shards))
    lines = []
    for cold in (True, False):
        case = f"{name}, {'cold' if cold else 'warm'}"
        config = made.config | {"bytes": total, "load_average": round(os.getloadavg()[0], 1)}
        rates: dict[str, list[float]] = {provider: [] for provider in providers}
        for _ in range(rounds):
            for provider, go in providers.items():
                _prepare(made.shards, cold)
                started = time.perf_counter()
                go()
                rates[provider].append(total / (time.perf_counter() - started))
        for provider, found in rates.items():
            bench.add(case, provider, "bytes_per_second", "B/s", found, config)
        ratios = [one / other for one, other in zip(rates["ours"], rates["cat"], strict=True)]
        bench.add(case, "cat", "ours_over_peer", "1", ratios, config)
        lines.append(f"{case:<26}{statistics.median(ratios):>8.2f}x of cat")
    return lines


def _index_one(shards: Sequence[str]) -> None:
    index_shard(Shard(shards[0], "tar"), Storage(Access()))


def _index_all(shards: Sequence[str]) -> None:
    """Afresh: an index elsewhere does not know of the one beside the shards."""
    with tempfile.TemporaryDirectory() as out:
        index("::".join(shards), Path(out), workers=1)


def _cat(shards: Sequence[str]) -> None:
    with open(os.devnull, "wb") as nowhere:
        subprocess.run(["cat", *shards], stdout=nowhere, check=True)


def _prepare(shards: Sequence[str], cold: bool) -> None:
    """Has the page cache hold all of the shards, or nothing."""
    for shard in shards:
        with open(shard, "rb") as file:
            if cold:
                os.fsync(file.fileno())  # what is not written yet stays
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while file.read(1 << 24):
                    pass


def manifest(bench: Bench, folder: Path, shards: int, rounds: int) -> list[str]:
    """Opens made-up shards that lie afar, of which none is looked at."""
    folder.mkdir()
    write_manifest(folder, (manifest_row(number, 10_000) for number in range(shards)))
    seconds, before = [], resident_bytes()
    for turn in range(rounds):
        started = time.perf_counter()
        corpus = Corpus.open(str(folder), 512)
        seconds.append(time.perf_counter() - started)
        if turn == 0:
            grown = resident_bytes() - before
    assert len(corpus.shards) == shards
    case, config = f"manifest, {shards} shards", {"shards": shards}
    size = (folder / MANIFEST).stat().st_size
    bench.add(case, "ours", "open", "s", seconds, config)
    bench.add(case, "ours", "file", "B", [size], config)
    bench.add(case, "ours", "resident", "B", [grown], config)
    told = f"{statistics.median(seconds):.2f} s, file {size / 1e6:.1f} MB, memory"
    return [f"{case:<26}{told} {grown / 1e6:.0f} MB"]


def order(bench: Bench, samples: int, lanes: int, batch: int) -> list[str]:
    """Plans steps all over a pass, and one after another with the blocks that come."""
    blocks = Blocks(np.full(samples // 10_000, 10_000), 512)
    planned = Order(blocks, lanes, batch, window_samples=4 * 512, seed=1)
    anywhere = np.random.default_rng(0).integers(planned.steps, size=200).tolist()
    planned.share(0, 0)  # has the sums over shards made
    apart = [micros(partial(planned.share, 0, step)) for step in anywhere]
    works = training_works(planned, 1, 1, 0, 1, planned.steps // 2)
    in_turn = [micros(partial(next, works)) for _ in range(200)]
    case, config = f"order, batch {batch}", {"samples": samples, "lanes": lanes}
    bench.add(case, "ours", "share", "us", apart, config)
    bench.add(case, "ours", "work", "us", in_turn, config)
    told = f"{statistics.median(apart):.0f} us a step of {samples:.0e} samples"
    return [f"{case:<26}{told}, {statistics.median(in_turn):.0f} us with what comes"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    images, rounds = (1_000, 1) if quick else (10_000, ROUNDS)
    bench, lines = Bench("index"), []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        lines += manifest(bench, place / "manifest", 100_000, rounds)
        for lanes, batch in ((4, 256), (64, 4096)):
            lines += order(bench, 1_000_000_000, lanes, batch)
        say("drawing photos")
        jpegs = list(islice(cycle(draw(SIZE, 256)), images))  # a disk does not know them again
        for shards in (1, 4):
            made = packed(place / str(shards), SIZE, jpegs, shards)
            lines += against_cat(bench, f"{shards} shards", made, rounds)
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
