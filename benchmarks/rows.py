"""Benchmark results: rows appended to results/<bench>.csv, never overwritten.

One row is one metric of one case and provider, with percentiles over the repeats of one run.
Compare providers by rows of the same date and git_sha.
"""

import csv
import json
import platform
import statistics
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from engine.report.bench import COLUMNS
from engine.run_folder import PACKAGES, git
from engine.telemetry import gpu

RESULTS = Path(__file__).parent / "results"


class Bench:
    """Collects the rows of one run of one benchmark."""

    def __init__(self, name: str) -> None:
        self._file = RESULTS / f"{name}.csv"
        sha = git("rev-parse", "--short=12", "HEAD")
        dirty = git("status", "--porcelain", "--", ":/", ":(top,exclude)benchmarks/results")
        self._common = {
            "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M"),
            "git_sha": f"{sha}{'+' if dirty else ''}",
            "device": device(),
            "bench": name,
            "versions": versions(),
        }

    def add(
        self,
        case: str,
        provider: str,
        metric: str,
        unit: str,
        values: Sequence[float],
        config: Mapping[str, object],
    ) -> None:
        """Appends a row; `values` are the repeats."""
        low, middle, high = percentiles(values)
        row = self._common | {
            "case": case,
            "provider": provider,
            "metric": metric,
            "unit": unit,
            "p20": f"{low:.6g}",
            "p50": f"{middle:.6g}",
            "p80": f"{high:.6g}",
            "n": len(values),
            "config": json.dumps(config),
        }
        RESULTS.mkdir(exist_ok=True)
        new = not self._file.exists()
        with open(self._file, "a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)
        print(f"{case:<24} {provider:<16} {metric:<20}{middle:>12.6g} {unit}  (n={len(values)})")


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """20th, 50th and 80th, interpolated."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return cuts[1], statistics.median(values), cuts[7]


def versions() -> str:
    """Of the packages that are installed, since a benchmark may need but some, and of a GPU."""
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package}={version(package)}")
        except PackageNotFoundError:
            continue
    return " ".join(found) + (f"; {told}" if (told := gpu()) else "")


def device() -> str:
    """The GPU's name, or the CPU's and its cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()} ({len(names)} cores)"
