"""What workers and teachers tell of themselves, in the records of a run."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from engine.labels import statements
from engine.labels.statements import Statement, Statements
from engine.telemetry import GpuSampler
from engine.train import reports
from engine.train.ledger import Ledger
from engine.train.reports import Reports


@dataclass
class Waits:
    waited_s: float = 0.0


def told(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_worker_tells_of_the_time_since_it_last_did(tmp_path, monkeypatch):
    monkeypatch.setattr(reports, "_PERIOD_S", 3600.0)
    source, loader, ledger = Waits(7.0), Waits(3.0), Ledger(trained=1000)  # of an earlier life
    report = Reports(tmp_path, 1, source, loader, ledger, GpuSampler(None))
    source.waited_s += 2.0
    ledger.trained += 32
    report.tell(10, last=False)  # the first
    loader.waited_s += 0.5
    ledger.skipped = {"undecodable": 2}
    report.tell(20, last=False)  # too soon
    ledger.trained += 30
    report.tell(30, last=True)
    report.close()
    first, last = told(tmp_path / "telemetry" / "worker-1.jsonl")
    assert [first[key] for key in ("step", "labels_s", "data_s", "images")] == [10, 2.0, 0.0, 32]
    assert [last[key] for key in ("step", "labels_s", "data_s", "images")] == [30, 0.0, 0.5, 30]
    assert first["skipped"] == {} and last["skipped"] == {"undecodable": 2}
    assert last["time"] - first["time"] == pytest.approx(last["span_s"], abs=0.1)


def statement(alive_s: float, labelled: int, forward_s: float) -> Statement:
    done = {"labelled": labelled, "read_s": 0.0, "decode_s": 1.0, "forward_s": forward_s}
    done |= {"write_s": 0.0, "again": 5.0, "unrecorded": 0.0}
    return Statement(done, {"host": "node", "alive_s": alive_s, "queue": 2}, [])


def test_each_run_hears_what_its_teachers_did_since_the_last_time(tmp_path):
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    records = Statements(folders)
    period_s = statements._PERIOD_S
    records.hear("ab", statement(period_s + 1, 100, 2.0))
    records.hear("cd", statement(period_s - 1, 10, 0.5))  # too soon
    records.hear("ab", statement(2 * period_s, 150, 3.0))  # too soon
    records.hear("ab", statement(2 * period_s + 1, 180, 4.5))
    records.hear("ab", statement(period_s, 70, 1.0))  # it has been restarted
    records.hear("ab", statement(period_s + 2, 90, 1.5))
    records.close()
    for folder in folders:
        lines = told(folder / "telemetry" / "teachers.jsonl")
        numbers = [
            [one[key] for key in ("teacher", "span_s", "images", "forward_s")] for one in lines
        ]
        assert numbers == [
            ["0", period_s + 1, 100, 2.0],
            ["0", period_s, 80, 2.5],
            ["0", period_s, 70, 1.0],
            ["0", 2.0, 20, 0.5],
            ["1", period_s - 1, 10, 0.5],
        ]
        assert all(one["queue"] == 2 and one["host"] == "node" for one in lines)
        assert not any("alive_s" in one or "again" in one for one in lines)
