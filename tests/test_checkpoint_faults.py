"""Every call by which a save changes the disk fails, or is the last of its process, in turn.

A child process saves twice over two checkpoints and what a dead process has left. It dies, or the
disk fails it, at its k-th call, for every k; then the folder is looked at.
"""

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

from checkpoints import same, state
from distributed import run_apart

from engine.progress import hand_over
from engine.train import checkpoint
from engine.train.checkpoint import Saver

CALLS = ("mkdir", "open", "write", "fsync", "close", "rename", "replace", "unlink", "rmdir")
TAKE_ROOM = ("mkdir", "open", "write")
REAL = {name: getattr(os, name) for name in CALLS}
REAL["fsync"] = lambda descriptor: None  # it is processes that die here, not the machine
BEFORE, SAVES = (5, 10), (15, 20)
KINDS = ("kill", "power", "eio", "full")


class Disk:
    """Stands in the way of the calls that change what is on the disk, and counts them.

    At call number `fatal`: `kill`, the process dies before it, or in the middle of a write;
    `power`, it dies and files that were not flushed hold nothing; `eio`, the call fails, and no
    other; `full`, from then on nothing fits any more.
    """

    def __init__(self, kind: str, fatal: int) -> None:
        self.kind, self.fatal, self.calls = kind, fatal, 0
        self.unflushed: dict[int, int] = {}  # by inode: a descriptor that stays open
        for name in CALLS:
            setattr(os, name, self._wrapped(name))

    def _wrapped(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            reads = name == "open" and not args[1] & (os.O_CREAT | os.O_DIRECTORY)
            if reads or self._is_not_a_file(name, args):
                return REAL[name](*args, **options)
            self.calls += 1
            if self.calls == self.fatal and self.kind not in ("eio", "full"):
                self._die(name, args)
            if self.calls == self.fatal and self.kind == "eio":
                if name == "close":
                    REAL["close"](*args)  # as Linux does
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            if self.calls >= self.fatal and self.kind == "full" and name in TAKE_ROOM:
                if name != "open" or args[1] & os.O_CREAT:
                    if name == "write":  # what still fits
                        return self._half(*args)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self._real(name, args, options)

        return call

    def _real(self, name: str, args: tuple, options: dict) -> Any:
        if name == "fsync":
            self.unflushed.pop(os.fstat(args[0]).st_ino, None)
        result = REAL[name](*args, **options)
        if name == "write":
            self.unflushed[os.fstat(args[0]).st_ino] = os.dup(args[0])
        return result

    def _half(self, descriptor: int, data: Any) -> int:
        if len(data) < 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return REAL["write"](descriptor, data[: len(data) // 2])

    def _die(self, name: str, args: tuple) -> None:
        if name == "write":
            self._half(*args)
        if self.kind == "power":
            for descriptor in self.unflushed.values():
                os.ftruncate(descriptor, 0)
        os.kill(os.getpid(), signal.SIGKILL)

    @staticmethod
    def _is_not_a_file(name: str, args: tuple) -> bool:
        """Python's own pipes and the like."""
        if name not in ("write", "close"):
            return False
        return not os.readlink(f"/proc/self/fd/{args[0]}").startswith("/")


def save_twice(folder: Path, log: Path, kind: str, fatal: int) -> None:
    """In a process of its own. Tells in `log` which saves it knows to have succeeded."""
    said: list[str] = []
    hand_over(said.append)
    told = REAL["open"](log, os.O_WRONLY | os.O_CREAT)
    saver = Saver(folder, 2, 0)
    disk = Disk(kind, fatal)
    for step in SAVES:
        saver.save(state(step))
        if saver.failure() is None:
            REAL["write"](told, f"{step}\n".encode())
    warned = sum("could not be written" in line for line in said)
    REAL["write"](told, json.dumps({"calls": disk.calls, "warned": warned}).encode())


def outcome(base: Path, folder: Path, kind: str, fatal: int) -> tuple[list[int], dict[str, int]]:
    """Saves that succeeded, and what the process told at its end, if it came to one."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base, folder)
    log = folder.with_name("log")
    log.unlink(missing_ok=True)
    if not (child := os.fork()):
        try:
            save_twice(folder, log, kind, fatal)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    *steps, last = log.read_text().split("\n")
    assert bool(last) == (status == 0), (status, last)
    assert status in (0, signal.SIGKILL)
    return [int(step) for step in steps], json.loads(last or "{}")


def survive_all(where: str) -> None:
    """In a fresh process, which may fork. Tells how many faults of each kind there were."""
    os.fsync = REAL["fsync"]
    points = {kind: survive(Path(where) / kind, kind) for kind in KINDS}
    (Path(where) / "points.json").write_text(json.dumps(points))


def survive(where: Path, kind: str) -> int:
    """Of one kind of fault at every call; their number."""
    base, folder = where / "base", where / "checkpoints"
    said: list[str] = []
    hand_over(said.append)
    for step in BEFORE:
        checkpoint.save(base, state(step))
    shutil.copytree(base / "step-00000010", base / "step-00000015.tmp")
    (base / "step-00000015.tmp" / "student.safetensors").write_bytes(b"half")
    shutil.copytree(base / "step-00000005", base / "step-00000004.old")
    kept, points = [10], 0
    for fatal in count(1):
        saved, end = outcome(base, folder, kind, fatal)
        if end and end["calls"] < fatal:  # it has not come so far
            assert saved == [*SAVES] and not end["warned"]
            break
        points += 1
        newest = saved[-1] if saved else BEFORE[-1]
        said.clear()
        found = checkpoint.load_latest(folder)
        assert found and same(found, state(found.step)), (fatal, found)
        assert not said, (fatal, said)
        if kind == "full" or not end:
            # What was told to be saved is there; or the one whose saving was cut off.
            assert newest <= found.step <= newest + 5, (fatal, saved, found.step)
        else:  # a passing fault costs one save at most
            assert saved and newest <= found.step, (fatal, saved, found.step)
            assert end["warned"] == 2 - len(saved), (fatal, saved, end)
        if kind == "full" and end:
            assert end["warned"] == (len(saved) < 2), (fatal, saved, end)
        # Where the run goes on, nothing is left of all this.
        checkpoint.save(folder, state(found.step + 5))
        assert same(checkpoint.load_latest(folder), state(found.step + 5)) and not said
        names = sorted(path.name for path in folder.iterdir() if path.suffix != ".json")
        assert names == [f"step-{found.step + more:08d}" for more in (0, 5)], (fatal, names)
        kept.append(found.step)
    assert {*kept} == {10, 15, 20}, "every save was cut off somewhere"
    return points


def test_whatever_becomes_of_a_save_a_checkpoint_loads(tmp_path):
    run_apart(survive_all, str(tmp_path))
    points = json.loads((tmp_path / "points.json").read_text())
    assert points.keys() == {*KINDS} and min(points.values()) >= 80, points
    assert sum(points.values()) >= 350
    print(points)
