"""Object stores through their real clients, against a server that speaks what they speak."""

import http.server
import importlib.util
import json
import random
import re
import time
from hashlib import md5
from urllib.parse import parse_qs, unquote, urlsplit

import fsspec
import pytest
from servers import Answering, serving

from engine.config import UserError
from engine.storage import ranges
from engine.storage.ranges import Access, Changed, Stat, Storage, Unreadable

DATA = random.Random(1).randbytes(2_000_000)


@pytest.fixture
def server():
    """A server of one S3 bucket, `shards`, and one data set of the Hub, `who/what`. Its `files`
    may be changed; `faults` are statuses of the next answers; `asked` has all requests."""

    class Handler(Answering):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            path, query = unquote(parts.path), parse_qs(parts.query)
            self.server.asked.append((self.command, path, self.headers.get("Range")))
            if self.server.faults:
                self.answer(self.server.faults.pop(0))
            elif "list-type" in query:
                self.list_bucket(query.get("prefix", [""])[0], query.get("delimiter", [""])[0])
            elif "/tree/" in path:
                entry = {"type": "file", "oid": "1" * 40}
                files = self.server.files.items()
                self.json([{**entry, "path": name, "size": len(data)} for name, data in files])
            elif path.startswith("/api/"):
                self.json({"id": "who/what", "sha": "2" * 40, "siblings": []})
            else:
                self.file(path.removeprefix("/shards/").removeprefix("/datasets/who/what/"))

        def json(self, body: object) -> None:
            self.answer(200, json.dumps(body).encode(), Content_Type="application/json")

        def file(self, name: str) -> None:
            data = self.server.files.get(name.removeprefix("resolve/main/"))
            if data is None:
                self.answer(404)
                return
            told = {"ETag": f'"{md5(data).hexdigest()}"'}
            if not (asked := self.headers.get("Range")):
                self.answer(200, data, **told)
                return
            low, high = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", asked).groups())
            if low >= len(data):
                self.answer(416, b"<Error><Code>InvalidRange</Code></Error>")
                return
            body = data[low : high + 1]
            told["Content_Range"] = f"bytes {low}-{low + len(body) - 1}/{len(data)}"
            self.answer(206, body, **told)

        def list_bucket(self, prefix: str, delimiter: str) -> None:
            found, folders = "", set()
            for name, data in sorted(self.server.files.items()):
                if name.startswith(prefix):
                    head, cut, _ = name[len(prefix) :].partition(delimiter or "\0")
                    if cut:
                        folders.add(f"{prefix}{head}{cut}")
                    else:
                        found += f"<Contents><Key>{name}</Key><Size>{len(data)}</Size></Contents>"
            for folder in sorted(folders):
                found += f"<CommonPrefixes><Prefix>{folder}</Prefix></CommonPrefixes>"
            self.answer(200, f"<ListBucketResult>{found}</ListBucketResult>".encode())

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.daemon_threads = True
    running.files = {"a/1.tar": DATA, "a/0.tar": b"small", "a/b/2.tar": b"", "a/0.idx": b"x"}
    running.asked, running.faults = [], []
    with serving(running):
        yield running


@pytest.fixture
def storage(monkeypatch):
    monkeypatch.setattr(ranges, "PAUSE_S", (0.01, 0.1))
    opened = Storage(Access(timeout_s=2.0, retries=2))
    yield opened
    opened.close()


@pytest.fixture
def s3(server, monkeypatch):
    pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'promptkd-engine[s3]'")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    return server


def test_a_bucket_is_listed(s3, storage):
    assert storage.list("s3://shards/a") == [
        f"s3://shards/a/{n}" for n in ("0.idx", "0.tar", "1.tar")
    ]
    assert storage.list("s3://shards/a/*.tar") == ["s3://shards/a/0.tar", "s3://shards/a/1.tar"]
    assert storage.list("s3://shards/none/*.tar") == []
    s3.files["a/9.tar"] = b"new"
    assert storage.list("s3://shards/a/*.tar")[-1] == "s3://shards/a/9.tar"


def test_a_bucket_is_read_in_pieces(s3, storage, monkeypatch):
    monkeypatch.setattr(ranges, "PIECE", 700_000)
    url = "s3://shards/a/1.tar"
    known = storage.stat(url)
    assert known == Stat(len(DATA), f'"{md5(DATA).hexdigest()}"')
    assert storage.read(url, 10, 1_900_000, known) == DATA[10:1_900_000]
    spans = [asked for _, _, asked in s3.asked if asked]
    assert spans == ["bytes=10-700009", "bytes=700010-1400009", "bytes=1400010-1899999"]
    assert storage.bytes_read == 1_899_990 and storage.retried == 0


def test_a_bucket_that_fails_is_asked_again(s3, storage):
    url = "s3://shards/a/1.tar"
    known = storage.stat(url)
    s3.faults = [503, 500]
    assert storage.read(url, 5, 100, known) == DATA[5:100] and storage.retried == 2
    s3.faults = [500] * 9
    with pytest.raises(Unreadable, match="failed 3 times"):
        storage.read(url, 5, 100, known)
    assert len(s3.faults) == 6 and storage.given_up == 1  # none was asked behind our back
    s3.faults = [403]
    with pytest.raises(Unreadable, match="PermissionError"):
        storage.read(url, 5, 100, known)
    with pytest.raises(Unreadable, match="FileNotFoundError"):
        storage.stat("s3://shards/a/none.tar")
    with pytest.raises(Unreadable, match="is not a file"):
        storage.stat("s3://shards/a")
    assert storage.retried == 4


def test_a_change_in_a_bucket_is_seen(s3, storage):
    url = "s3://shards/a/1.tar"
    known = storage.stat(url)
    s3.files["a/1.tar"] = DATA[::-1]
    with pytest.raises(Changed, match="has changed"):
        storage.read(url, 5, 100, known)
    s3.files["a/1.tar"] = DATA[:50]
    for start in (20, 60):  # a short answer; no answer
        with pytest.raises(Changed, match="found 50"):
            storage.read(url, start, 100, known)


def test_a_bucket_without_keys_is_refused_at_once(s3, storage, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    with pytest.raises(Unreadable, match="Unable to locate credentials"):
        storage.stat("s3://shards/a/1.tar")
    assert storage.retried == 0


def test_the_hub_is_read(server, storage, monkeypatch):
    endpoint = {"endpoint": f"http://127.0.0.1:{server.server_port}", "token": False}
    monkeypatch.setitem(fsspec.config.conf, "hf", endpoint)
    server.files = {"0.tar": b"small", "1.tar": DATA}
    urls = [f"hf://datasets/who/what/{n}.tar" for n in range(2)]
    assert storage.list("hf://datasets/who/what") == urls
    assert storage.list("hf://datasets/who/what/*.tar") == urls
    known = storage.stat(urls[1])
    assert known == Stat(len(DATA), "1" * 40)
    server.asked.clear()
    assert storage.read(urls[1], 100, 900_000, known) == DATA[100:900_000]
    assert [asked for _, _, asked in server.asked if asked] == ["bytes=100-899999"]  # no more
    with pytest.raises(Unreadable, match="FileNotFoundError"):
        storage.stat("hf://datasets/who/what/none.tar")


@pytest.mark.parametrize("package, scheme, extra", [("s3fs", "s3", "s3"), ("gcsfs", "gs", "gcs")])
def test_a_missing_package_is_named(storage, package, scheme, extra):
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    began = time.monotonic()
    with pytest.raises(UserError, match=rf"pip install 'promptkd-engine\[{extra}\]'"):
        storage.list(f"{scheme}://bucket/*.tar")
    assert time.monotonic() - began < 1
