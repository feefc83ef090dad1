"""What runs have come to, as pages; and what benchmarks have measured, as tables and plots."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from engine.config import Section, UserError, path_field
from engine.data.datasets import DatasetName
from engine.parse import Positional, parse
from jobs.cli import run

if TYPE_CHECKING:
    from engine.report.compare import Line

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


@dataclass(frozen=True)
class ReportConfig(Section):
    """RUN: one page of a run, also of one at work; RUN RUN ...: a page that compares them; bench:
    of every benchmark and device, the newest results, as markdown."""

    what: Positional[tuple[str, ...]]
    """Run folders, or folders of runs; or bench (./bench is a folder of that name)."""
    out: str = path_field()
    """File to write. Empty: report.html in the run folder, or compare.html. Of bench, a folder: a
    .md file a benchmark, and plots; empty: tables to the terminal."""
    dataset: DatasetName | None = None
    """Data set of a run's images: the paper's rows of it are shown beside its own."""
    images: Literal["local", "all", "none"] = "local"
    """Images of the corpus that are shown: where it lies on this machine; also at URLs, which are
    then read as you, wherever a folder from somebody else points; or none."""
    hosts: tuple[str, ...] = ()
    """Hosts of URLs that may lie on private addresses, or be redirected to; HOST or HOST:PORT."""
    results: str = path_field(str(RESULTS))
    """Folder of the benchmarks' CSV files."""


def main(args: Sequence[str]) -> None:
    config = parse(ReportConfig, args, prog="promptkd report")
    if config.what == ("bench",):
        from jobs.report_bench import show

        show(Path(config.results), Path(config.out) if config.out else None)
        return
    if not config.what:
        raise UserError("what: name a run folder, several of them, or bench")
    from engine.report import compare, page

    found = compare.folders(config.what)
    if len(found) == 1:
        out = Path(config.out) if config.out else None
        print(page.write(found[0], config.images, config.dataset, out, config.hosts))
        return
    runs, out = compare.named(found), Path(config.out or "compare.html")
    compare.write(runs, out)
    print(_table(compare.compared(runs)))
    print(out)


def _table(lines: Sequence["Line"]) -> str:
    from engine.report.words import count, duration, score

    names = ["".join(c if c.isprintable() else "?" for c in line.name) for line in lines]
    width = max(map(len, names))
    told = [f"{'':<{width}}{'images/s':>10}{'wall':>14}{'HM':>8}{'agreement':>11}  state"]
    told += [
        f"{name:<{width}}{count(line.images_per_second):>10}{duration(line.wall_s):>14}"
        f"{score(line.hm):>8}{score(line.agreement):>11}  {line.state}"
        for name, line in zip(names, lines, strict=True)
    ]
    return "\n".join(told)


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:], "report"))
