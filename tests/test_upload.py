"""What travels to a cluster with a job, and what does not."""

import contextlib
import dataclasses
import http.server
import io
import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import ray
from servers import serving

from engine import upload
from engine.config import CorpusConfig, RunConfig, TargetsConfig, TrainConfig, UserError
from engine.upload import pack, pinned, refuse_credentials
from jobs.submit import CONSTRAINTS

TOKEN = "a" * 64
SECRET = "wJalrXUtnFEMI-K7MDENG"


@dataclass
class JobsServer:
    """A Ray jobs server, as far as one is needed to send a job to it."""

    ray_version: str = ray.__version__
    port: int = 0
    package: bytes = b""
    job: dict = field(default_factory=dict)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, object]:
        if path == "/api/version":
            told = {"version": "4", "ray_version": self.ray_version, "ray_commit": ""}
            return 200, told | {"session_name": ""}
        if method == "POST" and path == "/api/jobs/":
            self.job = json.loads(body)
            return 200, dict.fromkeys(("job_id", "submission_id"), self.job["submission_id"])
        if method == "PUT" and path.startswith("/api/packages/"):
            self.package = body
            return 200, {}
        return 404, f"{path} does not exist"


@contextlib.contextmanager
def taking_jobs(**about: str) -> Iterator[JobsServer]:
    server = JobsServer(**about)

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, told = 401, "Unauthorized: Missing authentication token"
            if authorization := self.headers.get("Authorization"):
                status, told = 403, "Forbidden: Invalid authentication token"
                if authorization == f"Bearer {TOKEN}":
                    status, told = server.answer(self.command, self.path, body)
            data = json.dumps(told).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_POST = do_PUT = do_GET

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        server.port = web.server_port
        with serving(web):
            yield server


COMMANDS = """
import json, sys
from jobs import cli
for words in json.loads(sys.argv[1]):
    print("exit", cli.main(words), flush=True)
"""


def promptkd(*commands: list[str], **env: str) -> tuple[str, str]:
    """Output and messages of commands in a process of their own, since Ray reads its token once."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    kept |= {"AWS_SECRET_ACCESS_KEY": SECRET} | env
    command = [sys.executable, "-c", COMMANDS, json.dumps(commands)]
    done = subprocess.run(command, env=kept, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_the_package_that_is_sent_holds_code_and_config_alone(tmp_path):
    toml = tmp_path / "run.toml"
    toml.write_text(
        f'name = "my flowers"\nruns_dir = "{tmp_path}"\n[corpus]\nshards = "/data/0.tar"'
    )
    with taking_jobs() as server, taking_jobs(ray_version="2.9.3") as old:
        submit = ["submit", str(toml), "--detach", "--address"]
        out, told = promptkd(
            [*submit, server.address, "--resume"],
            [*submit, old.address],
            ["submit", "--stop", "promptkd-gone-1", "--address", server.address],
            RAY_AUTH_MODE="token",
            RAY_AUTH_TOKEN=TOKEN,
            RAY_ADDRESS="10.1.2.3:6379",  # which Ray's own client would go to instead
        )
        job, first, second, third = out.splitlines()
        assert (first, second, third) == ("exit 0", "exit 2", "exit 2")
    assert re.fullmatch(r"promptkd-my-flowers-\d{8}-\d{6}-[0-9a-f]{4}", job)
    assert f"promptkd submit --stop {job} --address {server.address}" in told
    assert f"promptkd submit --follow {job} --address {server.address}" in told
    assert "address: the cluster at " in told and "runs Ray 2.9.3" in told and not old.package
    assert "stop: there is no job promptkd-gone-1" in told
    assert server.job["submission_id"] == job
    assert server.job["entrypoint"] == "python -m jobs.distill run.json --resume"
    assert server.job["runtime_env"].keys() == {"working_dir", "env_vars"}
    assert server.job["runtime_env"]["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "30"}

    with zipfile.ZipFile(io.BytesIO(server.package)) as package:
        names = [name for name in package.namelist() if not name.endswith("/")]
        texts = b"".join(map(package.read, names))
        config = json.loads(package.read("run.json"))
    allowed = re.compile(
        r"run\.json|(engine|kernels|jobs)/([\w]+/)*\w+\.py|jobs/configs/presets/\w+/[\w-]+\.toml"
        r"|engine/report/\w+\.(html|css)"
    )
    assert [name for name in names if not allowed.fullmatch(name)] == []
    assert {"run.json", "engine/run.py", "kernels/kl.py", "jobs/distill.py"} <= set(names)
    assert {"jobs/configs/presets/distill/paper.toml", "engine/report/page.html"} <= set(names)
    assert config["name"] == "my flowers" and config["corpus"]["shards"] == "/data/0.tar"
    assert SECRET.encode() not in texts and TOKEN.encode() not in texts
    files, size = re.search(r"sending ([\d.]+) MB in (\d+) files", told).group(2, 1)
    assert int(files) == len(names) and 0.1 < float(size) < 3


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({}, "Set RAY_AUTH_MODE=token, and its token"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "b" * 64}, "Set another token"),
    ],
)
@pytest.mark.slow
def test_a_token_that_lacks_or_is_another_is_told_of(env, message):
    with taking_jobs() as server:
        words = ["submit", "--name", "x", "--corpus.shards", "/0.tar", "--address", server.address]
        out, told = promptkd(words, **env)
    assert out == "exit 2\n" and message in told and not server.package


def test_what_lies_beside_the_code_stays(tmp_path, monkeypatch):
    house, sent = tmp_path / "house", tmp_path / "sent"
    for name in ("engine/run.py", "jobs/configs/presets/distill/paper.toml", "kernels/kl.py"):
        (house / name).parent.mkdir(parents=True, exist_ok=True)
        (house / name).write_text("code")
    outside = tmp_path / "outside.py"
    outside.write_text(SECRET)
    strays = (
        *(".env", ".git/config", "engine/.env", "engine/key.pem", "jobs/data/0.tar"),
        *("runs/mine/bundle.safetensors", "jobs/configs/mine.toml", "notes.py"),
        *("engine/__pycache__/run.cpython-311.pyc", "tests/test_run.py"),
    )
    for name in strays:
        (house / name).parent.mkdir(parents=True, exist_ok=True)
        (house / name).write_text(SECRET)
    (house / "engine" / "linked.py").symlink_to(outside)
    monkeypatch.setattr(upload, "_HOUSE", house)
    told = pack(RunConfig(name="x"), sent)
    found = {str(path.relative_to(sent)) for path in sent.rglob("*") if path.is_file()}
    assert found == {
        *("engine/run.py", "jobs/configs/presets/distill/paper.toml", "kernels/kl.py", "run.json")
    }
    assert told.files == 4
    assert told.bytes == 12 + (sent / "run.json").stat().st_size


@pytest.mark.parametrize(
    "url",
    [
        f"https://me:{SECRET}@host/a-{{000..009}}.tar",
        f"https://host/a.tar?token={SECRET}",
        f"/data/0.tar::https://host/a.tar?x=1&X-Amz-Signature={SECRET}",
        f"https://host/a.tar?X-Amz-Credential={SECRET}/20261122",
        f"https://account.blob.example/a.tar?sv=2024&sig={SECRET}",
        f"https://storage.example/a.tar?AWSAccessKeyId={SECRET}",
        f"s3://key:{SECRET}@bucket/a.tar",
        f"https://host/a.tar?api_key={SECRET}",
    ],
)
def test_a_config_with_credentials_is_refused_without_repeating_them(url, tmp_path):
    for config in (
        RunConfig(name="x", corpus=CorpusConfig(shards=url)),
        RunConfig(name="x", targets=TargetsConfig(store=url)),
        RunConfig(name="x", train=TrainConfig(checkpoint_copy=url)),
    ):
        with pytest.raises(UserError, match=r"^\w+\.\w+: a url has ") as refused:
            pack(config, tmp_path)
        assert SECRET not in str(refused.value) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "url",
    [
        "hf://datasets/who/what@8f3a2b/data/{000..010}.tar",
        "https://host/a.tar?part=1&page=2",
        "/data/me@home/token=1/0.tar",
        "s3://bucket/keys/a.tar",
    ],
)
def test_a_config_without_credentials_passes(url):
    refuse_credentials(RunConfig(name="x", corpus=CorpusConfig(shards=url)))


def test_the_locked_environment_is_what_constraints_pin(tmp_path):
    lines = CONSTRAINTS.read_text().splitlines()
    plain, with_s3 = pinned(CONSTRAINTS, ()), pinned(CONSTRAINTS, ("s3",))
    names = {line.partition("==")[0] for line in plain}
    assert set(plain) < set(with_s3) < set(lines)
    assert {"torch", "ray", "tyro", "deepspeed", "virtualenv", "nvidia-cublas"} <= names
    assert not {"pytest", "mypy", "ruff", "hypothesis", "s3fs", "promptkd-engine"} & names
    assert any(line.startswith("s3fs==") for line in with_s3)
    with pytest.raises(UserError, match=r"^environment: .*which is not there"):
        pinned(tmp_path / "constraints.txt", ())
    short = tmp_path / "short.txt"
    short.write_text("\n".join(line for line in lines if not line.startswith("tyro==")))
    with pytest.raises(UserError, match=r"environment: .* has no version of tyro$"):
        pinned(short, ())


def test_every_text_of_a_config_is_looked_at():
    """Also lists, and fields that come to the config later."""
    config = RunConfig(name="x", teachers=(f"https://me:{SECRET}@host/second.toml",))
    with pytest.raises(UserError, match=r"^teachers: "):
        refuse_credentials(config)
    for one in dataclasses.fields(CorpusConfig):
        if one.type == "str" or one.type is str:
            corpus = CorpusConfig(**{one.name: f"https://host/?token={SECRET}"})
            with pytest.raises(UserError, match=rf"^corpus\.{one.name}: "):
                refuse_credentials(RunConfig(name="x", corpus=corpus))
