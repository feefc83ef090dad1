"""The last that a driver does for a run: says in its records how it ended, and makes its page."""

from collections.abc import Sequence
from pathlib import Path

from engine.config import Drained
from engine.progress import say
from engine.telemetry import Recorder

__all__ = ["close_run"]

_QUICK_BYTES = 16 << 20  # of telemetry, which are read in a second or two


def close_run(folder: Path, why: BaseException | None = None, hosts: Sequence[str] = ()) -> None:
    """Writes report.html. `why`: what has ended the run before its end; who has asked it to stop is
    not kept waiting for pictures, nor for more than 16 MiB of telemetry. `hosts`: corpus.hosts.

    Where no page can be made, that is one warning: it takes nothing from what the run has done.
    """
    metrics = folder / "metrics.jsonl"
    if not metrics.exists():  # it has not begun
        return
    if why is not None:
        recorder = Recorder(metrics)
        recorder.record("end", state=_state(why), text=str(why))
        recorder.close()
    hurried = isinstance(why, KeyboardInterrupt)
    try:
        if hurried and _telemetry_bytes(folder) > _QUICK_BYTES:
            say(f"report: `promptkd report {folder}` makes the page; it has much to read")
            return
        # With templates and Arrow, which a start has no use for.
        from engine.report.page import write

        say(f"report: {write(folder, 'none' if hurried else 'all', hosts=hosts)}")
    except Exception as error:
        say(f"warning: no report.html: {type(error).__name__}: {error}")


def _telemetry_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in (folder / "telemetry").glob("*.jsonl"))


def _state(why: BaseException) -> str:
    if isinstance(why, Drained):
        return "drained"
    return "interrupted" if isinstance(why, KeyboardInterrupt) else "failed"
