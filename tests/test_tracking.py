"""Trackers, sound and broken: event files, and the libraries of others where they are installed."""

import dataclasses
import json
import os
import signal
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from events import read_events, scalars
from test_track_metrics import TRAIN, worker
from workers import config_of

from engine.config import RunConfig, TrackConfig, UserError, to_dict
from engine.parse import parse
from engine.progress import Watch
from engine.track import aside as aside_module
from engine.track import tracking
from engine.track.aside import Aside
from engine.track.child import About, Child
from engine.track.metrics import Point
from engine.track.tensorboard import TensorBoard
from engine.track.tracking import Tracking, require_installed
from engine.train.identity import Identity

SERVICES = ("wandb", "trackio", "mlflow")
ABSENT = [service for service in SERVICES if find_spec(service) is None]


def about(folder: Path, **config) -> About:
    return About("a", "promptkd", str(folder), {"train.lr": 0.1, **config}, ("fast",))


def point(step: int, value: float = 0.5, **more) -> Point:
    return Point(step, 1000.0 + step, {"train/loss": value}, **more)


def await_true(what, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline, "it has not come true"
        time.sleep(0.02)


class Deaf:
    """A tracker that takes for ever over its first point."""

    def __init__(self) -> None:
        self.free = threading.Event()

    def log(self, point: Point) -> None:
        self.free.wait()

    def tick(self) -> None:
        pass

    def close(self, finished: bool) -> None:
        pass

    def give_up(self) -> None:
        self.free.set()


# --- settings


def run_config(*words: str) -> RunConfig:
    return parse(RunConfig, ["--name", "a", *words], prog="test", from_files=True)


def test_trackers_are_told_in_a_file_and_on_the_command_line(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('[track]\nto = ["wandb", "mlflow"]\nproject = "flowers"\n')
    told = run_config(str(file)).track
    assert told == TrackConfig(to=("wandb", "mlflow"), project="flowers")
    assert run_config(str(file), "--track.to", "tensorboard").track.to == ("tensorboard",)
    assert run_config(str(file), "--track.to").track.to == ()
    file.write_text("[track]\nto = []\n")
    assert run_config(str(file)).track.to == ()
    assert run_config().track == TrackConfig(to=("tensorboard",), project="promptkd")
    (tmp_path / "run.json").write_text(json.dumps(to_dict(run_config("--track.to", "mlflow"))))
    assert run_config(str(tmp_path / "run.json")).track.to == ("mlflow",)


def test_wrong_trackers_are_refused(tmp_path, capsys):
    with pytest.raises(UserError, match=r"track\.to names one twice: wandb, wandb"):
        TrackConfig(to=("wandb", "wandb"))
    with pytest.raises(UserError, match=r"track\.project must be a plain name, got ' '"):
        TrackConfig(project=" ")
    with pytest.raises(SystemExit):
        run_config("--track.to", "comet")
    assert "--track.to" in capsys.readouterr().err


def test_who_is_told_is_no_part_of_what_a_run_is():
    config = config_of("runs", "a", {})
    other = dataclasses.replace(config, track=TrackConfig(to=(), project="another"))
    assert Identity.asked(config) == Identity.asked(other)


@pytest.mark.parametrize("service", ABSENT)
def test_a_tracker_that_is_not_installed_is_refused_at_once(service, tmp_path, monkeypatch):
    (tmp_path / service).mkdir()  # as some of them leave behind where they ran
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=rf"track.to: {service} .* `pip install {service}"):
        require_installed(TrackConfig(to=("tensorboard", service)))
    require_installed(TrackConfig())


# --- threads of their own


def test_a_tracker_gets_all_points_and_the_end(tmp_path):
    made = []

    def make() -> TensorBoard:
        made.append(TensorBoard(tmp_path / "tensorboard", {}))
        return made[0]

    aside = Aside("TensorBoard", make)
    for step in range(100):
        aside.put(point(step, step / 2))
    aside.end(finished=True)
    aside.join(60)
    assert scalars(tmp_path / "tensorboard")["train/loss"] == [(n, n / 2) for n in range(100)]


def test_a_tracker_that_hangs_is_left_behind(capsys):
    tracker = Deaf()
    aside = Aside("Deaf", lambda: tracker)
    for step in range(3000):
        aside.put(point(step))  # each returns at once
    aside.end(finished=True)
    aside.join(0.1)
    assert tracker.free.is_set()
    err = capsys.readouterr().err
    assert err.count("warning: Deaf does not keep up; some of what it is told is dropped") == 1
    assert err.count("warning: Deaf has not ended in time; the run goes on without it") == 1


def test_a_tracker_that_raises_is_told_of_once(tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("a file, where a folder is to be")
    aside = Aside("TensorBoard", lambda: TensorBoard(tmp_path / "tensorboard", {}))
    await_true(lambda: not aside._thread.is_alive())
    for step in range(10):
        aside.put(point(step))
    aside.end(finished=False)
    aside.join(60)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: nothing more is told to TensorBoard: ")
    assert "tensorboard" in line


# --- TensorBoard


def test_event_files_tell_settings_numbers_notices_and_new_starts(tmp_path):
    first = TensorBoard(tmp_path, {"train.lr": 0.1, "teacher.model": "ViT-L-14"})
    first.log(point(10, 0.5))
    first.log(Point(10, 1010.0, {}, text="a decoder died"))
    first.close(finished=False)
    second = TensorBoard(tmp_path, {})  # in the same second
    second.log(Point(6, 1020.0, {}, again=True))
    second.log(point(10, 0.25))
    second.close(finished=True)
    assert len([*tmp_path.iterdir()]) == 2
    events = read_events(tmp_path)
    versions = [event for event in events if event.file_version]
    assert [event.file_version for event in versions] == ["brain.Event:2"] * 2
    texts = {
        value.tag: value.tensor.string_val[0].decode()
        for event in events
        for value in event.summary.value
        if value.metadata.plugin_data.plugin_name == "text"
    }
    assert texts["notice/text_summary"] == "a decoder died"
    lines = read_events(tmp_path)[1].summary.value[0].tensor.string_val[0].decode().splitlines()
    assert lines[2:] == ["| train.lr | 0.1 |", "| teacher.model | ViT-L-14 |"]
    (start,) = [event for event in events if event.HasField("session_log")]
    assert start.step == 6 and start.session_log.status == start.session_log.START
    assert scalars(tmp_path)["train/loss"] == [(10, 0.5), (10, 0.25)]
    told = next(event for event in events if event.step == 10)
    assert told.wall_time == 1010.0


# --- processes of their own


@pytest.mark.skipif(not ABSENT, reason="all trackers are installed here")
def test_a_child_that_fails_says_why_and_leaves_a_log(tmp_path, capsys, monkeypatch):
    service = ABSENT[0]
    monkeypatch.setattr(aside_module, "_TICK_S", 0.1)
    aside = Aside(service, lambda: Child(service, about(tmp_path)))
    await_true(lambda: not aside._thread.is_alive())
    aside.end(finished=True)
    aside.join(60)
    log = tmp_path / "track" / f"{service}.log"
    told = [capsys.readouterr().err]

    def has_said(line: str) -> bool:
        told.append(capsys.readouterr().err)
        return line in "".join(told)

    await_true(lambda: has_said(f"{service}: No module named '{service}'"))
    assert has_said(f"nothing more is told to {service}: its process has ended with code 1; see")
    assert "ModuleNotFoundError" in log.read_text()


def test_a_child_that_hangs_is_ended(tmp_path, capsys):
    children = []

    def make() -> Child:
        children.append(Child("wandb", about(tmp_path)))
        os.kill(children[0]._process.pid, signal.SIGSTOP)  # it hears nothing, and cannot end
        return children[0]

    aside = Aside("wandb", make)
    await_true(lambda: children)
    text = "x" * 1000  # more than its pipe holds
    for step in range(1000):
        aside.put(Point(step, 1.0, {}, text=text))
    aside.end(finished=True)
    aside.join(0.5)
    assert children[0]._process.wait(60) == -signal.SIGKILL
    assert "warning: wandb has not ended in time" in capsys.readouterr().err


# --- the whole


def test_what_a_watch_reads_is_tracked(tmp_path):
    config = config_of(tmp_path / "flowers", "seed-1", {})
    config.folder.mkdir(parents=True)
    metrics = config.folder / "metrics.jsonl"
    with Tracking({"one": config}) as told, Watch({"one": metrics}, [told], quiet_s=0.02):
        metrics.write_text(json.dumps(TRAIN) + "\n" + json.dumps(worker(0)) + "\n")
        (config.folder / "summary.json").write_text(json.dumps({"steps": 80, "train_s": 2.0}))
    tags = scalars(config.folder / "tensorboard")
    assert tags["train/loss"] == [(20, 0.5)] and tags["student/0/images_per_second"] == [(20, 128)]
    assert tags["final/steps"] == [(20, 80)] and tags["students/waited_labels"][0][0] == 20


def test_a_tracker_is_told_no_secrets():
    shards = "/data/a::https://me:word@host/b.tar?signature=c"
    config = config_of("runs", "a", {"corpus.shards": shards})
    told = tracking._about(config)
    assert told.config["corpus.shards"] == "/data/a::https://host/b.tar?..."
    assert told.config["train.batch"] == 8 and told.name == "a"
    assert tracking._about(config_of("/x/flowers", "seed-1", {})).name == "flowers-seed-1"
