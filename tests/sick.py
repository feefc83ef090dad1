"""Checks that crash, hang and raise, and machines that lack something, each in a child."""

import ctypes
import resource
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from engine.config import UserError
from engine.doctor import machine
from engine.doctor.apart import Finding

FIRST = Finding("first", "ok", "is kept")


def crashes() -> Iterator[Finding]:
    yield FIRST
    ctypes.string_at(0)  # SIGSEGV


def hangs(pid: str) -> Iterator[Finding]:
    """With a process of its own, whose number it writes to the file `pid`."""
    yield FIRST
    grandchild = subprocess.Popen(["sleep", "1000"])
    Path(pid).write_text(str(grandchild.pid))
    time.sleep(1000)


def raises() -> Iterator[Finding]:
    yield FIRST
    raise RuntimeError("a library is\nbroken")


def complains() -> Iterator[Finding]:
    raise UserError("field: mend it so")
    yield FIRST


def prints() -> Iterator[Finding]:
    """As libraries do; nothing of it is a finding."""
    print('{"name": "printed"}')
    subprocess.run(["echo", "by a child"])
    yield FIRST


def few_files(most: int) -> Iterator[Finding]:
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    yield from machine.open_files()


def full_disk(folder: str) -> Iterator[Finding]:
    """No file may be longer than a few bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    yield from machine.disks({"runs_dir": folder})


def corpora(told: list[dict]) -> Iterator[Finding]:
    """Several, in one process."""
    from engine.doctor import inputs  # here, since the others start faster without

    for one in told:
        yield from inputs.corpus(**one)
