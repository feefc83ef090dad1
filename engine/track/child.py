"""A tracker's library in a process of its own: a child that crashes, or hangs at its end, costs the
run nothing, and one that outlives its parent tells what it has and ends.

The child is told, as lines of JSON, what it is to track, then points, and at last whether the run
has come to its end. What it prints there to be said is said here; all else goes to its log.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.progress import say
from engine.track.metrics import Point

__all__ = ["About", "Child", "serve"]

_PROGRAM = "from engine.track.child import serve; serve()"
_LAST_S = 60  # of a child whose parent has gone


@dataclass(frozen=True)
class About:
    """The run that is tracked."""

    name: str
    project: str
    folder: str
    config: dict[str, Any]  # by dotted field
    tags: tuple[str, ...]


class Child:
    """A Tracker, in a child: `service` is one of services.SERVICES."""

    def __init__(self, service: str, about: About) -> None:
        folder = Path(about.folder) / "track"
        folder.mkdir(exist_ok=True)
        self._service, self._log = service, folder / f"{service}.log"
        with open(self._log, "ab") as log:
            # -P and the path: it imports what its parent would. A session: it has no terminal to
            # ask for a password, and Ctrl-C is not for it.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _PROGRAM],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
                text=True,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path),
                },
            )
        threading.Thread(target=self._repeat, name=f"hear {service}", daemon=True).start()
        self._tell({"service": service, "about": asdict(about)})

    def log(self, point: Point) -> None:
        self._tell(point._asdict())

    def tick(self) -> None:
        if self._process.poll() is not None:
            raise RuntimeError(self._why())

    def close(self, finished: bool) -> None:
        self._tell({"finished": finished})
        with suppress(OSError):
            self._stdin.close()
        if self._process.wait():
            raise RuntimeError(self._why())

    def give_up(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    @property
    def _stdin(self):
        assert self._process.stdin, "it is a pipe"
        return self._process.stdin

    def _tell(self, what: dict[str, Any]) -> None:
        try:
            self._stdin.write(f"{json.dumps(what)}\n")
            self._stdin.flush()
        except OSError:
            self._process.wait()
            raise RuntimeError(self._why()) from None

    def _why(self) -> str:
        return f"its process has ended with code {self._process.returncode}; see {self._log}"

    def _repeat(self) -> None:
        assert self._process.stdout, "it is a pipe"
        for line in self._process.stdout:
            say(f"{self._service}: {line.rstrip()}")


def serve() -> None:
    """The child. Exits with code 1 where the tracker raises, which it says in one line."""
    # A scheduler may send these to all of a job; the parent drains, and says when it is done.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    told = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print
    try:
        _serve(lambda line: print(line, file=told))
    except Exception as error:
        first = (str(error) or type(error).__name__).strip().splitlines()[0]
        print(first, file=told)
        raise
    finally:
        signal.alarm(_LAST_S)  # for what libraries do when a process ends


def _serve(tell: Callable[[str], None]) -> None:
    from engine.track.services import SERVICES

    asked = json.loads(sys.stdin.readline())
    about = About(**asked["about"])
    tracker = SERVICES[asked["service"]](about, tell)
    finished = False
    for line in sys.stdin:
        what = json.loads(line)
        if "finished" in what:
            finished = what["finished"]
        else:
            tracker.log(Point(**what))
    signal.alarm(_LAST_S)
    tracker.close(finished)
