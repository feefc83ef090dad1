"""Web servers over TLS, with a certificate made for the test."""

import http.server
import os
import shutil
import ssl
import subprocess
import sys
from pathlib import Path

import pytest
from servers import serving

from engine.storage.ranges import Access, Storage, Unreadable

ROOT = Path(__file__).parents[1]


@pytest.fixture
def server(tmp_path):
    """A TLS server on 127.0.0.1 that redirects /down to http and has one file."""
    if not shutil.which("openssl"):
        pytest.skip("needs openssl to make a certificate")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    make = "openssl req -x509 -nodes -newkey rsa:2048 -days 1 -subj /CN=test"
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", cert]
    subprocess.run([*make.split(), *names], check=True, capture_output=True)

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            if self.path == "/down":
                self.send_response(302)
                self.send_header("Location", f"http://127.0.0.1:{self.server.server_port}/a.tar")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", "bytes 0-3/4")
            self.send_header("Content-Length", "4")
            self.end_headers()
            self.wfile.write(b"data")

    class Quiet(http.server.ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            """A client that does not trust the certificate is no error here."""

    running = Quiet(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    running.socket = context.wrap_socket(running.socket, server_side=True)
    running.cert = cert
    with serving(running):
        yield running


def test_a_certificate_that_is_not_trusted_is_final(server):
    host = f"127.0.0.1:{server.server_port}"
    storage = Storage(Access(hosts=(host,)))
    with pytest.raises(Unreadable, match="certificate verify failed"):
        storage.stat(f"https://{host}/a.tar")
    assert storage.retried == 0
    storage.close()


READ = """
import sys
from engine.storage.ranges import Access, Stat, Storage, Unreadable
storage = Storage(Access(hosts=(sys.argv[1],)))
assert storage.read(f"https://{sys.argv[1]}/a.tar", 0, 4, Stat(4, "")) == b"data"
try:
    storage.read(f"https://{sys.argv[1]}/down", 0, 4, Stat(4, ""))
except Unreadable as error:
    print(error)
"""


def test_a_redirect_never_leaves_tls(server):
    trust = {**os.environ, "SSL_CERT_FILE": str(server.cert), "PYTHONPATH": str(ROOT)}
    told = subprocess.run(
        [sys.executable, "-c", READ, f"127.0.0.1:{server.server_port}"],
        env=trust,
        capture_output=True,
        text=True,
    )
    assert "from https to http" in told.stdout and told.stderr == ""
