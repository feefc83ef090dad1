"""What runs have come to, as pages; and what benchmarks have measured, as tables and plots."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engine.config import Section, UserError, path_field
from engine.data.datasets import DatasetName
from engine.parse import Positional, parse
from jobs.cli import run

if TYPE_CHECKING:
    from engine.report.bench import Table
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
    images: bool = True
    """Show images of the corpus, where it can be reached."""
    results: str = path_field(str(RESULTS))
    """Folder of the benchmarks' CSV files."""


def main(args: Sequence[str]) -> None:
    config = parse(ReportConfig, args, prog="promptkd report")
    if config.what == ("bench",):
        _bench(config)
        return
    if not config.what:
        raise UserError("what: name a run folder, several of them, or bench")
    from engine.report import compare, page

    found = compare.folders(config.what)
    if len(found) == 1:
        out = Path(config.out) if config.out else None
        print(page.write(found[0], config.images, config.dataset, out))
        return
    runs, out = compare.named(found), Path(config.out or "compare.html")
    compare.write(runs, out)
    print(_table(compare.compared(runs)))
    print(out)


def _table(lines: Sequence["Line"]) -> str:
    from engine.report.words import count, duration, score

    width = max(len(line.name) for line in lines)
    told = [f"{'':<{width}}{'images/s':>10}{'wall':>14}{'HM':>8}{'agreement':>11}  state"]
    told += [
        f"{line.name:<{width}}{count(line.images_per_second):>10}{duration(line.wall_s):>14}"
        f"{score(line.hm):>8}{score(line.agreement):>11}  {line.state}"
        for line in lines
    ]
    return "\n".join(told)


def _bench(config: ReportConfig) -> None:
    from engine.report.bench import markdown, read, tables

    files = sorted(Path(config.results).glob("*.csv"))
    if not files:
        raise UserError(f"results: {config.results} holds no CSV files")
    for file in files:
        found = tables(read(file))
        if not config.out:
            print(markdown(found, ranges=False))
            continue
        folder = Path(config.out)
        folder.mkdir(parents=True, exist_ok=True)
        plotted = _plots(found, folder, file.stem)
        images = "".join(f"\n![{name}]({name})\n" for name in plotted)
        (folder / f"{file.stem}.md").write_text(markdown(found, ranges=True) + images)
        print(f"{folder / file.stem}.md and {len(plotted)} plots")
    if config.out:
        from engine.plots import why_not

        if why := why_not():
            print(f"no plots: {why}")


def _plots(found: Sequence["Table"], folder: Path, stem: str) -> list[str]:
    """Of each table its first metric; the names of the files."""
    from engine.plots import Bar, bars, why_not

    names: list[str] = []
    if why_not():
        return names
    for table in found:
        metric, unit = next(iter(table.metrics.items()))
        rows = {key: by[metric] for key, by in table.lines.items() if metric in by}
        if len(rows) < 2:
            continue
        told = [
            Bar(f"{case}: {provider}", provider, row.p20, row.p50, row.p80)
            for (case, provider), row in rows.items()
        ]
        name = f"{stem}-{len(names) + 1}.png"
        title = f"{table.bench}: {metric}\n{table.device}, {table.date}, {table.git_sha}"
        bars(folder / name, title, "" if unit == "1" else unit, told)
        names.append(name)
    return names


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:], "report"))
