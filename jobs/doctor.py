"""What works on this machine, what does not, and how to mend it."""

import json
import shutil
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engine.config import RunConfig, to_dict
from engine.parse import Flat, parse
from jobs.cli import PRESETS, run
from jobs.distill import DistillConfig

if TYPE_CHECKING:
    from engine.doctor.apart import Finding

_NAME = 17  # letters of the longest one
_NARROW = 60  # columns, below which names have lines of their own


@dataclass(frozen=True, kw_only=True)
class AnyRun(RunConfig):
    """A run, or the parts of one that are to be checked."""

    name: str = "doctor"


@dataclass(frozen=True)
class DoctorConfig(DistillConfig):
    """Checks this machine, and the run of a TOML file if one is named first.

    Takes what `promptkd distill` takes; of several students, it checks what they have in common.
    Each check has a process and a time limit of its own. Exit code 0: all that is required works;
    1: something required fails.
    """

    run: Flat[AnyRun]  # type: ignore[assignment]
    json: bool = False
    """Print the findings as JSON."""


def main(args: Sequence[str]) -> int:
    asked = parse(
        DoctorConfig, args, prog="promptkd doctor", from_files=True, presets=PRESETS / "distill"
    )
    from engine.doctor.checks import checks, examine

    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    found = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.json"
        file.write_text(json.dumps(to_dict(asked.run)))
        for finding in examine(checks(asked.run, str(file), asked.resume), _announce):
            found.append(finding)
            _announce("")
            if not asked.json:
                print("\n".join(row(finding, width)), flush=True)
    _announce("")
    bad = [finding.name for finding in found if finding.state == "fail"]
    if asked.json:
        print(json.dumps([asdict(finding) for finding in found], indent=2))
    else:
        print(f"to be mended: {', '.join(bad)}" if bad else "all that is required works")
    return 1 if bad else 0


def _announce(name: str) -> None:
    """Shows on a terminal what is being checked, till the next call."""
    if sys.stderr.isatty():
        print(
            f"\r\x1b[K{f'checking {name} ...' if name else ''}", end="", file=sys.stderr, flush=True
        )


def row(finding: "Finding", width: int | None) -> Iterator[str]:
    """Lines of a table so many columns wide; None: a single line."""
    mend = f"-> {finding.mend}" if finding.mend else ""
    if width is None:
        yield f"{finding.state:<6}{finding.name:<{_NAME}}  {f'{finding.found} {mend}'.rstrip()}"
        return
    first = f"{finding.state:<6}{finding.name:<{_NAME}}  "
    if width < _NARROW:
        yield first.rstrip()
        first = ""
    rest = " " * (len(first) or 6)
    for text in filter(None, (finding.found, mend)):
        yield from textwrap.wrap(
            text,
            max(width, 20),
            initial_indent=first or rest,
            subsequent_indent=rest,
            break_on_hyphens=False,
        )
        first = ""


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:], "doctor"))
