"""Folders of files on disk, in memory, and in a bucket through its real client."""

import http.server
import importlib.util
import re
import uuid
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
import pytest
from recordings import assert_same, labelling, rows, targets
from servers import serving

from engine.config import UserError
from engine.data.order import Blocks
from engine.labels.folder import open_folder
from engine.labels.store import Store
from engine.labels.targets import BlockView
from engine.labels.upkeep import checked, holdings, needless
from jobs import cli


class Bucket(http.server.BaseHTTPRequestHandler):
    """Of one S3 bucket, `labels`; the server has its files, and statuses to answer with first."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_any(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = urlsplit(self.path)
        name, query = unquote(parts.path).removeprefix("/labels/"), parse_qs(parts.query)
        files = self.server.files
        if self.server.down:
            self.answer(403, b"<Error><Code>AccessDenied</Code></Error>")
        elif "list-type" in query:
            self.list(query.get("prefix", [""])[0], query.get("delimiter", [""])[0])
        elif self.command == "PUT":
            files[name] = sent
            self.answer(200, ETag='"x"')
        elif self.command == "DELETE":
            files.pop(name, None)
            self.answer(204)
        elif name not in files:
            self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        elif asked := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            body = files[name][int(asked[1]) : int(asked[2]) + 1]
            span = f"bytes {asked[1]}-{int(asked[1]) + len(body) - 1}/{len(files[name])}"
            self.answer(206, body, Content_Range=span, ETag='"x"')
        else:
            self.answer(200, files[name], ETag='"x"')

    do_GET = do_HEAD = do_PUT = do_DELETE = handle_any

    def list(self, prefix: str, delimiter: str) -> None:
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


@pytest.fixture
def bucket(monkeypatch):
    pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'promptkd-engine[s3]'")
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Bucket)
    running.daemon_threads = True
    running.files, running.down = {}, False
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{running.server_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()  # an earlier one has another server
    with serving(running):
        yield running


@pytest.fixture(params=["disk", "file", "memory", "s3"])
def where(request, tmp_path):
    if request.param == "s3":
        request.getfixturevalue("bucket")
        return "s3://labels/some/store"
    url = f"memory://{uuid.uuid4().hex}/store"
    return {"disk": f"{tmp_path}/x", "file": f"file://{tmp_path}/x", "memory": url}[request.param]


def test_all_kinds_of_folder_do_the_same(where):
    folder = open_folder(where, "x")
    assert folder.entries("") == [] and folder.sizes("") == {} and folder.broken_off("", 0) == []
    with pytest.raises(FileNotFoundError):
        folder.read("a/b")
    assert folder.write("a/b", b"hello", replace=False)
    assert not folder.write("a/b", b"other", replace=False) and folder.read("a/b") == b"hello"
    assert folder.write("a/b", b"others", replace=True) and folder.read("a/b") == b"others"
    assert folder.write("a/c/d", b"", replace=True) and folder.write("e", b"1", replace=True)
    assert folder.read("a/b", 3) == b"oth" and folder.read("a/b", 99) == b"others"
    again = open_folder(where + "/", "x")
    assert again.entries("") == ["a", "e"] and again.entries("a") == ["b", "c"]
    assert again.sizes("a") == {"a/b": 6, "a/c/d": 0}
    folder.remove("a/c/d")
    assert again.sizes("") == {"a/b": 6, "e": 1}


def test_a_store_is_kept_in_any(where, capsys):
    ours = Store(where).open(labelling(), add=False)
    whole, wanted = targets(ours.labelling, 8), BlockView("shards", 0, 0)
    for offsets in (np.arange(5), np.arange(5, 8)):
        ours.put(wanted, rows(whole, offsets), offsets, 8)
    blocks = Blocks(np.array([8, 8]), 8)
    assert_same(ours.get(wanted, 8), whole)
    assert ours.missing(0, blocks) == 1 and ours.get(BlockView("shards", 1, 0), 8) is None
    ours.put(wanted, whole)
    store = Store(where)
    (held,) = holdings(store, ours.fingerprint)
    assert (held.blocks, held.parts, held.images, held.bytes) == (1, 2, 8, ours.written_bytes)
    assert [fault for _, fault in checked(store, ours.fingerprint)] == [None] * 3
    assert {why for _, why in needless(store, [])} == {"superseded"}
    assert cli.main(["store", "gc", where]) == 0
    assert "2 files removed" in capsys.readouterr().out
    assert len(store.folder.sizes("")) == 2 and ours.missing(0, blocks) == 1
    assert ours.recording and ours.damaged == 0


def test_a_bucket_that_denies_us(bucket, capsys):
    ours = Store("s3://labels/store").open(labelling(), add=False)
    bucket.down = True
    wanted = BlockView("shards", 0, 0)
    assert ours.get(wanted, 8) is None and ours.damaged == 1
    ours.put(wanted, targets(ours.labelling, 8))
    assert not ours.recording and "no more labels are recorded" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"^targets\.store: .* cannot be listed"):
        ours.missing(0, Blocks(np.array([8]), 8))
    with pytest.raises(UserError, match=r"^targets\.store: s3://labels/store cannot be read"):
        Store("s3://labels/store").labellings()


@pytest.mark.skipif(bool(importlib.util.find_spec("gcsfs")), reason="gcsfs is installed")
def test_a_package_that_is_missing_is_named():
    with pytest.raises(UserError, match=r"^x: gs://b/s needs .*promptkd-engine\[gcs\]"):
        open_folder("gs://b/s", "x")
