"""What is looked at before a job is sent: the server, and where the shards lie."""

import contextlib
import http.server
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from servers import serving

from engine.config import CorpusConfig, RunFailed, UserError
from engine.data.places import check_places
from engine.jobs_server import jobs_address, require_authentication
from jobs import cli


@dataclass
class Server:
    status: int
    port: int = 0
    asked: list[tuple[str, bool]] = field(default_factory=list)  # what, and with a token

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextlib.contextmanager
def answering(status: int) -> Iterator[Server]:
    about = Server(status)

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            token = any("authorization" in name.lower() for name in self.headers)
            about.asked.append((f"{self.command} {self.path}", token))
            self.send_response(about.status)
            self.send_header("Location", f"{about.address}/elsewhere")
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"[]")

        do_POST = do_PUT = do_GET

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        about.port = server.server_port
        with serving(server):
            yield about


@pytest.fixture
def tokened(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a" * 64)


@pytest.mark.parametrize("status", [401, 403, 302])
def test_a_server_that_asks_who_we_are_is_taken(tokened, status, capsys):
    with answering(status) as server:
        require_authentication(server.address, unless_allowed=False)
    assert server.asked == [("GET /api/jobs/", False)] and capsys.readouterr().err == ""


def test_a_server_that_asks_for_nothing_is_refused_unless_allowed(tokened, capsys):
    with answering(200) as server:
        with pytest.raises(UserError, match=r"asks for no token.*--allow-unauthenticated"):
            require_authentication(server.address, unless_allowed=False)
        require_authentication(server.address, unless_allowed=True)
    assert not any(token for _, token in server.asked)
    assert "warning: the Ray cluster" in capsys.readouterr().err


@pytest.mark.parametrize("status", [404, 500])
def test_what_is_no_jobs_server_is_named(status):
    with answering(status) as server:
        with pytest.raises(UserError, match=f"no Ray cluster takes jobs .* {status} "):
            require_authentication(server.address, unless_allowed=True)
    with pytest.raises(UserError, match=r"no Ray cluster takes jobs .*refused"):
        require_authentication(server.address, unless_allowed=True)
    for address in ("ftp://h", "anything://h:1", "http://", "file:///etc"):
        with pytest.raises(UserError, match="is not a url like"):
            require_authentication(address, unless_allowed=True)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ("head:8265", r"head:8265 has no scheme.*http://head:8265$"),
        ("10.0.0.1:6379", r"no scheme.*http://10\.0\.0\.1:8265$"),
        ("auto", r"auto has no scheme"),
        ("ray://head:10001", r"Ray Client.*http://head:8265$"),
        ("https://me:secret@head/", r"leave user and password out of it \(http://head:8265\)"),
        ("http://head:99999", r"is not a url like"),
        ("http://[::1", r"is not a url like"),
    ],
)
def test_an_address_that_is_none_is_told_what_it_should_be(told, message):
    with pytest.raises(UserError, match=rf"^address: .*{message}") as refused:
        jobs_address(told)
    assert "secret" not in str(refused.value)


def test_the_address_is_the_one_that_is_told_and_then_that_of_the_environment(monkeypatch):
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    assert jobs_address("") == "http://127.0.0.1:8265"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "https://there/")
    assert jobs_address("") == "https://there"
    assert jobs_address("http://here:1") == "http://here:1"


@pytest.mark.parametrize("words", [("--stop", "a/../b"), ("--follow=x", "--stop=y"), ("--stop=",)])
def test_a_job_is_one_and_has_a_plain_name(words, capsys):
    assert cli.main(["submit", "--address", "http://127.0.0.1:1", *words]) == 2
    assert "stop" in capsys.readouterr().err


def test_a_locked_environment_has_no_interpreter_of_the_clusters(tmp_path, capsys):
    words = ["--environment", "locked", "--python", "/opt/python", "--corpus.shards", "/0.tar"]
    assert submit(tmp_path, "http://127.0.0.1:1", *words) == 2
    assert "python: --environment locked" in capsys.readouterr().err


ENDED = [
    # status, exit code, kind of error, message -> our exit code, or what we say
    ("SUCCEEDED", 0, None, "", 0),
    ("STOPPED", None, None, "", 143),
    ("FAILED", 2, "JOB_ENTRYPOINT_COMMAND_ERROR", "promptkd distill: name: ...", 2),
    ("FAILED", 1, "JOB_ENTRYPOINT_COMMAND_ERROR", "promptkd distill: student worker 0 failed", 1),
    ("FAILED", 127, None, "sh: 1: snake: not found", r"^python: .* no interpreter snake;"),
    ("FAILED", 1, None, "ModuleNotFoundError: No module named 'torch'", r"^python: .* torch;"),
    ("FAILED", None, "RUNTIME_ENV_SETUP_FAILURE", "no space left", r"^environment: .*no space"),
    ("FAILED", None, "JOB_SUPERVISOR_ACTOR_DIED", "900 s\nmore", r"without an exit code: 900 s$"),
]


@pytest.mark.parametrize(("status", "code", "kind", "message", "ours"), ENDED)
def test_how_a_job_has_ended_becomes_an_exit_code(status, code, kind, message, ours):
    from ray.dashboard.modules.job.pydantic_models import JobDetails

    from engine.ray_jobs import _exit_code

    info = JobDetails(
        type="SUBMISSION",
        status=status,
        entrypoint="snake -m jobs.distill run.json",
        message=message,
        error_type=kind,
        driver_exit_code=code,
    )
    if isinstance(ours, int):
        assert _exit_code(info) == ours
    else:
        with pytest.raises((UserError, RunFailed), match=ours):
            _exit_code(info)


@pytest.mark.parametrize(
    ("host", "told"),
    [
        ("127.0.0.1", False),
        ("127.1", False),
        ("localhost", False),
        ("0.0.0.0", True),  # reaches this machine, and is no loopback address
    ],
)
def test_a_token_is_not_sent_unencrypted_without_a_word(tokened, host, told, capsys, monkeypatch):
    with answering(401) as server:
        address = server.address.replace("127.0.0.1", host)
        require_authentication(address, unless_allowed=False)
        assert ("unencrypted" in capsys.readouterr().err) == told
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # so that none is sent
        require_authentication(address, unless_allowed=False)
    assert capsys.readouterr().err == ""


def submit(tmp_path: Path, address: str, *words: str) -> int:
    return cli.main(["submit", "--address", address, "--name", "x", "--runs-dir", "r", *words])


def test_the_command_sends_nothing_to_a_server_without_authentication(tokened, tmp_path, capsys):
    with answering(200) as server:
        assert submit(tmp_path, server.address, "--corpus.shards", "/data/{0..3}.tar") == 2
    assert "--allow-unauthenticated" in capsys.readouterr().err
    assert server.asked == [("GET /api/jobs/", False)]


@pytest.mark.parametrize(
    "where",
    [
        "pipe:touch CANARY",
        "pipe:touch CANARY #.tar",
        "/data/0.tar::pipe:touch CANARY",
        "{pipe:touch CANARY,/data/0.tar}",
        "ftp://h/a.tar",
        "file://etc/passwd",
        "-o/tmp/x://h/a.tar",
        "http://169.254.169.254/latest/a.tar",
        "https://[::ffff:a9fe:a9fe]/a.tar",
        "http://2130706433/a.tar",
        "http://public.example/a.tar::http://10.0.0.1/b.tar",
    ],
)
@pytest.mark.parametrize("field", ["shards", "evaluation"])
def test_shards_that_are_not_read_are_refused_before_anything_is_sent(
    tokened, tmp_path, monkeypatch, capsys, where: str, field: str
):
    monkeypatch.chdir(tmp_path)
    canary = str(tmp_path / "canary")
    words = ["--corpus.shards", "/data/0.tar"] if field == "evaluation" else []
    words += [f"--corpus.{field}=" + where.replace("CANARY", canary)]
    with answering(401) as server:
        assert submit(tmp_path, server.address, *words) == 2
    assert f"corpus.{field}: " in capsys.readouterr().err
    assert server.asked == [] and not Path(canary).exists()


def test_addresses_that_are_listed_may_hold_shards():
    private = "http://10.0.0.1:9000/{0..2}.tar"
    with pytest.raises(UserError, match=r"corpus\.shards: .*private address"):
        check_places(CorpusConfig(shards=private))
    with pytest.raises(UserError, match=r"corpus\.shards: .*private address"):
        check_places(CorpusConfig(shards=private, hosts=("10.0.0.1:80",)))
    check_places(CorpusConfig(shards=private, hosts=("10.0.0.1:9000",)))
    check_places(CorpusConfig(shards="s3://bucket/a.tar", evaluation="/data/0.tar"))


STARTED = """
import os, subprocess, sys, ray
from engine.cluster import session
with session("", 1) as ours:
    address = ray.get_runtime_context().gcs_address
    join = f"import ray; ray.init(address='{address}', log_to_driver=False)"
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")}
    done = subprocess.run([sys.executable, "-c", join], env=env, capture_output=True, text=True)
    print(ours, os.environ["RAY_AUTH_MODE"], done.returncode, "uthentication" in done.stderr)
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_cluster_started_here_asks_for_a_token_that_only_its_owner_reads(tmp_path):
    """Whatever RAY_AUTH_MODE says; the token is one that Ray makes."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    env = kept | {"RAY_AUTH_MODE": "disabled", "HOME": str(tmp_path)}
    command = [sys.executable, "-c", STARTED]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=180)
    assert done.stdout.split() == ["True", "token", "1", "True"], done.stderr
    assert "RAY_AUTH_MODE=disabled is not followed" in done.stderr
    assert stat.S_IMODE((tmp_path / ".ray" / "auth_token").stat().st_mode) == 0o600


JOINED = """
import subprocess, sys, ray
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
address = ray.get_runtime_context().gcs_address
join = f"import engine.cluster as c; c.start('{address}'); print('joined')"
done = subprocess.run([sys.executable, "-c", join], capture_output=True, text=True)
print(done.stdout, done.stderr)
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_cluster_that_asks_for_no_token_is_joined_with_a_warning():
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    env = kept | {"RAY_AUTH_MODE": "disabled"}
    command = [sys.executable, "-c", JOINED]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=180)
    assert "joined" in done.stdout and "asks for no token" in done.stdout, done.stdout + done.stderr
