"""A Ray cluster on this machine, beside whatever else runs here, and jobs on it."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

RAY = Path(sys.executable).with_name("ray")
_START_S = 180  # on a busy machine


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, outside those that Ray gives its workers (10002 to 19999)."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    numbers = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    assert min(numbers) > 20_000
    return numbers


@contextmanager
def cluster(folder: Path, head: str, *nodes: str, ray: Path = RAY) -> Iterator[str]:
    """A head and further nodes, each with some options of `ray start`; gives the jobs address. The
    token is that of RAY_AUTH_TOKEN. What they say is in `folder`."""
    port, dashboard, client, *agents = free_ports(4 + len(nodes))
    first = ["--head", f"--port={port}", f"--dashboard-port={dashboard}"]
    first += ["--dashboard-host=127.0.0.1", f"--ray-client-server-port={client}", *head.split()]
    temporary = tempfile.mkdtemp(prefix="ray")  # Ray's sockets want a short path
    first.append(f"--temp-dir={temporary}")
    address = f"http://127.0.0.1:{dashboard}"
    started: list[subprocess.Popen[bytes]] = []
    try:
        for number, options in enumerate([first, *(node.split() for node in nodes)]):
            if number:
                options = [f"--address=127.0.0.1:{port}", *options]
            agent = f"--dashboard-agent-listen-port={agents[number]}"
            log = folder / f"node-{number}.log"
            with open(log, "w") as file:
                command = [ray, "start", "--block", "--disable-usage-stats", agent, *options]
                env = os.environ | {"RAY_raylet_start_wait_time_s": str(_START_S)}
                started.append(subprocess.Popen(command, stdout=file, stderr=file, env=env))
            _wait_until_started(started[-1], log)
        yield address
    finally:
        for one in reversed(started):
            one.terminate()
        for one in started:
            with suppress(subprocess.TimeoutExpired):
                one.wait(60)
        shutil.rmtree(temporary, ignore_errors=True)


def submitted(words: list[object], **env: str) -> subprocess.CompletedProcess[str]:
    """`promptkd submit` in a process of its own, since Ray reads its token once a process."""
    command = [sys.executable, "-m", "jobs.cli", *map(str, words)]
    return subprocess.run(command, env=os.environ | env, capture_output=True, text=True)


def _wait_until_started(node: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while "Ray runtime started" not in (told := log.read_text()):
        assert node.poll() is None and time.monotonic() < deadline, told
        time.sleep(0.5)
