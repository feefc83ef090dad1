"""Checks, each in a child process with a time limit: a library that crashes or hangs is a finding,
and not the end of the others.

A check is a generator function of JSON values that yields findings. Its child prints them as JSON
lines; what libraries write goes to a file, whose last line explains an error.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib import import_module
from typing import Any, Literal

from engine.config import RunFailed, UserError
from engine.json_text import parse_json

__all__ = ["Check", "Finding", "State", "serve"]

State = Literal["ok", "warn", "fail", "skip"]
_PROGRAM = "import sys; from engine.doctor.apart import serve; serve(*sys.argv[1:])"
_GRACE_S = 10  # after which a child whose parent has been killed ends by itself
_TAIL = 8192  # bytes of what a child has written


@dataclass(frozen=True)
class Finding:
    """What a check has found of one component, and how to mend it; `fail` means that a run cannot
    do without."""

    name: str
    state: State
    found: str
    mend: str = ""


@dataclass(frozen=True)
class Check:
    """A check to be run: a generator function of a module, with its arguments."""

    name: str
    look: Callable[..., Iterator[Finding]]
    told: dict[str, Any] = field(default_factory=dict)
    timeout_s: float = 60.0
    mend: str = ""  # where it crashes, hangs or raises
    needs: tuple[str, ...] = ()  # findings; where one of them fails, this would tell nothing new

    def run(self) -> list[Finding]:
        """What a child finds; that it died, or gave no end in `timeout_s`, is the last finding."""
        with tempfile.TemporaryFile() as wrote:
            child = subprocess.Popen(
                # -P and the path: it imports what its parent would. A group, with what it starts.
                [sys.executable, "-P", "-c", _PROGRAM, *self._words()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=wrote,
                process_group=0,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path),
                },
            )
            try:
                out, _ = child.communicate(timeout=self.timeout_s)
                lost = self._how(child.returncode, wrote) if child.returncode else ""
            except subprocess.TimeoutExpired:
                _end(child)
                out, _ = child.communicate()
                lost = f"gave no answer in {self.timeout_s:g} s"
            finally:
                _end(child)
        whole = out[: out.rfind(b"\n") + 1]
        found = [Finding(**parse_json(line)) for line in whole.splitlines()]
        return [*found, Finding(self.name, "fail", lost, self.mend)] if lost else found

    def _words(self) -> tuple[str, ...]:
        look, limit = self.look, str(int(self.timeout_s) + _GRACE_S)
        return look.__module__, look.__qualname__, self.name, limit, json.dumps(self.told)

    def _how(self, code: int, wrote: Any) -> str:
        """How a child came to its end: the signal, or the last line of its traceback."""
        if code < 0:
            return f"the check died of {signal.Signals(-code).name}"
        size = wrote.seek(0, os.SEEK_END)
        wrote.seek(max(0, size - _TAIL))
        lines = wrote.read().decode(errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else f"the check ended with exit code {code}"


def _end(child: subprocess.Popen) -> None:
    """Kills what is left of a child and of its group."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def serve(module: str, function: str, name: str, limit_s: str, told: str) -> None:
    """The child: runs a check and prints its findings."""
    signal.alarm(int(limit_s))
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        for finding in getattr(import_module(module), function)(**parse_json(told)):
            print(json.dumps(asdict(finding)), file=answers)
    except (UserError, RunFailed) as error:  # which says what to do
        print(json.dumps(asdict(Finding(name, "fail", str(error)))), file=answers)
