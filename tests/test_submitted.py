"""The quickstart's distillation as a job on a cluster of two nodes, as a user submits it."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from clusters import cluster, submitted
from domains import write_domain

from engine.clip.bundle import Bundle
from jobs.quickstart import HERE, SETTINGS


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A head for students, and a node for teachers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", "a" * 64)
        patch.delenv("RAY_ADDRESS", raising=False)
        folder = tmp_path_factory.mktemp("cluster")
        nodes = ('--num-cpus=2 --resources={"student":1}', '--num-cpus=1 --resources={"teacher":1}')
        with cluster(folder, *nodes) as address:
            yield address


@pytest.fixture(scope="module")
def toml(tmp_path_factory) -> Path:
    """The quickstart's distillation over a small domain, with its paths."""
    folder = tmp_path_factory.mktemp("quickstart")
    domain = write_domain(folder / "domain")
    file = folder / "run.toml"
    text = (SETTINGS / "distill.toml").read_text()
    more = {
        "[corpus]": f'shards = "{domain}/shards"\nevaluation = "{domain}/evaluation"\n',
        "[teacher]": f'model = "local-dir:{HERE}/models/teacher"\n',
        "[student]": f'model = "local-dir:{HERE}/models/student"\n',
    }
    for section, lines in more.items():
        text = text.replace(f"{section}\n", f"{section}\n{lines}")
    text += f'[classes]\nnames = "{domain}/classes.txt"\n'
    file.write_text(f'runs_dir = "{folder}/runs"\n{text}')
    return file


def of(address: str, *words: object) -> list[object]:
    return ["submit", *words, "--address", address]


def on(address: str, toml: Path, *words: object) -> list[object]:
    return of(address, toml, "--python", sys.executable, *words)


PLACED = ("--teacher.resource", "teacher", "--student.resource", "student")


@pytest.mark.ray
@pytest.mark.slow
def test_the_quickstart_comes_to_the_same_as_a_job_and_here(address, toml):
    run = submitted(on(address, toml, "--name", "there", *PLACED))
    assert run.returncode == 0, run.stdout + run.stderr
    assert "sending " in run.stderr and "job promptkd-there-" in run.stderr
    command = [sys.executable, "-m", "jobs.cli", "distill", str(toml), "--name", "here"]
    here = subprocess.run(command, capture_output=True, text=True)
    assert here.returncode == 0, here.stderr
    runs = toml.parent / "runs"
    ours, theirs = (Bundle.load(runs / name / "bundle.safetensors") for name in ("here", "there"))
    assert all(value.equal(theirs.learned[name]) for name, value in ours.learned.items())
    ledgers = [json.loads((runs / name / "ledger.json").read_text()) for name in ("here", "there")]
    assert ledgers[0] == ledgers[1] and ledgers[0]["trained"] > 1000
    assert "novel" in run.stdout


@pytest.mark.ray
@pytest.mark.slow
def test_a_job_is_left_followed_stopped_and_gone_on_with(address, toml):
    long = on(
        address, toml, "--name", "long", "--train.passes", 300, "--train.checkpoint_steps", 20
    )
    run = submitted([*long, "--detach"])
    assert run.returncode == 0, run.stderr
    job = run.stdout.strip()
    assert job.startswith("promptkd-long-") and f"--stop {job}" in run.stderr
    metrics = toml.parent / "runs" / "long" / "metrics.jsonl"
    deadline = time.monotonic() + 600
    while not (metrics.exists() and '"train"' in metrics.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.5)

    words = map(str, of(address, "--follow", job))
    follower = subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert follower.stdout and follower.stderr
    follower.stdout.readline()  # its log comes
    follower.send_signal(signal.SIGINT)
    told = follower.stderr.read().decode()
    assert follower.wait(60) == 130 and f"job {job} goes on" in told and f"--follow {job}" in told
    follower.stdout.close()
    follower.stderr.close()

    run = submitted(of(address, "--stop", job))
    assert run.returncode == 0 and f"job {job}: STOPPED" in run.stderr, run.stderr
    run = submitted(of(address, "--stop", job))
    assert run.returncode == 0 and "has ended already: STOPPED" in run.stderr
    run = submitted(of(address, "--follow", job))
    assert run.returncode == 143 and "SIGTERM" in run.stdout
    steps = [json.loads(line).get("step", 0) for line in metrics.read_text().splitlines()]
    run = submitted([*long, "--resume", "--detach"])
    assert run.returncode == 0
    again = run.stdout.strip()
    deadline = time.monotonic() + 600
    while "resumed" not in metrics.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert submitted(of(address, "--stop", again)).returncode == 0
    (resumed,) = (
        one for one in map(json.loads, metrics.read_text().splitlines()) if one["kind"] == "resumed"
    )
    assert resumed["step"] >= max(steps), "drained: no step was lost"


@pytest.mark.ray
@pytest.mark.slow
def test_what_cannot_start_is_told_by_its_field(address, toml):
    run = submitted(of(address, toml, "--name", "x", "--python", "/nowhere/python"))
    assert run.returncode == 2
    assert "python: the cluster has no interpreter /nowhere/python" in run.stderr
    run = submitted(of(address, "--stop", "promptkd-none-1"))
    assert run.returncode == 2 and "stop: there is no job promptkd-none-1" in run.stderr
    lacks = ("--teacher.resource", "nowhere", "--ray.start_timeout_s", 1)
    run = submitted(on(address, toml, "--name", "x", *lacks))
    assert run.returncode == 2 and "0.002 nowhere, has 0" in run.stdout


@pytest.mark.ray
@pytest.mark.slow
def test_a_cluster_that_is_gone_is_no_cluster(toml):
    run = submitted(on("http://127.0.0.1:9", toml))
    assert run.returncode == 2 and "address: no Ray cluster takes jobs" in run.stderr
