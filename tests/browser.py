"""A headless Chromium that looks at a page, over its DevTools protocol, and tells what it saw.

`make browser` installs one. https://chromedevtools.github.io/devtools-protocol/ has the words.
"""

import asyncio
import base64
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil

NAMES = ("chromium", "chromium-browser", "google-chrome")  # as in the Makefile
TIMEOUT_S = 60.0  # of a start, and of a page
_TALLEST = 16_000  # pixels of a screenshot
_FLAGS = (
    "--headless",
    "--remote-debugging-port=0",  # any; the browser writes which
    "--no-sandbox",  # which a container's root cannot have; pages are our own
    "--disable-gpu",
    "--disable-dev-shm-usage",  # containers have little of it
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-breakpad",
    "--disable-sync",
    "--no-first-run",
    "--no-default-browser-check",
    "--hide-scrollbars",
    # What a page asks of other machines is seen, and does not leave this one.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)


@dataclass(frozen=True)
class Seen:
    """Of one page, when it had loaded and no request was under way."""

    errors: list[str]  # console messages and log entries of level error, uncaught exceptions
    requests: list[str]  # URLs beyond the page's own and data: URIs
    width: int  # of the window
    page_width: int  # of what is in it: larger where the page overflows
    screenshot: bytes  # PNG of the whole page


@dataclass(frozen=True)
class Browser:
    """A running browser, by the address of its protocol."""

    address: str

    def look(self, page: Path | str, width: int) -> Seen:
        """Opens a file or a URL in a window of so many pixels. Raises TimeoutError."""
        url = page if isinstance(page, str) else page.resolve().as_uri()
        return asyncio.run(_look(self.address, url, width))


def installed() -> str | None:
    """The browser's program."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def running(program: str) -> Iterator[Browser]:
    """A browser with a profile of its own; it ends with all its children."""
    # Its sockets want a short path, and profiles are left by children that end late.
    with tempfile.TemporaryDirectory(prefix="browser", ignore_cleanup_errors=True) as home:
        log = Path(home) / "log"
        with open(log, "wb") as output:
            process = subprocess.Popen(
                [program, *_FLAGS, f"--user-data-dir={home}/profile", "about:blank"],
                stdout=output,
                stderr=output,
                env=os.environ | {"HOME": home},
                start_new_session=True,
            )
        try:
            yield Browser(_address(process, Path(home) / "profile" / "DevToolsActivePort", log))
        finally:
            _end(process)


def _address(process: subprocess.Popen[bytes], file: Path, log: Path) -> str:
    deadline = time.monotonic() + TIMEOUT_S
    while not file.exists() or file.read_text().count("\n") < 1:
        told = f"the browser has not started: {log.read_text(errors='replace')[-2000:]}"
        assert process.poll() is None and time.monotonic() < deadline, told
        time.sleep(0.05)
    port, path = file.read_text().split("\n")[:2]
    return f"ws://127.0.0.1:{port}{path}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """Some children have process groups of their own."""
    try:
        children = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        children = []
    for child in children:
        try:
            child.kill()
        except psutil.NoSuchProcess:
            pass
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait(TIMEOUT_S)
    psutil.wait_procs(children, TIMEOUT_S)


class _Protocol:
    """Calls, and the events that come between their answers."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.events: list[dict[str, Any]] = []
        self._socket, self._session, self._calls = socket, {}, 0

    async def attach(self, target: str) -> None:
        """From now on calls are for a page."""
        told = await self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": told["sessionId"]}

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._calls += 1
        call = {"id": self._calls, "method": method, "params": params}
        await self._socket.send_json(call | self._session)
        while (told := await self._next()).get("id") != self._calls:
            pass
        assert "error" not in told, f"{method}: {told['error']}"
        return told["result"]

    async def until(self, method: str, **wanted: Any) -> None:
        """Waits for an event, unless it has come already."""
        while not any(
            event["method"] == method and wanted.items() <= event["params"].items()
            for event in self.events
        ):
            await self._next()

    async def _next(self) -> dict[str, Any]:
        told = json.loads(await self._socket.receive_str())
        if "method" in told:
            self.events.append(told)
        return told


async def _look(address: str, url: str, width: int) -> Seen:
    async with asyncio.timeout(TIMEOUT_S), aiohttp.ClientSession() as session:
        async with session.ws_connect(address, max_msg_size=0) as socket:
            page = _Protocol(socket)
            target = (await page.call("Target.createTarget", url="about:blank"))["targetId"]
            await page.attach(target)
            seen = await _seen(page, url, width)
            await page.call("Page.close")
            return seen


async def _seen(page: _Protocol, url: str, width: int) -> Seen:
    for domain in ("Page", "Runtime", "Log", "Network"):
        await page.call(f"{domain}.enable")
    await page.call("Page.setLifecycleEventsEnabled", enabled=True)
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    await page.call("Emulation.setDeviceMetricsOverride", **metrics)
    opened = await page.call("Page.navigate", url=url)
    assert "errorText" not in opened, f"{url}: {opened['errorText']}"
    loader = opened["loaderId"]
    for name in ("load", "networkIdle"):  # the latter after half a second without a request
        await page.until("Page.lifecycleEvent", name=name, loaderId=loader)
    inner, whole = [
        (await page.call("Runtime.evaluate", expression=expression))["result"]["value"]
        for expression in ("innerWidth", "document.documentElement.scrollWidth")
    ]
    assert inner == width, "the window is not as wide as asked for"
    size = (await page.call("Page.getLayoutMetrics"))["cssContentSize"]
    clip = {"x": 0, "y": 0, "scale": 1, "width": width, "height": min(size["height"], _TALLEST)}
    shot = await page.call(
        "Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip
    )
    errors = [text for event in page.events if (text := _error(event))]
    requests = [text for event in page.events if (text := _request(event, loader))]
    return Seen(errors, requests, inner, whole, base64.b64decode(shot["data"]))


def _error(event: dict[str, Any]) -> str | None:
    """What an event tells that went wrong."""
    told = event["params"]
    match event["method"]:
        case "Runtime.exceptionThrown":
            details = told["exceptionDetails"]
            return details.get("exception", {}).get("description", details["text"])
        case "Runtime.consoleAPICalled" if told["type"] in ("error", "assert"):
            return " ".join(str(one.get("value", one.get("description"))) for one in told["args"])
        case "Log.entryAdded" if told["entry"]["level"] == "error":
            return f"{told['entry']['text']} {told['entry'].get('url', '')}".strip()
    return None


def _request(event: dict[str, Any], loader: str) -> str | None:
    """The URL of a request that is neither the page's own nor a data: URI."""
    told = event["params"]
    if event["method"] == "Network.webSocketCreated":
        return told["url"]
    if event["method"] != "Network.requestWillBeSent" or told["requestId"] == loader:
        return None
    url = told["request"]["url"]
    return None if url.startswith("data:") else url
