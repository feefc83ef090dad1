"""Signals to the driver and to workers of real runs, each on a Ray of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from domains import config_of, losses, write_domain

from engine.clip.bundle import Bundle
from engine.config import to_dict
from engine.run import distill
from engine.train import checkpoint

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def domain(tmp_path_factory) -> Path:
    return write_domain(tmp_path_factory.mktemp("domain"))


class Run:
    """A run that another process drives."""

    def __init__(self, domain: Path, runs: Path, *flags: str, words: tuple[str, ...] = ()) -> None:
        self.config = config_of(domain, runs, "run", *flags)
        self.folder = self.config.folder
        file = runs / "run.json"
        file.write_text(json.dumps(to_dict(self.config)))
        command = [sys.executable, "-m", "jobs.cli", "distill", str(file), *words]
        self.log = open(runs / "log.txt", "a+")
        self.driver = psutil.Popen(command, stderr=self.log, start_new_session=True)

    def until(self, reached: Callable[[], bool], timeout_s: float = 120) -> None:
        deadline = time.monotonic() + timeout_s
        while not reached():
            assert self.driver.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.05)

    def until_step(self, step: int) -> None:
        self.until(lambda: bool(self.steps()) and self.steps()[-1] >= step)

    def steps(self) -> list[int]:
        file = self.folder / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        told = [json.loads(line) for line in lines]
        return [record["step"] for record in told if record["kind"] == "train"]

    def processes(self) -> list[psutil.Process]:
        """All that descend from the driver but Ray's two node agents, which hold nothing of a run
        and outlive a killed raylet by more than half a minute (measured, Ray 2.60)."""
        agents = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
        everyone = self.driver.children(recursive=True)
        return [one for one in everyone if not " ".join(one.cmdline()).startswith(agents)]

    def workers(self) -> list[psutil.Process]:
        return [one for one in self.processes() if "RayTrainWorker" in " ".join(one.cmdline())]

    def ended(self, timeout_s: float) -> int:
        return self.driver.wait(timeout_s)

    def said(self) -> str:
        self.log.seek(0)
        return self.log.read()

    def told(self, name: str) -> dict:
        return json.loads((self.folder / f"{name}.json").read_text())


@pytest.fixture
def start(domain, tmp_path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def begin(*flags: str, words: tuple[str, ...] = ()) -> Run:
        runs.append(Run(domain, tmp_path, *flags, words=words))
        return runs[-1]

    yield begin
    for run in runs:
        for process in [*run.processes(), run.driver] if run.driver.is_running() else []:
            process.kill()
        run.driver.wait()
        run.log.close()


def all_gone(processes: list[psutil.Process], timeout_s: float) -> float:
    """Seconds until none of some processes is left."""
    started = time.monotonic()
    _, left = psutil.wait_procs(processes, timeout_s)
    assert not left, left
    return time.monotonic() - started


def learned(folder: Path) -> dict[str, torch.Tensor]:
    return Bundle.load(folder / "bundle.safetensors").learned


@pytest.mark.parametrize("word", ("SIGTERM", "Ctrl-C"))
def test_a_drained_run_has_lost_no_step(domain, start, local_ray, tmp_path, word):
    passes = ("--train.passes", "10")
    calm = config_of(domain, tmp_path / "calm", "run", *passes, "--train.checkpoint_steps", "500")
    distill(calm)
    run = start(*passes, "--train.checkpoint_steps", "500")
    run.until_step(7)
    processes, started = run.processes(), time.monotonic()
    if word == "Ctrl-C":
        os.killpg(run.driver.pid, signal.SIGINT)  # a terminal's, to all of a process group
    else:
        run.driver.send_signal(signal.SIGTERM)
    assert run.ended(30) == (130 if word == "Ctrl-C" else 143), run.said()
    print(f"drained in {time.monotonic() - started:.1f} s")
    step = run.steps()[-1]
    assert 7 <= step < 60
    assert checkpoint.load_latest(run.folder / "checkpoints").step == step
    ledger = run.told("ledger")
    assert ledger["seen"] == 1920 and ledger["pending"] == 1920 - 32 * step
    assert f"{word} again stops at once" in run.said()
    assert f"ended by {word} after step {step}; --resume goes on from there" in run.said()
    assert not (run.folder / "lease.json").exists()
    all_gone(processes, 30)

    distill(run.config, resume=True)
    assert run.steps() == list(range(1, 61)), "each step once"
    assert losses(run.folder) == losses(calm.folder)
    for name, tensor in learned(calm.folder).items():
        assert torch.equal(learned(run.folder)[name], tensor), name
    assert run.told("ledger") == json.loads((calm.folder / "ledger.json").read_text())


def test_a_second_sigterm_ends_a_driver_at_once(start):
    run = start("--train.passes", "500")
    run.until_step(3)
    processes = [*run.processes(), run.driver]
    for worker in run.workers():
        worker.suspend()  # so that the drain cannot end by itself
    run.driver.send_signal(signal.SIGTERM)
    run.until(lambda: "SIGTERM" in run.said(), 10)
    run.driver.send_signal(signal.SIGTERM)
    assert run.ended(3) == 143
    all_gone(processes, 60)


def test_a_second_ctrl_c_stops_a_run_at_its_newest_checkpoint(start):
    run = start("--train.passes", "500", "--train.checkpoint_steps", "2")
    run.until_step(5)
    processes = run.processes()
    for worker in run.workers():
        worker.suspend()
    for said in ("Ctrl-C again stops at once", "stopped; --resume goes on from the newest"):
        os.killpg(run.driver.pid, signal.SIGINT)
        if "again" in said:
            run.until(lambda said=said: said in run.said(), 10)
    assert run.ended(30) == 130 and said in run.said(), run.said()
    saved = checkpoint.load_latest(run.folder / "checkpoints")
    assert saved and saved.step >= 4 and run.told("ledger")["trained"] == 32 * saved.step
    assert not (run.folder / "lease.json").exists()
    all_gone(processes, 60)


@pytest.mark.parametrize("phase", ("device cpu", "starting student"))
def test_ctrl_c_before_students_learn_stops_at_once(start, phase):
    run = start("--train.passes", "500")
    run.until(lambda: phase in run.said())
    processes = run.processes()
    os.killpg(run.driver.pid, signal.SIGINT)
    assert run.ended(20) == 130, run.said()
    assert run.said().endswith("promptkd distill: interrupted\n") and not run.steps()
    all_gone(processes, 30)


def test_ctrl_c_drains_the_seed_that_is_trained(start):
    run = start("--train.passes", "500", words=("--seeds", "1,2"))
    run.folder = run.folder / "seed-1"
    run.until_step(3)
    os.killpg(run.driver.pid, signal.SIGINT)
    assert run.ended(30) == 130, run.said()
    assert checkpoint.load_latest(run.folder / "checkpoints").step == run.steps()[-1]
    assert f"ended by Ctrl-C after step {run.steps()[-1]}" in run.said()
    assert not run.folder.with_name("seed-2").exists()


def test_a_drain_that_hangs_is_given_up_in_time(start):
    run = start("--train.passes", "500", "--train.checkpoint_steps", "2")
    run.until_step(5)
    processes = run.processes()
    for worker in run.workers():
        worker.suspend()
    run.driver.send_signal(signal.SIGTERM)
    assert run.ended(30) == 143, run.said()
    assert "student workers did not leave within 20 s" in run.said()
    assert run.told("ledger")["trained"] > 0
    all_gone(processes, 60)


@pytest.mark.parametrize(
    ("phase", "then_s"), (("starting Ray", 0.5), ("starting Ray", 2), ("device cpu", 0))
)
def test_sigterm_before_students_are_at_work_ends_a_driver(start, phase, then_s):
    run = start("--train.passes", "500")
    run.until(lambda: phase in run.said())
    time.sleep(then_s)
    processes = run.processes()
    run.driver.send_signal(signal.SIGTERM)
    assert run.ended(30) == 143, run.said()
    all_gone(processes, 60)


@pytest.mark.parametrize("source", ("inline", "stream"))
def test_a_killed_driver_leaves_no_process_and_its_run_goes_on(domain, start, source, local_ray):
    flags = ("--train.passes", "6", "--targets.source", source, "--corpus.isolate")
    run = start(*flags)
    run.until_step(7)
    processes = run.processes()
    assert len(processes) > 4
    run.driver.kill()
    print(f"{len(processes)} processes gone in {all_gone(processes, 60):.1f} s")
    assert (run.folder / "lease.json").exists() and not (run.folder / "ledger.json").exists()
    summary = distill(run.config, resume=True)
    assert summary["steps"] == 36 and run.told("ledger")["pending"] == 0
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    told = [json.loads(line) for line in lines]
    (at,) = (n for n, record in enumerate(told) if record["kind"] == "resumed")
    steps = [record["step"] for record in told[at:] if record["kind"] == "train"]
    assert told[at]["step"] >= 5 and steps == list(range(told[at]["step"] + 1, 37))


def test_a_worker_that_is_told_to_leave_costs_no_step(start):
    run = start("--train.passes", "10", "--student.workers", "2", "--train.max_failures", "0")
    run.until_step(7)
    run.workers()[1].terminate()
    assert run.ended(120) == 0, run.said()
    assert "a worker is to leave: step" in run.said()
    assert run.steps() == list(range(1, 61)), "each step once"


@pytest.mark.parametrize(("signal_", "some"), ((signal.SIGSTOP, 1), (signal.SIGKILL, 2)))
def test_workers_that_are_killed_at_once_or_hang_are_replaced(start, signal_, some):
    flags = ("--train.passes", "10", "--student.workers", "2", "--student.timeout_s", "5")
    run = start(*flags)
    run.until_step(7)
    struck = run.workers()[:some]
    assert len(struck) == some
    for worker in struck:
        worker.send_signal(signal_)
    started, before = time.monotonic(), len(run.steps())
    run.until(lambda: len(run.steps()) > before + 1)
    print(f"first new step after {time.monotonic() - started:.1f} s")
    all_gone(struck, 30)
    assert run.ended(120) == 0, run.said()
    assert sorted(set(run.steps())) == list(range(1, 61))


@pytest.mark.parametrize("who", ("gcs_server", "ray::TrainController"))
def test_a_run_outlives_the_head_of_its_cluster_and_its_controller(domain, start, local_ray, who):
    run = start("--train.passes", "6")
    run.until_step(7)
    processes = run.processes()
    (head,) = (one for one in processes if who in one.cmdline()[0])
    head.kill()
    assert run.ended(120) == 1, run.said()
    assert who == "gcs_server" or "--resume goes on from the newest checkpoint" in run.said()
    all_gone(processes, 60)
    distill(run.config, resume=True)
    assert run.told("ledger")["pending"] == 0


def test_two_drivers_of_one_folder_do_not_both_write(domain, start, tmp_path):
    run = start("--train.passes", "500")
    run.until_step(2)
    file = tmp_path / "run.json"
    for word in ("--resume", "--overwrite"):
        command = [sys.executable, "-m", "jobs.cli", "distill", str(file), word]
        second = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert second.returncode == 2
        assert f"is being written by process {run.driver.pid} on" in second.stderr
    assert run.driver.poll() is None
    os.kill(run.driver.pid, signal.SIGINT)
    assert run.ended(60) == 130
