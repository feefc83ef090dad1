"""The browser that tests look at pages with: each of its findings, and that it ends."""

import http.server
import io

import psutil
import pytest
from browser import installed, running
from PIL import Image
from servers import serving

WIDTHS = (1280, 400)
HEAD = "<!doctype html><meta charset=utf-8><title>t</title>"


def page(tmp_path, body: str):
    file = tmp_path / "page.html"
    file.write_text(HEAD + body, encoding="utf-8")
    return file


@pytest.mark.parametrize("width", WIDTHS)
def test_a_plain_page_is_as_wide_as_its_window_and_seen_whole(browser, tmp_path, width):
    pixel = "data:image/gif;base64,R0lGODlhAQABAIAAAP///wAAACwAAAAAAQABAAACAkQBADs="
    body = f"<style>body{{margin:0}}</style><img src='{pixel}'>"
    body += "<script>console.log('fine'); console.warn('too')</script>"
    body += "<div style='height:2000px'></div><div style='height:50px;background:#f00'></div>"
    seen = browser.look(page(tmp_path, body), width)
    assert (seen.errors, seen.requests) == ([], [])
    assert seen.width == seen.page_width == width
    shot = Image.open(io.BytesIO(seen.screenshot)).convert("RGB")
    assert shot.width == width and shot.height >= 2050
    assert shot.getpixel((width - 1, shot.height - 10)) == (255, 0, 0), "its lowest part"


def test_every_error_is_caught_even_a_late_one(browser, tmp_path):
    scripts = (
        "console.error('oh', 7); console.assert(false, 'asserted')",
        "null.x",
        "setTimeout(() => { throw new Error('later') })",
        "Promise.reject(new Error('unheard'))",
    )
    body = "".join(f"<script>{script}</script>" for script in scripts)
    errors = browser.look(page(tmp_path, body), 400).errors
    for told in ("oh 7", "asserted", "TypeError", "later", "unheard"):
        assert len([error for error in errors if told in error]) == 1, errors
    assert len(errors) == 5


class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_every_request_is_caught_even_one_that_is_answered(browser, tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    where = f"http://127.0.0.1:{server.server_port}"
    body = f"<link rel=stylesheet href='{where}/a.css'><iframe src='{where}/frame'></iframe>"
    body += f"<script>onload = () => fetch('{where}/late', {{mode: 'no-cors'}})</script>"
    body += "<img src='https://example.invalid/b.png'>"
    with serving(server):
        seen = browser.look(page(tmp_path, body), 1280)
    wanted = {f"{where}/a.css", f"{where}/frame", f"{where}/late", "https://example.invalid/b.png"}
    assert wanted <= set(seen.requests)
    assert any("example.invalid" in error for error in seen.errors), "it was not to be had"


def test_a_page_that_overflows_is_caught_where_it_does(browser, tmp_path):
    wide = page(tmp_path, "<div style='width:600px'>x</div>")
    assert browser.look(wide, 1280).page_width == 1280
    assert browser.look(wide, 400).page_width >= 600


def test_the_browser_ends_with_all_its_children():
    if not (program := installed()):
        pytest.skip("no browser: `make browser` installs one")
    here = psutil.Process()
    others = set(here.children(recursive=True))
    with running(program):
        ours = set(here.children(recursive=True)) - others
        assert len(ours) > 1, "it has processes of its own"
    assert not [one for one in ours if one.is_running()]
