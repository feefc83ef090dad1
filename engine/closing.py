"""The last that a driver does for a run: says in its records how it ended, and makes its page."""

from pathlib import Path

from engine.config import Drained
from engine.progress import say
from engine.telemetry import Recorder

__all__ = ["close_run"]


def close_run(folder: Path, why: BaseException | None = None) -> None:
    """Writes report.html. `why`: what has ended the run before its end; who has asked it to stop is
    not kept waiting for pictures.

    Where no page can be made, that is one warning: it takes nothing from what the run has done.
    """
    metrics = folder / "metrics.jsonl"
    if not metrics.exists():  # it has not begun
        return
    if why is not None:
        recorder = Recorder(metrics)
        recorder.record("end", state=_state(why), text=str(why))
        recorder.close()
    try:
        from engine.report.page import (
            write,
        )  # with templates and Arrow, which a start has no use for

        say(f"report: {write(folder, pictures=not isinstance(why, KeyboardInterrupt))}")
    except Exception as error:
        say(f"warning: no report.html: {type(error).__name__}: {error}")


def _state(why: BaseException) -> str:
    if isinstance(why, Drained):
        return "drained"
    return "interrupted" if isinstance(why, KeyboardInterrupt) else "failed"
