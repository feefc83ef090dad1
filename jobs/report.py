"""Tables and plots of what benchmarks have measured."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from engine.config import Section, UserError, path_field
from engine.parse import Positional, parse
from jobs.cli import run

if TYPE_CHECKING:
    from engine.report.bench import Table

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


@dataclass(frozen=True)
class ReportConfig(Section):
    """bench: of every benchmark and device, the newest results, as markdown."""

    what: Positional[Literal["bench"]]
    """What to report on."""
    results: str = path_field(str(RESULTS))
    """Folder of the benchmarks' CSV files."""
    out: str = path_field()
    """Folder to write to: a .md file a benchmark, and plots. Empty: tables to the terminal."""


def main(args: Sequence[str]) -> None:
    config = parse(ReportConfig, args, prog="promptkd report")
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
