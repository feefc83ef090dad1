import json
import os
import pty
import re
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest

from engine import progress
from engine.progress import Watch, say, track
from engine.telemetry import Recorder

WORKER = {"rank": 0, "host": "node", "span_s": 5.0, "labels_s": 1.0, "data_s": 0.5}
WORKER |= {"images": 100, "skipped": {}}


OTHER = json.dumps({"time": 0, "kind": "other"}) + "\n"


def line(step: int, **values) -> str:
    record = {"kind": "train", "step": step, "steps": 40, "pass_": 1, "images_per_second": 1234.5}
    numbers = {"time": time.time(), "loss": 0.25, "agreement": 0.5}
    return json.dumps(record | numbers | values) + "\n"


def await_text(capsys, wanted: str) -> str:
    """What was printed until `wanted` was among it."""
    printed = ""
    for _ in range(500):
        printed += capsys.readouterr().err
        if wanted in printed:
            return printed
        time.sleep(0.02)
    raise AssertionError(f"{wanted!r} is not in {printed!r}")


def test_messages_are_printed_as_they_are_beside_the_results(capsys):
    say("[red]not markup[/red] " + "long " * 60)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "[red]not markup[/red] " + "long " * 60 + "\n"


def test_tracked_items_are_the_items(capsys):
    assert list(track([3, 1, 2], "counting")) == [3, 1, 2]
    assert capsys.readouterr().out == ""


def test_watch_prints_the_newest_whole_record(tmp_path, capsys):
    metrics = tmp_path / "metrics.jsonl"
    with Watch({"run": metrics}, quiet_s=0.02):
        time.sleep(0.1)  # there is no file yet
        metrics.write_text(line(10) + line(20, time=time.time() + 1) + OTHER)
        printed = await_text(capsys, "step 20/40")
        assert "pass 2 · " in printed
        assert " · 1,234 img/s, mean 1,234 · loss 0.250 · agreement 50.0 %" in printed
        assert "step 10/40" not in printed
        with open(metrics, "a") as file:
            file.write(line(30)[:25])
            file.flush()
            time.sleep(0.1)  # half a line is nobody's
            file.write(line(30)[25:])
        await_text(capsys, "step 30/40")
        time.sleep(0.1)
    assert "step" not in capsys.readouterr().err  # said once


def test_a_watch_tells_of_standing_still_now_and_then(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "_STILL_S", 0.2)
    metrics = tmp_path / "metrics.jsonl"
    with Watch({"run": metrics}, quiet_s=0.02):
        metrics.write_text(line(10))
        await_text(capsys, "step 10/40")
        printed = await_text(capsys, "no step in the last")
        time.sleep(0.3)
    assert (printed + capsys.readouterr().err).count("no step") <= 4


def test_watch_ends_with_its_block_and_hides_no_error(tmp_path):
    started = time.monotonic()
    try:
        with Watch({"run": tmp_path / "metrics.jsonl"}, quiet_s=60):
            raise KeyError("mine")
    except KeyError:
        pass
    else:
        raise AssertionError("the error was swallowed")
    assert time.monotonic() - started < 30


def test_a_run_is_at_work_from_its_workers_first_record_on(tmp_path):
    file = tmp_path / "metrics.jsonl"
    started = json.dumps({"time": 1.0, "kind": "started", "step": 0, "passes": 2}) + "\n"
    file.write_text(started)  # of an earlier life
    watch = Watch({"run": file, "other": tmp_path / "other.jsonl"})  # which follows nothing yet
    assert not watch.at_work()
    with open(file, "a") as opened:
        opened.write(started)
    assert watch.at_work()
    with watch:
        pass
    assert watch.at_work()


def test_each_new_record_is_handed_on_and_a_broken_sink_is_dropped(tmp_path, capsys):
    """What was there before is not new; half a record of it is cut off by who writes on."""
    telemetry = tmp_path / "telemetry"
    telemetry.mkdir()
    metrics, old = tmp_path / "metrics.jsonl", telemetry / "worker-0.jsonl"
    old.write_text('{"kind": "worker", "was": "there"}\n{"kind": "wor')
    taken, tried = [], []

    def good(name, record):
        taken.append((name, record["kind"], record.get("step")))

    def bad(name, record):
        tried.append(name)
        raise OSError("no tracker answers")

    with Watch({"run": metrics}, [good, bad], quiet_s=0.02):
        metrics.write_text(line(10) + OTHER)
        recorder = Recorder(old)
        recorder.record("worker", **WORKER, step=10)
        later = Recorder(telemetry / "worker-1.jsonl")  # it appears while others are at work
        later.record("worker", **WORKER, step=11)
        Recorder(telemetry / "probes.jsonl").record("probe", step=12)
        await_text(capsys, "bad gets no more records: OSError: no tracker answers")
        metrics.write_text(metrics.read_text() + line(20))
    recorder.close()
    later.close()
    wanted = [("other", None), ("train", 10), ("train", 20), ("worker", 10), ("worker", 11)]
    assert sorted(taken, key=str) == sorted((("run", *one) for one in wanted), key=str)
    assert tried == ["run"] and "no tracker" not in capsys.readouterr().err, "said once"


def test_a_slow_sink_keeps_nobody_waiting(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "_END_S", 0.1)
    metrics, go_on = tmp_path / "metrics.jsonl", threading.Event()

    def slow(name, record):
        go_on.wait(60)

    with Watch({"run": metrics}, [slow], quiet_s=0.02):
        metrics.write_text(line(10))
        await_text(capsys, "step 10/40")
    go_on.set()
    assert "slow gets no more records: it is too slow" in capsys.readouterr().err


def test_lines_that_are_no_records_are_passed_over(tmp_path, capsys):
    """As where a disk was full in the middle of one, and another was put behind it."""
    metrics, taken = tmp_path / "metrics.jsonl", []

    def sink(name, record):
        taken.append(record["kind"])

    with Watch({"run": metrics}, [sink], quiet_s=0.02):
        metrics.write_text(line(10)[:25] + line(20) + "7\n{}\n" + line(30))
        await_text(capsys, "step 30/40")
    assert taken == ["train"]


@pytest.mark.parametrize("screen", ["2>/dev/full", "2> >(true)"])
def test_a_screen_that_is_gone_ends_nothing(screen):
    """A full disk, and a pipe that nobody reads any more."""
    program = "import time; from engine.progress import say; time.sleep(0.5); say('a'); say('b')"
    told = f'"{sys.executable}" -c "{program}; print(1)" {screen}'
    done = subprocess.run(["bash", "-c", told], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "1\n")


def test_a_lack_of_nvml_is_told_once(tmp_path, capsys):
    names = ("one", "two")
    files = {name: tmp_path / name / "metrics.jsonl" for name in names}
    for name in names:
        (tmp_path / name).mkdir()
    with Watch(files, quiet_s=0.02):
        for name in names:
            for rank in range(3):
                recorder = Recorder(tmp_path / name / "telemetry" / f"worker-{rank}.jsonl")
                recorder.record("worker", **WORKER | {"rank": rank}, no_gpu="NVML Not Found")
                recorder.close()
        printed = await_text(capsys, "no GPU metrics: NVML Not Found")
    assert (printed + capsys.readouterr().err).count("NVML") == 1


def test_the_environment_of_ci_makes_it_quiet(tmp_path, monkeypatch):
    for ci, quiet_s in (("true", 60), ("1", 60), ("", 10), ("false", 10)):
        monkeypatch.setenv("CI", ci)
        assert Watch({"run": tmp_path / "metrics.jsonl"})._quiet_s == quiet_s


def test_a_terminal_shows_a_view_that_follows_its_size(tmp_path):
    """Of 40 columns, then of 80; the view is gone at the end."""
    child, terminal = watching(tmp_path)
    printed = until_printed(terminal, "agreement 50.0 %")
    assert max(map(len, plain(printed))) <= 40
    termios.tcsetwinsize(terminal, (24, 80))
    printed = until_printed(terminal, "step 10/40 .* loss 0.250")  # in one line, now
    assert "\x1b[2J" in printed, "all is drawn anew"
    (tmp_path / "end").touch()
    assert "\x1b[?25h" in until_printed(terminal, None), "the cursor is back"
    assert child.wait(60) == 0
    os.close(terminal)


def test_a_terminal_of_ci_shows_plain_lines(tmp_path):
    (tmp_path / "end").touch()
    child, terminal = watching(tmp_path, CI="true")
    printed = until_printed(terminal, None)
    assert "a message" in printed and "step 10/40" in printed and "\x1b" not in printed
    assert child.wait(60) == 0
    os.close(terminal)


def watching(folder: Path, **env: str) -> tuple[subprocess.Popen[bytes], int]:
    """A process that watches a run, and the other end of its terminal of 40 columns."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 40))
    here = {k: v for k, v in os.environ.items() if k not in ("CI", "COLUMNS", "LINES", "NO_COLOR")}
    child = subprocess.Popen(
        [sys.executable, "-c", WATCHING, folder / "metrics.jsonl"],
        env=here | {"TERM": "xterm", "PYTHONPATH": os.pathsep.join(sys.path)} | env,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    return child, ours


WATCHING = """
import pathlib, sys, time
from engine.progress import Watch, say
sys.path.insert(0, "tests")
from test_progress import line
file = pathlib.Path(sys.argv[1])
with Watch({"run": file}):
    file.write_text(line(1, time=time.time() - 10) + line(10))
    say("a message")
    while not (file.parent / "end").exists():
        time.sleep(0.1)
"""


def until_printed(terminal: int, wanted: str | None) -> str:
    """What a terminal was sent until `wanted` was among it, or all until nobody has it."""
    printed, deadline = "", time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            printed += os.read(terminal, 4096).decode()
        except OSError:
            return printed
        if wanted and re.search(wanted, "\n".join(plain(printed))):
            return printed
    raise AssertionError(f"{wanted!r} is not in {printed!r}")


def plain(printed: str) -> list[str]:
    """Its lines, without what is no text."""
    return [one.strip() for one in re.sub(r"\x1b\[[?\d;]*[A-Za-z]|\r", "", printed).split("\n")]
