"""Runs over two hosts, whose network is slowed, goes away and comes back.

The hosts are network namespaces of this machine, which share its files and its processors.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

import psutil
import pytest
import torch
from domains import config_of, losses, write_domain

from engine.clip.bundle import Bundle
from engine.config import to_dict
from engine.run import distill

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

HEAD = "10.77.0.1:6379"
RAY = Path(sys.executable).with_name("ray")
STEPS = 120
FLAGS = ("--train.passes", "20", "--student.workers", "2", "--student.timeout_s", "5")
FLAGS += ("--targets.timeout_s", "60", "--train.max_failures", "-1")
SOURCES = {
    "inline": ("--targets.source", "inline"),
    "stream": ("--targets.source", "stream", "--teacher.actors", "2"),
}


def ip(*words: str) -> str:
    """What iproute2 says. Raises CalledProcessError."""
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


class Host:
    """A network namespace with an interface `eth0`, and what runs in it."""

    def __init__(self, name: str, address: str) -> None:
        self.name, self.address = name, address
        self._folder = Path(f"/tmp/{name}")  # of Ray: the path of a socket has 107 bytes at most
        self._logs: list[IO[str]] = []
        ip("netns", "add", name)

    def join(self) -> None:
        """Once it has its interface."""
        ip("-n", self.name, "address", "add", f"{self.address}/24", "dev", "eth0")
        for link in ("lo", "eth0"):
            ip("-n", self.name, "link", "set", link, "up")

    def cut(self) -> None:
        ip("-n", self.name, "link", "set", "eth0", "down")

    def mend(self) -> None:
        ip("-n", self.name, "link", "set", "eth0", "up")

    def slow(self, *words: str) -> bool:
        """Delays or loses what the host sends, where the kernel can (sch_netem)."""
        command = ["tc", "-n", self.name, "qdisc", "add", "dev", "eth0", "root", "netem", *words]
        return (
            bool(shutil.which("tc")) and not subprocess.run(command, capture_output=True).returncode
        )

    def start(self, log: Path, *command: str) -> psutil.Popen:
        told = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": "two-hosts-of-one-test-" + "a" * 32,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            # So that Ray finds a node gone after 25 s, not after 65.
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "4000",
        }
        self._logs.append(open(log, "a"))
        return psutil.Popen(
            ["ip", "netns", "exec", self.name, *command],
            env=os.environ | told,
            stdout=self._logs[-1],
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def start_ray(self, *words: str) -> None:
        """A node of one CPU."""
        self._folder.mkdir(exist_ok=True)
        log = self._folder / "start.txt"
        command = [str(RAY), "start", *words, "--node-ip-address", self.address]
        command += ["--temp-dir", str(self._folder), "--disable-usage-stats"]
        assert self.start(log, *command, "--num-cpus", "1").wait(120) == 0, log.read_text()

    def runs(self, what: str) -> int:
        """How many processes have a name like this."""
        return sum(what in " ".join(one.info["cmdline"] or ()) for one in self._processes())

    def clear(self) -> None:
        """Ends all that runs here, Ray's daemons too."""
        while left := self._processes():
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(left, 10)

    def close(self) -> None:
        self.clear()
        ip("netns", "delete", self.name)
        shutil.rmtree(self._folder, ignore_errors=True)
        for log in self._logs:
            log.close()

    def _processes(self) -> list[psutil.Process]:
        pids = set(map(int, ip("netns", "pids", self.name).split()))
        found = [one for one in psutil.process_iter(["cmdline", "status"]) if one.pid in pids]
        return [one for one in found if one.info["status"] != psutil.STATUS_ZOMBIE]


@pytest.fixture(scope="module")
def domain(tmp_path_factory) -> Path:
    return write_domain(tmp_path_factory.mktemp("domain"))


@pytest.fixture(scope="module")
def calm(domain, tmp_path_factory) -> Callable[[str], Path]:
    """calm(source): the folder of the run of two workers on one host."""
    done: dict[str, Path] = {}

    def run(source: str) -> Path:
        if source not in done:
            config = config_of(
                domain, tmp_path_factory.mktemp("calm"), "run", *FLAGS, *SOURCES[source]
            )
            distill(config)
            done[source] = config.folder
        return done[source]

    return run


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    """Two that form a Ray cluster; the first is its head."""
    if os.geteuid():
        pytest.skip("network namespaces need root")
    made: list[Host] = []
    try:
        try:
            for letter, address in (("a", "10.77.0.1"), ("b", "10.77.0.2")):
                made.append(Host(f"pkd{os.getpid()}{letter}", address))
            a, b = made
            ends = [["eth0", "netns", a.name], ["peer", "name", "eth0", "netns", b.name]]
            ip("link", "add", *ends[0], "type", "veth", *ends[1])
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network namespaces here: {getattr(error, 'stderr', error)}")
        for host in made:
            host.join()
        a.start_ray("--head", "--port", "6379", "--include-dashboard", "false")
        b.start_ray("--address", HEAD)
        yield a, b
    finally:
        for host in made:
            host.close()


class Run:
    """A run that is driven on a host."""

    def __init__(self, host: Host, domain: Path, runs: Path, *flags: str) -> None:
        config = config_of(domain, runs, "run", *FLAGS, *flags, "--ray.address", HEAD)
        self.folder, self._host = config.folder, host
        self._file, self._log = runs / "run.json", runs / "log.txt"
        self._file.write_text(json.dumps(to_dict(config)))
        self.drive()

    def drive(self, *words: str) -> None:
        command = (sys.executable, "-m", "jobs.cli", "distill", str(self._file), *words)
        self.driver = self._host.start(self._log, *command)

    def until(self, reached: Callable[[], bool], timeout_s: float = 180) -> float:
        """Waits, and gives how many seconds it was, or until the driver has ended."""
        started = time.monotonic()
        while not reached():
            assert self.driver.poll() is None, self.said()
            assert time.monotonic() < started + timeout_s, self.said()
            time.sleep(0.1)
        return time.monotonic() - started

    def ended(self, timeout_s: float) -> int:
        try:
            return self.driver.wait(timeout_s)
        except psutil.TimeoutExpired:
            raise AssertionError(self.said()) from None

    def steps(self) -> list[int]:
        file = self.folder / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        told = [json.loads(line) for line in lines]
        return [record["step"] for record in told if record["kind"] == "train"]

    def said(self) -> str:
        return self._log.read_text()


def require_same(folder: Path, calm: Path) -> None:
    """The same ledger, and bit by bit the same student."""
    told, wanted = (json.loads((one / "ledger.json").read_text()) for one in (folder, calm))
    assert told == wanted and told["pending"] == 0 and told["seen"] == 20 * 192
    wanted = Bundle.load(calm / "bundle.safetensors").learned
    learned = Bundle.load(folder / "bundle.safetensors").learned
    assert learned.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(learned[name], tensor), name


@pytest.mark.parametrize("source", SOURCES)
def test_two_hosts_learn_what_one_does(domain, calm, hosts, source, tmp_path):
    """By a network that is slow and loses packets, where the kernel can make it so: it has no
    sch_netem in many a virtual machine, where the network is as good as it gets."""
    expected = calm(source)
    slowed = [host.slow("delay", "2ms", "1ms", "loss", "0.5%") for host in hosts]
    print("2 ms late, 0.5 % lost" if all(slowed) else "no netem here: nothing late, nothing lost")
    run = Run(hosts[0], domain, tmp_path, *SOURCES[source])
    run.until(lambda: bool(run.steps()))
    assert [host.runs("ray::RayTrainWorker") for host in hosts] == [1, 1]
    if source == "stream":
        assert [host.runs("ray::TeacherActor") for host in hosts] == [1, 1]
    assert run.ended(300) == 0, run.said()
    assert run.steps() == list(range(1, STEPS + 1)), "each step once"
    assert losses(run.folder) == losses(expected)
    require_same(run.folder, expected)


def test_a_link_that_is_down_for_a_moment_costs_no_step(domain, calm, hosts, tmp_path):
    expected = calm("inline")
    run = Run(hosts[0], domain, tmp_path, *SOURCES["inline"])
    run.until(lambda: len(run.steps()) >= 17)
    hosts[0].cut()
    time.sleep(2)
    assert len(run.steps()) < STEPS
    hosts[0].mend()
    before = len(run.steps())
    print(f"next step {run.until(lambda: len(run.steps()) > before):.1f} s after the link was back")
    assert run.ended(300) == 0, run.said()
    assert run.steps() == list(range(1, STEPS + 1)), "each step once"
    require_same(run.folder, expected)


@pytest.mark.parametrize("source", SOURCES)
def test_a_run_goes_on_when_a_lost_host_is_back(domain, calm, hosts, source, tmp_path):
    a, b = hosts
    expected = calm(source)
    run = Run(a, domain, tmp_path, *SOURCES[source])
    run.until(lambda: len(run.steps()) >= 17)
    a.cut()
    found_s = run.until(lambda: not a.runs("ray::RayTrainWorker"))
    dead_s = found_s + run.until(lambda: "has been marked dead" in run.said())
    before = len(run.steps())
    assert before < STEPS
    b.clear()
    a.mend()
    b.start_ray("--address", HEAD)
    back_s = run.until(lambda: len(run.steps()) > before)
    print(f"workers ended {found_s:.1f} s after the link, their node {dead_s:.1f} s after it")
    print(f"first new step {back_s:.1f} s after the node was back")
    assert run.ended(400) == 0, run.said()
    steps = run.steps()
    assert sorted(set(steps)) == list(range(1, STEPS + 1))
    assert before - steps[before] < 5, "it goes on from the last checkpoint"
    require_same(run.folder, expected)
