"""How does it scale? `python benchmarks/scaling.py`, three minutes; or `--paper`, seconds.

First what can be measured here is: what a million blocks, 64 ranks, 512 teachers and 100,000
recorded blocks cost, as rows of results/scaling.csv. Then, on paper, runs on up to 4096 GPUs over
up to 1e10 images, from rates that are a roofline's, a run's (`--from`), or the newest of
benchmarks/results (`--results`): none of these tables is measured. `--quick` is a smoke test: what
it measures tells nothing.
"""

import argparse
import csv
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import scaling_costs as costs
from rows import RESULTS, Bench
from scaling_paper import PARAMETERS, Assumed, Estimate, estimate, ring_bytes

from engine.config import UserError
from engine.progress import say
from engine.rates import PEAK_TFLOPS, Rates, from_peak, gathered, label_bytes, measured
from jobs.plan_table import told_rates

GPUS = (1, 8, 64, 512, 4096)
IMAGES = (10**6, 10**8, 10**10)
# What rows of results tell, by benchmark and case, in images/s. Those of a GPU's towers go here.
ROWS = {
    ("plan", "teacher alone"): "teacher",
    ("plan", "student alone"): "student",
    ("plan", "decode alone"): "decode",
}
# For want of better: a node's link, and an image as ImageNet's are on the mean.
ASSUMED = {"link_gbit_s": 100.0, "image_bytes": 110e3}


def newest(results: Path) -> list[tuple[str, dict[str, float]]]:
    """Rates of the newest rows of results, each with the row it is of."""
    found: dict[str, tuple[str, dict[str, float]]] = {}
    for bench in sorted({name for name, _ in ROWS}):
        file = results / f"{bench}.csv"
        if not file.exists():
            continue
        with open(file, newline="") as lines:
            for row in csv.DictReader(lines):
                name = ROWS.get((bench, row["case"]))
                if name and row["provider"] == "ours" and row["metric"] == "images_per_second":
                    origin = f"measured, {file.name} of {row['date']}, {row['device']}"
                    found[name] = origin, {name: float(row["p50"])}
    return list(found.values())


def rates_of(told: argparse.Namespace) -> tuple[Rates, dict[str, str]]:
    """And where each comes from. Where no source is told, it is the H100's roofline."""
    roofline = told.gpu or ("h100" if not told.from_ and not told.results else None)
    sources: list[tuple[str, Mapping[str, Any]]] = [("assumed, not measured", ASSUMED)]
    sources += [from_peak(roofline, told.mfu)] if roofline else []
    sources += newest(RESULTS) if told.results else []
    sources += [(of_run(Path(run)), measured(Path(run))) for run in told.from_]
    rates, origins = gathered(vars(told), sources, label_bytes(1000, 768, "fp16"))
    return rates, origins


def of_run(folder: Path) -> str:
    """What its rates are called: a run's folder tells no more of its hardware."""
    try:
        device = json.loads((folder / "config.json").read_text())["device"]
    except (OSError, ValueError, LookupError, TypeError):
        device = "?"  # measured() tells what is wrong
    return f"measured, {folder}, device {device}"


def estimates(rates: Rates, assumed: Assumed, images: int) -> dict[int, list[Estimate]]:
    """By the number of GPUs, the fastest first."""
    found: dict[int, list[Estimate]] = {}
    for gpus in GPUS:
        ways = [estimate(rates, assumed, source, gpus, images) for source in ("inline", "store")]
        if gpus > 1:
            ways.append(estimate(rates, assumed, "stream", gpus, images))
        found[gpus] = sorted(ways, key=lambda way: -way.images_per_s)
    return found


def speeds(found: Mapping[int, Sequence[Estimate]]) -> Iterator[str]:
    """Lines. All but the split is an estimate."""
    yield f"{'GPUs':>5} {'source':<7}{'label:train':>12}{'images/s':>12}{'of one':>8}" + (
        f"{'steps':>12}{'step ms':>9}{'reduce ms':>11}{'pass h':>10}  bound"
    )
    for gpus, ways in found.items():
        for way in ways:
            split = f"{way.teachers}:{way.students}" if way.teachers else f"{way.students}"
            yield f"{gpus:>5} {way.source:<7}{split:>12}{way.images_per_s:>12,.0f}" + (
                f"{100 * way.efficiency:>7.1f}%{way.steps:>12,}{1e3 * way.step_s:>9.2f}"
                f"{1e3 * way.reduced_s:>11.3f}{way.pass_hours:>10.3g}  {way.bound}"
            )


def loads(found: Mapping[int, Sequence[Estimate]]) -> Iterator[str]:
    """Lines. All is an estimate."""
    yield f"{'GPUs':>5} {'source':<7}{'reduced MB':>11}{'labels MB/s':>13}{'reads GB/s':>12}" + (
        f"{'object store MB':>17}{'blocks/s asked':>16}{'roster calls/s':>16}{'driver calls/s':>16}"
    )
    for gpus, ways in found.items():
        for way in ways:
            yield f"{gpus:>5} {way.source:<7}{way.reduced_bytes / 1e6:>11.2f}" + (
                f"{way.label_bytes_per_s / 1e6:>13,.1f}{way.read_bytes_per_s / 1e9:>12,.2f}"
                f"{way.object_store_bytes / 1e6:>17,.1f}{way.label_calls_per_s:>16,.1f}"
                f"{way.roster_calls_per_s:>16,.1f}{way.driver_calls_per_s:>16,.1f}"
            )


def corpora(rates: Rates, shard_bytes: float | None) -> Iterator[str]:
    """Lines, of shards of 10,000 images. `shard_bytes`: of memory, as measured."""
    yield f"{'images':>7}{'shards':>11}{'blocks':>12}{'shards TB':>11}{'labels GB':>11}" + (
        "  manifest in each process"
    )
    for images in IMAGES:
        shards, read = images // 10_000, images * (rates.image_bytes or 0)
        told = "not measured"
        if shard_bytes is not None:
            told = f"{shards * shard_bytes / 1e6:,.1f} MB, extrapolated from what is measured here"
        yield f"{images:>7.0e}{shards:>11,}{shards * -(-10_000 // costs.BLOCK):>12,}" + (
            f"{read / 1e12:>11,.2f}{images * rates.label_bytes / 1e9:>11,.1f}  {told}"
        )


def measure(quick: bool) -> float | None:
    """What can be measured here; gives the bytes of memory a shard of a corpus takes."""
    bench, shard_bytes = Bench("scaling"), None
    shards, entries = (400, 500) if quick else (20_000, 100_000)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        try:
            shard_bytes = costs.corpus(bench, folder / "manifest", shards, 1 if quick else 5)
            costs.indexes(bench, folder / "indexes", 4 if quick else 100, 10_000)
        except ImportError as error:
            say(f"corpus and its indexes: not measured: {error}")
        for ranks in (1, 8, 64):
            costs.order(bench, shards, ranks, 4 if quick else 200)
        for teachers in (1, 8, 64, 512):
            costs.choice(bench, teachers, 4 if quick else 50)
        try:
            costs.store(bench, folder / "labels", entries, 50 if quick else 2000)
        except ImportError as error:
            say(f"the store: not measured: {error}")
    processes = (1, 2) if quick else (1, 2, 4, 8)
    seconds = costs.all_reduce(bench, processes, 3 if quick else 30)
    print("\n" + "\n".join(shape(seconds)))
    return shard_bytes


def shape(seconds: Mapping[int, float]) -> Iterator[str]:
    """Lines: measured, against the ring's bytes through the memory that all ranks share."""
    yield "gloo on this machine's cores, which checks the formula's shape and no rate"
    yield f"{'processes':>10}{'ms':>9}{'as ring bytes x processes':>27}"
    several = {ranks: s for ranks, s in seconds.items() if ranks > 1}
    first = min(several)
    for ranks, measured_s in several.items():
        ratio = ranks * ring_bytes(ranks, 1) / (first * ring_bytes(first, 1))
        yield f"{ranks:>10}{1e3 * measured_s:>9.2f}{1e3 * ratio * several[first]:>27.2f}"


def paper(rates: Rates, origins: Mapping[str, str], assumed: Assumed) -> Iterator[str]:
    """Lines."""
    yield "Rates"
    yield from told_rates(rates, origins)
    yield f"assumed: {assumed.batch} images of a GPU and step, so that the batch grows with GPUs;"
    inside = f"{assumed.node_gb_s:g} GB/s inside a node of {rates.gpus_per_node} GPUs"
    spread = f"steps' times spread by {100 * assumed.step_cv:g} %"
    yield f"  {1e6 * assumed.hop_s:g} us a message; {inside}; {spread}"
    yield f"{PARAMETERS:,} trainable parameters, all-reduced in fp32, overlapping with nothing:"
    yield "  2 (P-1)/P bytes / link + 2 ceil(log2 P) hops; and 7 small ones, of hops alone"
    found = {images: estimates(rates, assumed, images) for images in IMAGES}
    for images, ways in found.items():
        yield f"\nSpeed over {images:.0e} images: estimates, simulated from these rates"
        yield from speeds(ways)
    yield f"\nLoad at {IMAGES[-1]:.0e} images: estimates, simulated from these rates"
    yield from loads(found[IMAGES[-1]])
    yield "Students ask teachers for blocks, and read shards, themselves: none passes the driver."
    yield "Calls are those of the labels alone: reports each 2 s. The object store is of all nodes."
    yield "Left out: a run's start and evaluation; and that labels, collectives and, where shards"
    yield "lie afar, reads share a link."


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    parser.add_argument("--paper", action="store_true", help="measure nothing here")
    parser.add_argument("--from", dest="from_", action="append", default=[], metavar="RUN")
    parser.add_argument("--results", action="store_true", help="the newest of benchmarks/results")
    parser.add_argument("--gpu", choices=sorted(PEAK_TFLOPS), help="its roofline")
    parser.add_argument("--mfu", type=float, default=0.5, help="fraction of its peak")
    for name in ("teacher", "student", "decode", "link_gbit_s", "disk_gb_s", "image_bytes"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=float)
    parser.add_argument("--cores", type=int, help="of a GPU, that decode")
    parser.add_argument("--batch", type=int, default=Assumed().batch, help="of a GPU and step")
    told = parser.parse_args(words)
    if told.batch < 1:
        parser.error("--batch must be at least 1")
    try:
        rates, origins = rates_of(told)
    except UserError as error:
        parser.error(str(error))
    shard_bytes = None if told.paper else measure(told.quick)
    print("\n" + "\n".join(paper(rates, origins, Assumed(batch=told.batch))))
    print("\nCorpora")
    print("\n".join(corpora(rates, shard_bytes)))


if __name__ == "__main__":
    main()
