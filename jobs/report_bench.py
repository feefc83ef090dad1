"""Tables and plots of what benchmarks have measured: `promptkd report bench`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engine.config import UserError

if TYPE_CHECKING:
    from engine.report.bench import Table

__all__ = ["show"]


def show(results: Path, out: Path | None) -> None:
    """Prints a folder of results, or writes it to the folder `out`. Raises UserError where there
    are none."""
    from engine.report.bench import markdown, read, tables

    files = sorted(results.glob("*.csv"))
    if not files:
        raise UserError(f"results: {results} holds no CSV files")
    for file in files:
        found = tables(read(file))
        if out is None:
            print(markdown(found, ranges=False))
            continue
        out.mkdir(parents=True, exist_ok=True)
        plotted = _plots(found, out, file.stem)
        images = "".join(f"\n![{name}]({name})\n" for name in plotted)
        (out / f"{file.stem}.md").write_text(markdown(found, ranges=True) + images)
        print(f"{out / file.stem}.md and {len(plotted)} plots")
    if out:
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
