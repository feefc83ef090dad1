"""Who drives a run: a lease in its folder, so that no two drivers write there at once.

The driver creates `lease.json`, which names it, and touches that file every `RENEW_S`. Whoever else
wants the run watches whether the file's time of change moves, for `DEAD_S` of a monotonic clock of
his own. Times are never compared with a clock: those of hosts and file servers differ, and jump. A
lease that does not move is dead, and one at once whose process is gone from this very machine. It
is renamed, which one alone of several can do, and a new one is made.

A driver that was only stopped, and wakes, has lost its lease: its workers look at it before they
write, and stop.

Assumed of the file system, which may be shared by nodes: creating with O_EXCL and renaming are
atomic, and open() sees what another node has flushed (as NFS has it).
"""

import errno
import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

from engine.config import UserError
from engine.json_text import parse_json
from engine.progress import say

__all__ = ["Lease", "State", "state", "take"]

RENEW_S, DEAD_S = 5.0, 30.0
_LOOK_S = 0.2
_BACK_S = 1.0

State = Literal["held", "draining", "lost"]


class Lease:
    """A run folder that is this process's to write to, until close()."""

    def __init__(self, file: Path) -> None:
        """Raises FileExistsError where somebody has it, and OSError on a full disk."""
        self.owner = uuid.uuid4().hex
        self._file = file
        self._opened = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            self._write(draining=False)
        except OSError as error:
            os.close(self._opened)
            file.unlink()  # it would name nobody
            error.filename = str(file)
            raise
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def drain(self) -> None:
        """Asks the workers to commit what they have learned, and to leave."""
        self._write(draining=True)

    def close(self) -> None:
        """Gives the folder back, if it has not been taken meanwhile."""
        self._stop.set()
        self._thread.join()
        seen = _look(self._file)
        if seen and seen.told.get("owner") == self.owner:
            self._file.unlink()
        os.close(self._opened)

    def _write(self, draining: bool) -> None:
        told = {
            "owner": self.owner,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "born": _born(os.getpid()),
            "machine": _machine(),
            "draining": int(draining),  # one byte, so that it is never seen in part
        }
        text = f"{json.dumps(told)}\n".encode()
        if os.pwrite(self._opened, text, 0) < len(text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(self._opened)

    def _renew(self) -> None:
        while not self._stop.wait(RENEW_S):
            try:
                os.utime(self._opened)  # its own file, whatever has become of the name
            except OSError as error:
                say(f"warning: {self._file} was not renewed: {error}")


def take(folder: Path) -> Lease:
    """The lease of a run folder, from a dead driver if need be.

    Raises UserError where a driver lives that has it, after `DEAD_S` at most.
    """
    file = folder / "lease.json"
    if seen := _look(file):
        if not _gone(seen.told):
            _require_dead(file, seen)
        _set_aside(file, seen)
        say(f"{folder} was of {_named(seen.told)}, which is gone: taking it over")
    try:
        return Lease(file)
    except FileExistsError:
        raise UserError(f"name: {folder} has been taken by another driver just now") from None


def state(folder: Path, owner: str) -> State:
    """What has become of the lease that `owner` took. Raises OSError, also if it names nobody."""
    file = folder / "lease.json"
    seen = _look(file)
    if seen is None:  # somebody may be putting it back, see _set_aside()
        time.sleep(_BACK_S)
        seen = _look(file)
    if seen and not seen.told:
        raise OSError(f"{file} names no driver")
    if seen is None or seen.told.get("owner") != owner:
        return "lost"
    return "draining" if seen.told.get("draining") else "held"


class _Seen(NamedTuple):
    told: dict[str, Any]  # empty while it is being made, or if it is damaged
    file: int
    changed_ns: int


def _look(file: Path) -> _Seen | None:
    try:
        with open(file) as opened:  # which has NFS ask the server
            status, text = os.fstat(opened.fileno()), opened.read()
    except FileNotFoundError:
        return None
    try:
        told = parse_json(text)
    except ValueError:
        told = None
    return _Seen(told if isinstance(told, dict) else {}, status.st_ino, status.st_mtime_ns)


def _require_dead(file: Path, seen: _Seen) -> None:
    """Watches a lease until it is dead, or given back. Raises UserError once it is renewed."""
    say(f"{file} is of {_named(seen.told)}: waiting up to {DEAD_S:.0f} s to see if it lives")
    deadline = time.monotonic() + DEAD_S
    while time.monotonic() < deadline:
        time.sleep(_LOOK_S)
        now = _look(file)
        if now is None or _gone(now.told):
            return
        if now[1:] != seen[1:]:
            raise UserError(
                f"name: {file.parent} is being written by {_named(now.told)}, which is alive; "
                "end it first, or choose another name"
            )


def _set_aside(file: Path, dead: _Seen) -> None:
    """Removes a dead lease. Raises UserError if another driver has been faster."""
    aside = file.with_name(f"lease-{uuid.uuid4().hex}.old")
    try:
        file.rename(aside)
    except FileNotFoundError:  # he has begun; who of us creates the next one has it
        return
    moved = _look(aside)
    if moved and moved.told.get("owner") != dead.told.get("owner"):  # his new one: it goes back
        with suppress(FileExistsError):  # a third one has it
            os.link(aside, file)
        aside.unlink()
        raise UserError(f"name: {file.parent} has been taken by {_named(moved.told)} just now")
    aside.unlink()


def _gone(told: dict[str, Any]) -> bool:
    """Whether the process that a lease names was of this very machine, and is no more."""
    machine = _machine()
    return bool(machine) and told.get("machine") == machine and _born(told["pid"]) != told["born"]


def _machine() -> str:
    """A boot of a machine, and the namespace where a process number means the same; empty where
    there is no /proc to tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _born(pid: int) -> str:
    """When a process was started, since its number may be used again; empty if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _named(told: dict[str, Any]) -> str:
    return f"process {told['pid']} on {told['host']}" if told else "a driver that it does not name"
