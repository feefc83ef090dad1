"""How fast are photos loaded? `python benchmarks/bench_loader.py [--quick]`, ten minutes.

`--short`, of a minute, is against peers alone, with photos of one size. A peer that is not
installed takes no part.

- Against peers, by size and threads. Rounds go through all providers in turn; a ratio is the median
  over the rounds of what was measured in the same one.
- Loader against decoder: the CPU seconds that reading, ordering and batching add.
- With a hundredth of the images damaged, against the same images whole.
- Over 100,000 samples: does memory grow?

`--quick` is a smoke test: its rows tell nothing.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import peers
from photos import Photos, draw, flip_inside, flipped, packed, photos
from rows import Bench

# The order in which they start: processes are forked before there are threads.
PROVIDERS = {
    "webdataset-pil": peers.webdataset_pil,
    "torchvision": peers.torchvision,
    "ours": peers.ours,
    "ours-decode": peers.ours_decode,
    "dali": peers.dali,
    "spdl": peers.spdl,
}
ROUNDS, SHORT_ROUNDS = 5, 3


class Case(NamedTuple):
    size: tuple[int, int]
    images: int
    shards: int
    passes: int
    batch: int


CASES = (
    Case((500, 375), 512, 8, 2, 64),
    Case((2000, 1500), 48, 4, 1, 16),
    Case((4000, 3000), 16, 4, 1, 8),
)
SMALL = Case((96, 96), 4000, 8, 25, 64)


class Lap(NamedTuple):
    images_per_second: float
    cpu_s_per_image: float  # of this process: nothing is known of a peer's workers


def compare(
    told: dict[str, tuple[str, Photos]], case: Case, threads: int, rounds: int
) -> dict[str, list[Lap]]:
    """Laps of every round, by name; `told` says which provider loads which photos. As many cores as
    threads are theirs, helpers and prefetchers included."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    loads, laps = {}, defaultdict(list)
    for name, (provider, shards) in told.items():
        loads[name] = PROVIDERS[provider](shards, case.passes, case.batch, threads)
        _lap(loads[name], case.images * case.passes)  # warms up
    for _ in range(rounds):
        for name, load in loads.items():
            laps[name].append(_lap(load, case.images * case.passes))
    return laps


def _lap(load: peers.Load, images: int) -> Lap:
    wall, cpu = time.perf_counter(), time.process_time()
    loaded = sum(len(batch) for batch in load())
    assert loaded == images, (loaded, images)
    return Lap(
        images / (time.perf_counter() - wall),
        (time.process_time() - cpu) / images,
    )


def against_peers(bench: Bench, case: Case, place: Path, rounds: int) -> list[str]:
    """Lines of ratios."""
    made = photos(place / "x".join(map(str, case.size)), case.size, case.images, case.shards)
    missing = {name: why for name in PROVIDERS if (why := peers.why_not(name))}
    for name, why in missing.items():
        print(f"{name} takes no part: {why}")
    told = {name: (name, made) for name in PROVIDERS if name not in missing}
    lines = []
    for threads in (1, 2):
        name = f"{made.config['pixels']}, {threads} cores"
        config = made.config | _config(case, threads)
        laps = alone(compare, told, case, threads, rounds)
        for provider, found in laps.items():
            rates = [lap.images_per_second for lap in found]
            bench.add(name, provider, "images_per_second", "1/s", rates, config)
        for provider in ("ours", "ours-decode"):
            seconds = [lap.cpu_s_per_image for lap in laps[provider]]
            bench.add(name, provider, "cpu_s_per_image", "s", seconds, config)
        for peer in [peer for peer in laps if not peer.startswith("ours")]:
            ratios = _ratios(laps["ours"], laps[peer], 0)
            bench.add(name, peer, "ours_over_peer", "1", ratios, config)
            lines.append(f"{name:<26}{peer:<16}{statistics.median(ratios):>8.2f}x")
        ratios = _ratios(laps["ours"], laps["ours-decode"], 1)
        bench.add(name, "ours", "cpu_over_decode", "1", ratios, config)
        lines.append(f"{name:<26}{'CPU of decode':<16}{statistics.median(ratios):>8.3f}x")
    return lines


def damaged(bench: Bench, case: Case, place: Path, rounds: int) -> list[str]:
    """One image in a hundred: half of these had bits flipped and a quarter lost their ends before
    the corpus was indexed, a quarter had bits flipped after. All samples count, also the bad."""
    jpegs = draw(case.size, case.images)
    whole = packed(place / "whole", case.size, jpegs, case.shards)
    chosen = range(50, case.images, 100)
    before = list(jpegs)
    for turn, at in enumerate(chosen):
        if turn % 4 < 2:
            before[at] = flipped(jpegs[at], at)
        elif turn % 4 == 2:
            before[at] = jpegs[at][: 2 * len(jpegs[at]) // 3]
    broken = packed(place / "broken", case.size, before, case.shards)
    for at in chosen[3::4]:
        shard = at * case.shards // case.images
        flip_inside(broken.folder / f"{shard:06d}.tar", f"{at:08d}.jpg", at)
    told = {"whole": ("ours", whole), "broken": ("ours", broken)}
    laps = alone(compare, told, case, 2, rounds)
    config = (
        whole.config
        | _config(case, 2)
        | {"damaged": len(chosen), "not_valid": refused(broken, case)}
    )
    for name, found in laps.items():
        rates = [lap.images_per_second for lap in found]
        bench.add(f"corrupt, {name}", "ours", "images_per_second", "1/s", rates, config)
    ratios = _ratios(laps["broken"], laps["whole"], 0)
    bench.add("corrupt", "ours", "broken_over_whole", "1", ratios, config)
    return [f"{'corrupt, 1 %':<26}{'whole corpus':<16}{statistics.median(ratios):>8.3f}x"]


def refused(shards: Photos, case: Case) -> int:
    """How many of its samples have no view, in the first pass."""
    corpus, works = peers.corpus_and_works(shards, 1, case.batch)
    decoder = peers.Decoder(peers.ViewPolicy(1, peers.PIXELS), "cpu", 2)
    loader = peers.Loader(corpus, decoder, works, peers.MOST_BYTES)
    found = sum(reason is not None for batch in loader for reason in batch.reasons)
    loader.close()
    return found


def memory(bench: Bench, case: Case, place: Path) -> list[str]:
    made = photos(place / "small", case.size, case.images, case.shards)
    seen = alone(watched, made, case)
    config = made.config | _config(case, 2) | {"rss_MB": [one[0] // 10**6 for one in seen]}
    tenth, last = seen[len(seen) // 10 - 1], seen[-1]
    for share, found in (("10 %", tenth), ("100 %", last)):
        for metric, unit, value in zip(
            ("rss", "threads", "files"), ("B", "1", "1"), found, strict=True
        ):
            bench.add(f"memory, {share}", "ours", metric, unit, [value], config)
    growth = last[0] / tenth[0]
    return [f"{'memory, 100 %':<26}{'at 10 %':<16}{growth:>8.3f}x"]


def watched(made: Photos, case: Case) -> list[tuple[int, int, int]]:
    """Resident bytes, threads and open files of this process, twenty times along the way."""
    load = peers.ours(made, case.passes, case.batch, threads=2)
    step = case.images * case.passes // 20
    seen, loaded = [], 0
    for batch in load():
        loaded += len(batch)
        if loaded >= step * (len(seen) + 1):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            here = (len(os.listdir(f"/proc/self/{kind}")) for kind in ("task", "fd"))
            seen.append((pages * os.sysconf("SC_PAGE_SIZE"), *here))
    return seen


def alone(measure: Any, *told: Any) -> Any:
    """Calls it in a process of its own, which has loaded nothing yet."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(measure, *told).result()


def _ratios(ours: list[Lap], others: list[Lap], column: int) -> list[float]:
    return [one[column] / other[column] for one, other in zip(ours, others, strict=True)]


def _config(case: Case, threads: int) -> dict[str, object]:
    return {
        "threads": threads,
        "passes": case.passes,
        "batch": case.batch,
        "load_average": round(os.getloadavg()[0], 1),
        "peers": peers.versions(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--short", action="store_true")
    asked = parser.parse_args()
    quick, short = asked.quick, asked.short
    if why := peers.why_not("ours"):
        print(f"nothing is measured: {why}")
        return
    bench, rounds = Bench("loader"), 1 if quick else SHORT_ROUNDS if short else ROUNDS
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for case in CASES[: 1 if quick or short else None]:
            case = case._replace(images=256) if quick else case
            case = case._replace(images=256, passes=1) if short else case
            lines += against_peers(bench, case, place, rounds)
        if not short:
            corrupt = CASES[0]._replace(images=1600, shards=16, passes=1)
            lines += damaged(bench, corrupt, place, rounds)
            lines += memory(bench, SMALL._replace(passes=1) if quick else SMALL, place)
    print("\nOurs, by", "what".ljust(16), "median of the rounds' ratios")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
