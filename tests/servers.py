"""Running a web server for a test, also one that speaks as S3 does."""

import http.server
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit


@contextmanager
def serving(server: http.server.HTTPServer) -> Iterator[None]:
    """Answers on a thread of its own, and leaves nothing behind."""
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def serving_files(folder: Path) -> Iterator[str]:
    """Serves the files of a folder in ranges, with their times of change as tags; gives
    HOST:PORT."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            body = begin_range(self, folder / self.path.lstrip("/"))
            if body is not None:
                self.wfile.write(body)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    with serving(server):
        yield f"127.0.0.1:{server.server_port}"


def begin_range(handler: http.server.BaseHTTPRequestHandler, file: Path) -> bytes | None:
    """Sends the head of an answer to a request for a range of a file; gives the body that is to
    follow, None after a 404."""
    if not file.is_file():
        handler.send_error(404)
        return None
    data = file.read_bytes()
    low, high = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers["Range"]).groups())
    body = data[low : high + 1]
    handler.send_response(206)
    handler.send_header("Content-Length", str(len(body)))
    handler.send_header("Content-Range", f"bytes {low}-{low + len(body) - 1}/{len(data)}")
    handler.send_header("ETag", f'"{file.stat().st_mtime_ns}"')
    handler.end_headers()
    return body


class Answering(http.server.BaseHTTPRequestHandler):
    """Answers with a status and a body at once, and logs nothing."""

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


class Bucket(Answering):
    """Of one S3 bucket, `labels`; the server has its files, and statuses to answer with first."""

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
