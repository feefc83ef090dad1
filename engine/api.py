"""`distill` of the Python API: what `promptkd distill` does, from a file, keywords, or both."""

import io
import json
import tempfile
from collections.abc import Mapping
from contextlib import redirect_stderr
from itertools import dropwhile, takewhile
from pathlib import Path
from typing import Any

from engine.config import RunConfig, UserError
from engine.outcome import Summary
from engine.parse import parse
from engine.run import distill as run

__all__ = ["distill"]

_PRESETS = Path(__file__).parents[1] / "jobs" / "configs" / "presets" / "distill"  # the command's


def distill(file: str | Path = "", /, *, resume: bool = False, **options: Any) -> Summary:
    """Runs a distillation to its end, as `promptkd distill FILE --section.field VALUE ...` does.

    `file` is a run's TOML file. Keywords are what such a file holds, sections being dicts, and win
    over it:

        distill("run.toml", name="longer", train={"passes": 40})

    Without a file they say it all. `resume` goes on from the newest checkpoint of the run folder.
    Gives what its summary.json says: scores in percent (`student_before`, `student_after`,
    `teacher`: base, novel, hm, all, agreement), `images_per_second`, and so on; the bundle lies in
    the run folder.

    Raises UserError, naming file and field, for what the caller can mend, before any model is
    built; RunFailed where a run comes to nothing; and Drained, a KeyboardInterrupt, on SIGTERM.
    """
    return run(_configured(str(file), options), resume)


def _configured(file: str, options: Mapping[str, Any]) -> RunConfig:
    """By the one parser, which reads files and ends processes: so of a file, and in an error."""
    screen = io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "keywords.json"
        told.write_text(json.dumps(options, default=str))
        files = [*([file] if file else []), str(told)]
        try:
            with redirect_stderr(screen):
                return parse(
                    RunConfig, files, prog="promptkd distill", from_files=True, presets=_PRESETS
                )
        except SystemExit:
            raise UserError(_first_part(screen.getvalue())) from None
        except UserError as error:
            raise UserError(str(error).replace(str(told), "keywords")) from None


def _first_part(screen: str) -> str:
    """What the parser shows in a box below its title, in one line, up to a rule: that tells the
    mistake. The box is of lines or, where they cannot be shown, of blanks and dashes."""
    rows = [line.strip(" │") for line in screen.splitlines()[1:]]
    below = dropwhile(_is_rule, rows)
    return " ".join(takewhile(lambda row: not _is_rule(row), below))


def _is_rule(row: str) -> bool:
    return not row.strip("─-╰╯")
