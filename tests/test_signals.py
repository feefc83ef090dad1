"""Signals to a driver, which is a process of its own, without Ray."""

import os
import signal
import subprocess
import sys

import pytest

INT, TERM = signal.SIGINT, signal.SIGTERM
DRIVER = """
import pathlib, signal, sys, time
from contextlib import closing
from engine import lease
from engine.signals import Signals
from jobs.cli import run

folder, at_work, leaves, lingers = pathlib.Path(sys.argv[1]), *map(int, sys.argv[2:])

def drive(_):
    with Signals() as signals, closing(lease.take(folder)) as held:
        try:
            if at_work < -1:  # as ray.init() does, while it connects
                signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
            if at_work < 0:
                print("no worker", flush=True)
                time.sleep(60)
            with signals.workers([held], lambda: bool(at_work)):
                print("at work", flush=True)
                while not (leaves and lease.state(folder, held.owner) == "draining"):
                    time.sleep(0.01)
        finally:
            if lingers:
                print("leaving", flush=True)
                time.sleep(60)
    raise signals.drained(" after step 7")

sys.exit(run(drive, [], "distill"))
"""


@pytest.mark.parametrize(
    ("at_work", "leaves", "lingers", "sent", "code", "said"),
    [
        (1, 1, 0, [INT], 130, "distill: ended by Ctrl-C after step 7"),
        (1, 1, 0, [TERM], 143, "distill: ended by SIGTERM after step 7"),
        (0, 1, 0, [TERM], 143, "distill: ended by SIGTERM after step 7"),
        (0, 1, 0, [INT], 130, "distill: interrupted"),
        (-1, 1, 0, [INT], 130, "distill: interrupted"),
        (-1, 1, 0, [TERM], 143, "distill: ended by SIGTERM, with no student at work"),
        (-2, 1, 0, [TERM], 143, "distill: ended by SIGTERM, with no student at work"),
        (1, 0, 0, [INT, INT], 130, "distill: stopped; --resume goes on from the newest"),
        (1, 0, 0, [TERM, TERM], 143, "SIGTERM again stops at once"),
        (1, 0, 1, [INT, INT, INT], 130, "Ctrl-C again stops at once"),
        (1, 1, 1, [TERM, INT], 130, "SIGTERM again stops at once"),
    ],
)
def test_what_a_driver_makes_of_signals(tmp_path, at_work, leaves, lingers, sent, code, said):
    words = [str(word) for word in (tmp_path, at_work, leaves, lingers)]
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", DRIVER, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout
    printed = process.stdout.readline()
    assert printed == ("no worker\n" if at_work < 0 else "at work\n")
    for number, one in enumerate(sent):
        if number:  # when it has heard the one before, or is on its way out
            last = lingers and number == len(sent) - 1
            awaited = "leaving" if last else ("Ctrl-C", "SIGTERM")
            while not (told := process.stdout.readline()).startswith(awaited):
                assert told, printed
                printed += told
            printed += told
        process.send_signal(one)
    printed += process.communicate(timeout=30)[0]
    assert process.returncode == code, printed
    assert said in printed
    assert (tmp_path / "lease.json").exists() == (len(sent) > 2 or sent == [TERM, TERM] or lingers)
    assert "Traceback" not in printed
