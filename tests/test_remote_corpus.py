"""A corpus on a web server: indexed, read, cached; and a server that fails in the middle."""

import http.server
import random
import shutil
import threading
from functools import partial
from pathlib import Path

import pytest
from servers import begin_range

from engine.config import UserError
from engine.data.corpus import Corpus
from engine.index import index
from engine.storage import ranges
from engine.storage.ranges import Access


class Server:
    """Serves the files of a folder, in ranges; `faults` is the share of requests that break off."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.faults, self.requests = folder, 0.0, 0
        self.dice = random.Random(0)
        handler = partial(_Handler, self)
        self.running = _Quiet(("127.0.0.1", 0), handler)
        self.host = f"127.0.0.1:{self.running.server_port}"
        self.thread = threading.Thread(target=self.running.serve_forever, args=(0.01,))
        self.thread.start()

    def close(self) -> None:
        self.running.shutdown()
        self.thread.join()
        self.running.server_close()


class _Quiet(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client that goes away is no error here."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, server: Server, *args: object) -> None:
        self.about = server
        super().__init__(*args)  # type: ignore[arg-type]

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.about.requests += 1
        body = begin_range(self, self.about.folder / self.path.lstrip("/"))
        if body is None:
            return
        if self.about.dice.random() < self.about.faults:
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        else:
            self.wfile.write(body)


@pytest.fixture
def server(corpus_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(ranges, "PAUSE_S", (0.001, 0.01))
    folder = tmp_path / "served"
    folder.mkdir()
    for shard in corpus_folder.glob("*.tar"):
        shutil.copy(shard, folder)
    running = Server(folder)
    yield running
    running.close()


@pytest.fixture
def opened(server, tmp_path):
    """opened(...): the corpus on the server, indexed here, its access changed by the arguments."""
    access = Access((server.host,), timeout_s=5, retries=30)
    index(f"http://{server.host}/{{000000..000002}}.tar", tmp_path / "index", access, workers=1)

    def open_(**changes) -> Corpus:
        told = {"hosts": (server.host,), "timeout_s": 5, "retries": 2, **changes}
        return Corpus.open(str(tmp_path / "index"), 4, access=Access(**told))

    return open_


def images_of(corpus: Corpus) -> list[bytes | None]:
    samples = [one for block in range(len(corpus.blocks)) for one in corpus.read(block)]
    return [one.data and bytes(one.data) for one in samples]


def test_it_is_the_corpus_that_lies_there(opened, server, corpus_folder):
    corpus = opened()
    assert corpus.shards[1] == f"http://{server.host}/000001.tar"
    here = Corpus.open(str(corpus_folder), 4)
    assert corpus.fingerprint == here.fingerprint and images_of(corpus) == images_of(here)


def test_a_server_that_breaks_off_loses_nothing(opened, server, corpus_folder):
    server.faults = 0.5
    requests = server.requests
    assert images_of(opened(retries=30)) == images_of(Corpus.open(str(corpus_folder), 4))
    assert server.requests - requests > 7  # one for each block, and those that broke off


def test_blocks_are_read_from_afar_once(opened, server, tmp_path):
    changes = {"cache": str(tmp_path / "cache"), "cache_bytes": 1 << 30}
    first = images_of(opened(**changes))
    requests = server.requests
    assert images_of(opened(**changes)) == first and server.requests == requests


def test_a_shard_that_is_replaced_is_skipped(opened, server, capsys):
    corpus = opened()
    shutil.copy(server.folder / "000000.tar", server.folder / "000001.tar")
    reasons = [one.reason for block in (0, 3, 4, 6) for one in corpus.read(block)]
    assert reasons == [None] * 4 + ["changed"] * 8 + [None] * 4
    assert capsys.readouterr().err.count("000001.tar: changed") == 1


def test_a_shard_that_is_gone_is_skipped(opened, server, capsys):
    corpus = opened()
    (server.folder / "000002.tar").unlink()
    assert [one.reason for one in corpus.read(6) + corpus.read(0)] == ["unreadable"] * 4 + [
        None
    ] * 4
    assert "404" in capsys.readouterr().err


def test_a_shard_whose_index_is_gone_is_skipped(opened, server, tmp_path, capsys):
    opened()
    shutil.copytree(tmp_path / "index", server.folder / "index")
    access = Access((server.host,), timeout_s=5, retries=1)
    corpus = Corpus.open(f"http://{server.host}/index", 4, access=access)
    (server.folder / "index" / "000001-000001.arrow").unlink()
    samples = corpus.read(4)
    assert [(one.shard, one.position) for one in samples] == [(1, 4), (1, 5), (1, 6), (1, 7)]
    assert {(one.reason, one.data, one.label, one.key) for one in samples} == {
        ("unreadable", None, None, "")
    }
    assert [one.reason for one in corpus.pick(1, [3])] == ["unreadable"]
    assert [one.reason for one in corpus.read(0) + corpus.read(6)] == [None] * 8
    assert capsys.readouterr().err.count("000001.tar: has no readable index") == 1


def test_what_is_missing_or_no_tar_is_named(server, tmp_path):
    access = Access((server.host,), timeout_s=5, retries=1)
    (server.folder / "page.tar").write_text("<html>login</html>")
    for name, why in (("page.tar", "not a tar"), ("none.tar", "404")):
        with pytest.raises(UserError, match=why):
            index(f"http://{server.host}/{name}", tmp_path / "index", access, workers=1)
    with pytest.raises(UserError, match="only hosts that are listed"):
        index(f"http://{server.host}/000000.tar", tmp_path / "index", workers=1)
    with pytest.raises(UserError, match=r"name the shards: \{000\.\.099\}\.tar"):
        index(f"http://{server.host}/", tmp_path / "index", access, workers=1)
    with pytest.raises(UserError, match="out: "):
        index(f"http://{server.host}/000000.tar", access=access, workers=1)
