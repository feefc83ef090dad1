"""W&B, trackio and MLflow, those that are installed, as each keeps what it is told on this machine:
two lives of a run are one run there."""

import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_tracking import about, point

from engine.track.aside import Aside
from engine.track.child import Child
from engine.track.metrics import Point

pytestmark = pytest.mark.slow
LOSSES = [(10, 0.5), (20, 0.4), (20, 0.3)]


def two_lives(service: str, folder: Path) -> None:
    """Tells of a run that breaks off after step 20, and goes on to its end from step 10."""
    again, end = Point(11, 1011.0, {}, again=True), Point(30, 1030.0, {"final/steps": 30})
    first, second = [point(*one) for one in LOSSES[:2]], [again, point(*LOSSES[2]), end]
    for life, finished in ((first, False), (second, True)):
        aside = Aside(service, lambda: Child(service, about(folder)))
        for one in life:
            aside.put(one)
        aside.end(finished)
        aside.join(240)


def leveldb_records(file: Path) -> list[bytes]:
    """Of a .wandb file: LevelDB's log format, after seven bytes of its own. Records that go over
    the end of a block are not expected."""
    data, records = file.read_bytes()[7:], []
    while data:
        _, size, kind = struct.unpack("<IHB", data[:7])
        assert kind == 1, "a record in one piece"
        records.append(data[7 : 7 + size])
        data = data[7 + size :]
    return records


def test_wandb_keeps_both_lives_under_one_id(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed: pip install wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    two_lives("wandb", tmp_path)
    told, runs, exits = [], [], []
    for file in sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb")):
        for one in map(Record.FromString, leveldb_records(file)):
            if one.HasField("history"):
                items = {(i.key or "/".join(i.nested_key)): i.value_json for i in one.history.item}
                told.append((int(items["step"]), items.get("train/loss")))
            if one.HasField("run"):
                runs.append((one.run.run_id, one.run.project, one.run.display_name, *one.run.tags))
            if one.HasField("exit"):
                exits.append(one.exit.exit_code)
    assert told == [(10, "0.5"), (20, "0.4"), (20, "0.3"), (30, None)]
    assert len({*runs}) == 1 and runs[0][1:] == ("promptkd", "a", "fast")
    assert exits == [1, 0]


def test_mlflow_keeps_both_lives_in_one_run(tmp_path, monkeypatch):
    for package in ("mlflow", "sqlalchemy", "alembic"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install {package}")
    where = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", where)
    two_lives("mlflow", tmp_path)
    from mlflow import MlflowClient

    client = MlflowClient(where)
    experiment = client.get_experiment_by_name("promptkd")
    (run,) = client.search_runs([experiment.experiment_id])
    told = client.get_metric_history(run.info.run_id, "train/loss")
    assert sorted((one.step, one.value) for one in told) == sorted(LOSSES)
    assert run.info.run_name == "a" and run.info.status == "FINISHED" and "fast" in run.data.tags
    assert run.data.params == {"train.lr": "0.1"} and run.data.metrics["final/steps"] == 30


def test_trackio_keeps_both_lives_in_one_run(tmp_path, monkeypatch):
    pytest.importorskip("trackio", reason="trackio is not installed: pip install trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    two_lives("trackio", tmp_path)
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = SQLiteStorage.get_runs("promptkd")
    logs = SQLiteStorage.get_logs("promptkd", run)
    assert sorted((o["step"], o["train/loss"]) for o in logs if "train/loss" in o) == sorted(LOSSES)
    assert SQLiteStorage.get_run_config("promptkd", run)["train.lr"] == 0.1


def test_a_service_that_nobody_reaches_costs_a_run_no_time(tmp_path, monkeypatch, capsys):
    pytest.importorskip("wandb", reason="wandb is not installed: pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    aside = Aside("wandb", lambda: Child("wandb", about(tmp_path)))
    started = time.monotonic()
    for step in range(5000):
        aside.put(point(step))
    assert time.monotonic() - started < 5
    aside.end(finished=True)
    aside.join(5)
    assert "warning: wandb has not ended in time" in capsys.readouterr().err


def test_a_service_without_a_login_says_so(tmp_path, monkeypatch, capsys):
    pytest.importorskip("wandb", reason="wandb is not installed: pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    aside = Aside("wandb", lambda: Child("wandb", about(tmp_path)))
    aside._thread.join(240)
    err = capsys.readouterr().err
    assert "nothing more is told to wandb" in err and "key" in err.lower()


def test_a_child_ends_with_the_driver(tmp_path):
    """However it ends: here by SIGKILL."""
    pytest.importorskip("wandb", reason="wandb is not installed: pip install wandb")
    program = (
        "import os, signal, time\n"
        "from test_tracking import about, point\n"
        "from engine.track.child import Child\n"
        f"child = Child('wandb', about(__import__('pathlib').Path({str(tmp_path)!r})))\n"
        "child.log(point(10))\n"
        "print(child._process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = os.pathsep.join([*sys.path, str(Path(__file__).parent)])
    env = {**os.environ, "PYTHONPATH": path, "WANDB_MODE": "offline"}
    told = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    pid, deadline = int(told.stdout), time.monotonic() + 240
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text():
        assert time.monotonic() < deadline, "it goes on"
        time.sleep(0.5)
    assert [*tmp_path.glob("wandb/offline-run-*/run-*.wandb")]
