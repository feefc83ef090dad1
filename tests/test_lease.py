"""Whose a run folder is, with real processes that live, stop and die."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine import lease
from engine.config import UserError

HOLD = """
import sys, time
from pathlib import Path
from engine import lease
from engine.config import UserError
lease.RENEW_S, lease.DEAD_S = 0.1, float(sys.argv[2])
try:
    mine = lease.take(Path(sys.argv[1]))
except UserError as error:
    print(f"refused: {error}", flush=True)
else:
    print(mine.owner, flush=True)
    time.sleep(60)
"""


def driver(folder: Path, dead_s: float = 1.0) -> subprocess.Popen:
    words = [sys.executable, "-c", HOLD, str(folder), str(dead_s)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


def said(process: subprocess.Popen) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


@pytest.fixture
def held(tmp_path) -> Iterator[tuple[subprocess.Popen, str]]:
    """A driver that has the folder, and its lease's owner."""
    process = driver(tmp_path)
    yield process, said(process)
    process.kill()
    process.wait()


@pytest.fixture
def patience(monkeypatch) -> float:
    monkeypatch.setattr(lease, "DEAD_S", 1.0)
    return 1.0


def elsewhere(folder: Path, **more: object) -> Path:
    """A lease of a driver on another machine."""
    file = folder / "lease.json"
    told = {"owner": "a", "host": "far", "pid": 7, "born": "1", "machine": "m", "draining": 0}
    file.write_text(json.dumps(told | more))
    return file


def test_a_lease_is_taken_renewed_and_given_back(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "RENEW_S", 0.05)
    mine, file = lease.take(tmp_path), tmp_path / "lease.json"
    told = json.loads(file.read_text())
    assert (told["owner"], told["pid"]) == (mine.owner, os.getpid()) and told["host"]
    first = file.stat().st_mtime_ns
    time.sleep(0.3)
    assert file.stat().st_mtime_ns > first
    assert lease.state(tmp_path, mine.owner) == "held"
    mine.drain()
    assert lease.state(tmp_path, mine.owner) == "draining"
    assert lease.state(tmp_path, "another") == "lost"
    mine.close()
    assert not file.exists() and lease.state(tmp_path, mine.owner) == "lost"


def test_a_second_driver_is_refused_while_the_first_lives(tmp_path, held):
    process, owner = held
    with pytest.raises(UserError, match=rf"^name: .*by process {process.pid} on .*is alive"):
        lease.take(tmp_path)
    assert lease.state(tmp_path, owner) == "held" and process.poll() is None


def test_what_a_killed_driver_of_this_machine_held_is_taken_at_once(tmp_path, held):
    process, owner = held
    process.kill()  # and nobody waits for it: it is a zombie
    time.sleep(0.1)
    started = time.monotonic()
    mine = lease.take(tmp_path)
    assert time.monotonic() - started < 1 < lease.DEAD_S
    assert lease.state(tmp_path, owner) == "lost"
    mine.close()


def test_a_number_that_another_process_has_now_does_not_count(tmp_path):
    elsewhere(tmp_path, machine=lease._machine(), pid=os.getpid(), born="1")
    started = time.monotonic()
    lease.take(tmp_path).close()
    assert time.monotonic() - started < 1


def test_a_stopped_driver_loses_its_lease_and_does_not_get_it_back(tmp_path, held, patience):
    process, owner = held
    os.kill(process.pid, signal.SIGSTOP)
    started = time.monotonic()
    mine = lease.take(tmp_path)
    assert time.monotonic() - started >= patience
    os.kill(process.pid, signal.SIGCONT)
    time.sleep(0.5)  # it renews what it believes to have
    assert lease.state(tmp_path, owner) == "lost"
    assert lease.state(tmp_path, mine.owner) == "held"
    mine.close()


def test_a_driver_elsewhere_is_dead_once_its_lease_rests(tmp_path, patience):
    """Whatever the clocks say: its last renewal lies years ahead."""
    file = elsewhere(tmp_path)
    os.utime(file, (2**32, 2**32))
    started = time.monotonic()
    lease.take(tmp_path).close()
    assert patience <= time.monotonic() - started < 3 * patience


def test_a_driver_elsewhere_lives_though_its_clock_goes_back(tmp_path, patience):
    file, stop = elsewhere(tmp_path), threading.Event()

    def renew() -> None:
        at = 2_000_000_000
        while not stop.wait(0.3):
            at -= 86400
            os.utime(file, (at, at))

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(UserError, match="process 7 on far, which is alive"):
            lease.take(tmp_path)
    finally:
        stop.set()
        thread.join()
    assert json.loads(file.read_text())["owner"] == "a"


def test_a_driver_that_died_while_it_made_its_lease_holds_nothing(tmp_path, patience):
    (tmp_path / "lease.json").touch()
    lease.take(tmp_path).close()


@pytest.mark.parametrize("text", ["{", "[1]", "\0" * 40])
def test_a_lease_that_is_damaged_is_nobodys_once_it_rests(tmp_path, patience, text):
    mine = lease.take(tmp_path)
    (tmp_path / "lease.json").write_text(text)
    with pytest.raises(OSError, match="names no driver"):  # so that no worker stops for it
        lease.state(tmp_path, mine.owner)
    other = lease.take(tmp_path)
    assert lease.state(tmp_path, mine.owner) == "lost"
    other.close()
    mine.close()


def test_of_several_that_take_over_at_once_one_has_it(tmp_path):
    elsewhere(tmp_path)
    drivers = [driver(tmp_path) for _ in range(6)]
    words = [said(process) for process in drivers]
    try:
        owners = [word for word in words if not word.startswith("refused")]
        assert len(owners) == 1, words
        assert lease.state(tmp_path, owners[0]) == "held"
        assert [path.name for path in tmp_path.iterdir()] == ["lease.json"]
    finally:
        for process in drivers:
            process.kill()
            process.wait()
