import json
import time

from engine import progress
from engine.progress import Watch, say, track


def line(step: int, **values) -> str:
    record = {"kind": "train", "step": step, "steps": 40, "pass_": 1, "images_per_second": 1234.5}
    return json.dumps(record | {"loss": 0.25, "agreement": 0.5} | values) + "\n"


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
        metrics.write_text(line(10) + line(20) + json.dumps({"kind": "other"}) + "\n")
        printed = await_text(capsys, "step 20/40")
        assert "pass 2 · 1,234 img/s · loss 0.250 · agreement 50.0 %" in printed
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
