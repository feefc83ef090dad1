"""Ranged reads against a real server that answers as its script says."""

import http.server
import os
import random
import re
import socket
import struct
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from servers import serving

from engine.config import UserError
from engine.storage import ranges
from engine.storage.ranges import Access, Changed, Stat, Storage, Unreadable

DATA = random.Random(0).randbytes(3_000_000)
FILE = Stat(len(DATA), '"v1"')
CONNECTED: list[object] = []  # every address that this process has connected a socket to


def note(event: str, args: tuple) -> None:
    if event == "socket.connect":
        CONNECTED.append(args[1])


sys.addaudithook(note)


@dataclass
class Server:
    """What the server is to do with the requests that come, and what it has done."""

    port: int = 0
    faults: list[str] = field(default_factory=list)  # of the next requests; "" is none
    always: str = ""
    asked: list[tuple[int, int]] = field(default_factory=list)  # ranges
    served: list[tuple[int, int]] = field(default_factory=list)  # bytes that were sent of each
    headers: list[dict[str, str]] = field(default_factory=list)
    connections: int = 0

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"http://{self.host}/a.tar"


@pytest.fixture
def server():
    about = Server()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *_: object) -> None:
            pass

        def setup(self) -> None:
            about.connections += 1
            super().setup()

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)

        def reset(self) -> None:
            self.wfile.flush()
            time.sleep(0.1)  # so that what was sent has arrived
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.close_connection = True

        def do_GET(self) -> None:
            low, high = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups())
            about.asked.append((low, high + 1))
            about.headers.append(dict(self.headers))
            fault = about.faults.pop(0) if about.faults else about.always
            name, _, detail = fault.partition(" ")
            if name == "status":
                status, _, after = detail.partition(" ")
                self.answer(int(status), b"sorry", **({"Retry_After": after} if after else {}))
            elif name == "redirect":
                self.answer(302, Location=detail.replace("PORT", str(about.port)))
            elif name == "html":
                self.answer(200, b"<html>not found</html>", Content_Type="text/html")
            elif name == "whole":
                self.answer(200, DATA, ETag='"v1"')
            elif name == "huge":
                self.send_response(200)
                self.send_header("Content-Length", str(2**30))
                self.end_headers()
            else:
                self.serve_range(low, high, name, detail)

        def serve_range(self, low: int, high: int, fault: str, detail: str) -> None:
            tag = detail if fault == "tag" else '"v1"'
            data = DATA[: int(detail)] if fault == "shorter" else DATA
            if self.headers.get("If-Match", tag) != tag:
                self.answer(412)
                return
            if low >= len(data):
                self.answer(416, Content_Range=f"bytes */{len(data)}")
                return
            body = data[low : high + 1]
            said = low + 7 if fault == "wrong" else low
            self.send_response(206)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Range", f"bytes {said}-{said + len(body) - 1}/{len(data)}")
            self.send_header("ETag", tag)
            self.end_headers()
            cut = fault in ("stall", "truncated", "reset", "drip")
            part = body[: int(detail)] if cut else body
            self.wfile.write(part)
            about.served.append((low, low + len(part)))
            if fault == "drip":
                for byte in body:
                    self.wfile.write(bytes([byte]))
                    time.sleep(0.04)
            elif fault == "stall":
                time.sleep(0.8)
                self.close_connection = True
            elif fault == "truncated":
                self.wfile.flush()
                time.sleep(0.1)
                self.close_connection = True
            elif fault == "reset":
                self.reset()

    class Quiet(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            """A client that goes away is no error here."""

    running = Quiet(("127.0.0.1", 0), Handler)
    about.port = running.server_port
    with serving(running):
        yield about


@pytest.fixture
def open_storage(server, monkeypatch):
    """open_storage(**access): a Storage that may reach the server, and does not wait long."""
    monkeypatch.setattr(ranges, "PAUSE_S", (0.01, 0.5))
    opened = []

    def open_(**access) -> Storage:
        access = {"hosts": (server.host,), "timeout_s": 5.0, "retries": 3, **access}
        opened.append(Storage(Access(**access)))
        return opened[-1]

    yield open_
    for one in opened:
        one.close()


def test_a_range_is_read_exactly(server, open_storage):
    storage = open_storage()
    assert storage.stat(server.url) == FILE
    assert storage.read(server.url, 1000, 2_000_000, FILE) == DATA[1000:2_000_000]
    assert storage.read(server.url, 5, 5, FILE) == b""
    assert storage.read(server.url, 2_999_999, 3_000_000) == DATA[-1:]  # asks what the file is
    assert server.asked == [(0, 1), (1000, 2_000_000), (0, 1), (2_999_999, 3_000_000)]
    assert [h.get("If-Match") for h in server.headers] == [None, '"v1"', None, '"v1"']
    assert storage.bytes_read == 1_999_001 and storage.retried == 0
    assert server.connections == 1


def test_long_ranges_come_in_pieces_in_order(server, open_storage, monkeypatch):
    monkeypatch.setattr(ranges, "PIECE", 1_000_000)
    server.faults = ["", "truncated 600000", ""]
    assert open_storage().read(server.url, 10, 2_500_000, FILE) == DATA[10:2_500_000]
    assert server.served[0] == (10, 1_000_010)
    assert server.served[1] == (1_000_010, 1_600_010)
    assert server.served[3:] == [(2_000_010, 2_500_000)]
    low, high = server.served[2]  # the rest of the second piece
    assert 1_000_010 < low <= 1_600_010 and high == 2_000_010


@pytest.mark.parametrize("fault", ["stall", "truncated", "reset"])
def test_a_broken_answer_is_continued_where_it_broke(server, open_storage, fault):
    server.faults = [f"{fault} 700000", f"{fault} 50000"]
    storage = open_storage(timeout_s=0.3)
    assert storage.read(server.url, 100, 1_500_000, FILE) == DATA[100:1_500_000]
    first, second, third = (low for low, _ in server.asked)
    assert first == 100
    # A reset may throw away what has arrived and was not read; nothing else may.
    if fault == "reset":
        assert 100 <= second <= 700_100 and second <= third <= second + 50_000
    else:
        assert (second, third) == (700_100, 750_100)
    assert storage.retried == 2 and storage.given_up == 0


@pytest.mark.parametrize("fault", ["status 500", "status 503 0", "status 429", "status 408"])
def test_a_busy_server_is_asked_again(server, open_storage, fault, capsys):
    server.faults = [fault, fault]
    storage = open_storage()
    assert storage.read(server.url, 0, 1000, FILE) == DATA[:1000]
    assert storage.retried == 2
    told = capsys.readouterr().err.strip().splitlines()  # once for a host, not each time
    assert len(told) == 1 and server.url in told[0] and fault.split()[1] in told[0]


@pytest.mark.parametrize(
    "fault, why",
    [("status 500", "500"), ("stall 0", "no byte for 0.3 s"), ("truncated 0", "")],
)
def test_in_the_end_it_is_given_up(server, open_storage, fault, why):
    server.always = fault
    storage = open_storage(retries=2, timeout_s=0.3)
    with pytest.raises(Unreadable, match=f"{re.escape(server.url)}: failed 3 times: .*{why}"):
        storage.read(server.url, 0, 1000, FILE)
    assert server.asked == [(0, 1000)] * 3
    assert storage.retried == 2 and storage.given_up == 1 and storage.bytes_read == 0


def test_bytes_that_drip_are_not_waited_for_without_end(server, open_storage):
    server.faults = ["drip 0"]
    storage = open_storage(timeout_s=0.1)  # a byte each 40 ms is no stall
    began = time.monotonic()
    assert storage.read(server.url, 0, 1000, FILE) == DATA[:1000]  # 40 s of dripping
    assert 0.9 < time.monotonic() - began < 10
    assert 0 < server.asked[1][0] < 30 and storage.retried == 1


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_a_refusal_is_final(server, open_storage, status):
    server.always = f"status {status}"
    storage = open_storage()
    with pytest.raises(Unreadable, match=f"{re.escape(server.url)}: {status}"):
        storage.read(server.url, 0, 1000, FILE)
    with pytest.raises(Unreadable, match=str(status)):
        storage.stat(server.url)
    assert len(server.asked) == 2 and storage.retried == 0


def test_a_server_may_say_how_long_to_wait(server, open_storage, monkeypatch):
    server.faults = ["status 503 60"]
    storage = open_storage()
    began = time.monotonic()
    storage.read(server.url, 0, 10, FILE)
    assert 0.45 < time.monotonic() - began < 10  # at most the longest pause
    monkeypatch.setattr(ranges, "PAUSE_S", (0.01, 50.0))
    soon = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 2))
    server.faults = [f"status 429 {soon}"]
    began = time.monotonic()
    storage.read(server.url, 0, 10, FILE)
    assert 0.9 < time.monotonic() - began < 10


def test_closing_ends_a_pause_and_a_stall(server, open_storage, monkeypatch):
    monkeypatch.setattr(ranges, "PAUSE_S", (60.0, 60.0))
    for fault in ("status 500", "stall 10"):
        server.always = fault
        storage = open_storage(timeout_s=60.0)
        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(storage.read, server.url, 0, 1000, FILE)
            time.sleep(0.3)
            assert not reading.done()
            began = time.monotonic()
            storage.close()
            with pytest.raises(Unreadable, match="closed"):
                reading.result()
            assert time.monotonic() - began < 5
        with pytest.raises(Unreadable, match="closed"):
            storage.read(server.url, 0, 1000, FILE)


def test_a_change_is_seen(server, open_storage):
    storage = open_storage()
    with pytest.raises(Changed, match="expected 2999999 bytes"):
        storage.read(server.url, 0, 10, Stat(2_999_999, '"v1"'))
    server.always = 'tag "v2"'
    with pytest.raises(Changed, match="has changed"):  # the server compares: 412
        storage.read(server.url, 0, 10, FILE)
    server.always = 'tag W/"v2"'
    with pytest.raises(Changed, match="v2"):  # a weak tag is compared here
        storage.read(server.url, 0, 10, Stat(len(DATA), 'W/"v1"'))
    server.always = "shorter 500"
    with pytest.raises(Changed, match="no byte 1000"):
        storage.read(server.url, 1000, 2000, FILE)
    with pytest.raises(Changed, match="found 500"):
        storage.read(server.url, 400, 450, FILE)
    assert storage.retried == 0


def test_a_change_in_the_middle_is_seen(server, open_storage):
    server.faults = ["", "truncated 1000", 'tag "v2"']  # what the file is, a part, the rest
    with pytest.raises(Changed, match="has changed"):
        open_storage().read(server.url, 0, 50_000)


def test_a_file_that_is_too_short_is_not_asked_for_more(server, open_storage):
    with pytest.raises(Unreadable, match="ends at byte 3000000, not 3000001"):
        open_storage().read(server.url, 2_999_000, 3_000_001, FILE)
    assert server.asked == []


@pytest.mark.parametrize(
    "fault, why",
    [("html", "HTML"), ("huge", "ignores ranges"), ("wrong", "bytes 0 to 10 were asked for")],
)
def test_another_answer_than_the_range_is_an_error(server, open_storage, fault, why):
    server.always = fault
    storage = open_storage()
    with pytest.raises(Unreadable, match=why):
        storage.read(server.url, 0, 10, FILE)
    assert len(server.asked) == 1


def test_a_range_is_cut_from_a_small_file_sent_whole(server, open_storage, capsys):
    server.always = "whole"
    storage = open_storage()
    assert storage.stat(server.url) == FILE
    assert storage.read(server.url, 1_234_567, 1_234_667, FILE) == DATA[1_234_567:1_234_667]
    assert storage.read(server.url, 2_000_000, 3_000_000, FILE) == DATA[2_000_000:]
    assert capsys.readouterr().err.count("ignores ranges") == 1
    with pytest.raises(Changed):
        storage.read(server.url, 0, 10, Stat(50, '"v1"'))


def test_a_redirect_on_the_host_is_followed(server, open_storage):
    server.faults = ["redirect /b.tar", "redirect http://127.0.0.1:PORT/c.tar?sig=a%2Fb%3D"]
    assert open_storage().read(server.url, 0, 10, FILE) == DATA[:10]
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    "target, why",
    [
        ("http://169.254.169.254/latest/meta-data/", "another host must be listed"),
        ("http://localhost:PORT/a.tar", "another host must be listed"),
        ("http://2130706433:PORT/a.tar", "another host must be listed"),
        ("file:///etc/passwd", "not a url of a web server"),
        ("", "not a url of a web server"),
        ("http://[::1/a.tar", "not a url"),
        ("http://h:99999/a.tar", "Port out of range"),
        ("http://127.0.0.1:PORT/a b.tar", "not a url"),
        ("http://127.0.0.1:PORT/a.tar", "more than 5 times"),
    ],
)
def test_other_redirects_are_refused(server, open_storage, target, why):
    server.always = f"redirect {target}"
    before = len(CONNECTED)
    with pytest.raises(Unreadable, match=why):
        open_storage().read(server.url, 0, 10, FILE)
    assert CONNECTED[before:] == [("127.0.0.1", server.port)]
    assert len(server.asked) == (6 if "times" in why else 1)


def test_a_redirect_to_a_listed_host_is_followed_but_not_to_its_other_ports(server, open_storage):
    server.faults = ["redirect http://localhost:PORT/a.tar"]
    hosts = (server.host, f"localhost:{server.port}")
    assert open_storage(hosts=hosts).read(server.url, 0, 10, FILE) == DATA[:10]
    server.faults = ["redirect http://127.0.0.1:1/a.tar"]
    with pytest.raises(Unreadable, match="loopback"):
        open_storage(hosts=hosts).read(server.url, 0, 10, FILE)


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.1",
        "2130706433",
        "0x7f000001",
        "0177.0.0.1",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "localhost",
        "LOCALHOST",
        "0.0.0.0",
        "user:word@127.0.0.1",
        "a" * 64 + ".example",
        "a..example",
        socket.gethostname(),
    ],
)
def test_no_connection_is_made_to_what_is_not_public(server, open_storage, host):
    before = len(CONNECTED)
    storage = open_storage(hosts=())
    with pytest.raises(Unreadable, match=r"address|url|label") as raised:
        storage.read(f"http://{host}:{server.port}/a.tar", 0, 10, FILE)
    assert "word" not in str(raised.value)
    assert CONNECTED[before:] == [] and server.connections == 0 and storage.retried == 0


@pytest.mark.parametrize(
    "url", ["http://169.254.169.254/", "http://0xa9fea9fe/", "http://[::ffff:a9fe:a9fe]/"]
)
def test_the_metadata_address_is_never_connected_to(open_storage, url):
    before = len(CONNECTED)
    with pytest.raises(Unreadable, match="link-local"):
        open_storage().stat(url)
    assert CONNECTED[before:] == []


def test_proxies_of_the_environment_are_not_used(server, open_storage, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    assert open_storage().read(server.url, 0, 10, FILE) == DATA[:10]


def test_a_server_that_is_away_is_tried_again(open_storage):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{unused.getsockname()[1]}"
        storage = open_storage(hosts=(host,), retries=2)
        with pytest.raises(Unreadable, match="failed 3 times"):
            storage.stat(f"http://{host}/a.tar")
    assert storage.retried == 2


def test_threads_read_at_once(server, open_storage):
    storage = open_storage()
    server.faults = ["truncated 1000", "reset 10", "", "status 503"] * 5
    spans = [(i * 40_000, i * 40_000 + 60_000) for i in range(60)]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda r: storage.read(server.url, *r, FILE), spans))
    assert got == [DATA[low:high] for low, high in spans]
    assert storage.bytes_read == 60 * 60_000 and storage.retried == 15


def test_blocks_are_cached_by_tag_and_range(server, open_storage, tmp_path):
    access = {"cache": str(tmp_path / "cache"), "cache_bytes": 10**7}
    storage = open_storage(**access)
    for _ in range(3):
        assert storage.read(server.url, 10, 50_000, FILE) == DATA[10:50_000]
    assert len(server.asked) == 1 and storage.bytes_read == 49_990
    assert open_storage(**access).read(server.url, 10, 50_000, FILE) == DATA[10:50_000]
    assert len(server.asked) == 1
    storage.read(server.url, 10, 50_001, FILE)
    storage.read(server.url, 10, 50_000)  # a file of unknown tag
    assert len(server.asked) == 4
    with pytest.raises(Changed):  # another tag is never served from what is kept
        storage.read(server.url, 10, 50_000, Stat(len(DATA), '"v2"'))


def test_local_files_are_read_directly(tmp_path):
    path, storage = tmp_path / "a [1].tar", Storage(Access())
    path.write_bytes(DATA)
    known = storage.stat(str(path))
    assert known == Stat(len(DATA), str(path.stat().st_mtime_ns)) == storage.stat(f"file://{path}")
    open_files = len(os.listdir("/proc/self/fd"))
    with ThreadPoolExecutor(4) as pool:
        spans = [(i * 1000, i * 1000 + 5000) for i in range(500)]
        got = list(pool.map(lambda r: storage.read(str(path), *r, known), spans))
    assert got == [DATA[low:high] for low, high in spans]
    with pytest.raises(Unreadable, match="ends at byte 3000000"):
        storage.read(f"file://{path}", 0, 3_000_001)
    os.utime(path, (1, 1))
    with pytest.raises(Changed, match="has changed"):
        storage.read(str(path), 0, 10, known)
    with pytest.raises(Unreadable, match=r"gone\.tar: No such file"):
        storage.read(str(tmp_path / "gone.tar"), 0, 10)
    with pytest.raises(Unreadable, match=r"gone\.tar: No such file"):
        storage.stat(str(tmp_path / "gone.tar"))
    os.mkfifo(tmp_path / "pipe")
    for other in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(Unreadable, match="is not a file"):
            storage.read(str(other), 0, 10)
    assert storage.bytes_read == 500 * 5000
    assert len(os.listdir("/proc/self/fd")) == open_files


def test_local_files_are_listed(tmp_path):
    folder, storage = tmp_path / "in [x]", Storage(Access())
    (folder / "sub").mkdir(parents=True)
    for name in ("b.tar", "a.tar", "c.idx"):
        (folder / name).touch()
    names = [str(folder / name) for name in ("a.tar", "b.tar", "c.idx")]
    assert storage.list(str(folder)) == names
    assert storage.list(f"file://{folder}") == [f"file://{name}" for name in names]
    assert storage.list(f"{tmp_path}/*/*.tar") == names[:2]
    assert storage.list(f"{tmp_path}/none/*.tar") == []


def test_a_web_server_is_not_listed(server, open_storage):
    with pytest.raises(UserError, match=r"braces"):
        open_storage().list(f"http://{server.host}/*.tar")
    assert server.connections == 0


def test_no_other_scheme_gets_past_storage(tmp_path):
    canary = tmp_path / "canary"
    for url in (f"pipe:touch {canary}", "memory://a", f"simplecache::file://{canary}"):
        with pytest.raises(UserError):
            Storage(Access()).read(url, 0, 1)
    assert not canary.exists()
