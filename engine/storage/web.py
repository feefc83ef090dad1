"""Ranged reads from web servers. No address that is not public is connected to, unless its host is
listed; not by redirect, nor under another name."""

import asyncio
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from email.utils import parsedate_to_datetime
from socket import AF_UNSPEC, AddressFamily

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver
from fsspec.implementations.http import HTTPFileSystem
from yarl import URL

from engine.progress import say
from engine.storage.access import (
    Access,
    Changed,
    Stat,
    Unreadable,
    Unsteady,
    literal_address,
    require_public,
    shown,
)

__all__ = ["Web"]

HOPS = 5
SLOWEST = 10  # times the time-out that an answer may take, however steadily its bytes drip
WHOLE = 64 * 2**20  # bytes of a file that may be sent whole where a range was asked for
_REDIRECTS = (301, 302, 303, 307, 308)
_MAY_PASS = (408, 425, 429)  # and 5xx
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


class Web:
    """Files of web servers, read on fsspec's event loop."""

    def __init__(self, access: Access) -> None:
        self._access = access
        # It keeps the session and closes it in the end. Its own reads tell neither what the server
        # says of the file nor what came before a fault, so they are not used.
        self._files = HTTPFileSystem(get_client=self._client, skip_instance_cache=True)
        self._session: aiohttp.ClientSession | None = None
        self._whole: set[str] = set()  # hosts that were said to send files whole

    async def _client(self, **_: object) -> aiohttp.ClientSession:
        timeout_s = self._access.timeout_s
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(resolver=_Resolver(self._access), limit=0),
            timeout=aiohttp.ClientTimeout(
                total=SLOWEST * timeout_s, sock_connect=timeout_s, sock_read=timeout_s
            ),
            headers={"Accept-Encoding": "identity"},
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
        )
        return self._session

    def close(self) -> None:
        if self._session is not None:
            HTTPFileSystem.close_session(self._files.loop, self._session)

    async def stat(self, url: str) -> Stat:
        """Asks for one byte: a server that signs urls may refuse HEAD."""
        async with self._get(url, {"Range": "bytes=0-0"}) as response:
            if response.status == 416:  # there is no first byte
                return Stat(0, _tag(response))
            found, _ = self._described(response, url, 0, 1)
            if response.status == 206:
                await response.content.read(1)  # so that the connection can be used again
            return found

    async def fetch(self, url: str, start: int, end: int, expected: Stat, into: bytearray) -> None:
        """Appends bytes start..end to `into` as they come; what came before a fault stays there.

        Raises Unsteady, Unreadable, and Changed where the file is not the expected one.
        """
        headers = {"Range": f"bytes={start}-{end - 1}"}
        if expected.tag.startswith('"'):  # a weak tag must not be sent (RFC 9110)
            headers["If-Match"] = expected.tag
        async with self._get(url, headers) as response:
            if response.status == 412:
                raise Changed(f"{shown(url)}: has changed: its tag is no longer {expected.tag}")
            if response.status == 416:
                raise Changed(f"{shown(url)}: has changed: there is no byte {start} any more")
            found, skip = self._described(response, url, start, end)
            expected.require(found, url)
            missing = end - start
            async for chunk in response.content.iter_any():
                came = memoryview(chunk)[skip:]
                skip = max(0, skip - len(chunk))
                if len(came) > missing and response.status == 206:
                    raise Unreadable(f"{shown(url)}: more bytes came than the range holds")
                into += came[:missing]
                missing -= min(missing, len(came))
                if not missing and response.status == 200:
                    break  # the rest of the file is not wanted
            if missing:
                raise Unsteady(f"short answer, {missing} bytes missing")

    @asynccontextmanager
    async def _get(
        self, url: str, headers: dict[str, str]
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The answer after at most HOPS redirects: a good one, or 412 or 416."""
        try:
            session = await self._files.set_session()
            here = first = _parse(url)
            for _ in range(HOPS + 1):
                self._require_open(here)
                async with session.get(here, headers=headers, allow_redirects=False) as response:
                    if response.status not in _REDIRECTS:
                        _require_good(response, url)
                        yield response
                        return
                    here = self._hop(first, here, response.headers.get("Location", ""))
            raise Unreadable(f"{shown(url)}: redirected more than {HOPS} times")
        except (Unreadable, Unsteady, Changed):
            raise
        except aiohttp.ClientConnectorCertificateError as error:
            raise Unreadable(f"{shown(url)}: {error}") from None
        except aiohttp.ServerTimeoutError:
            raise Unsteady(f"no byte for {self._access.timeout_s:g} s") from None
        except TimeoutError:
            raise Unsteady(f"not done after {SLOWEST * self._access.timeout_s:g} s") from None
        except ValueError as error:  # a host that cannot be one
            raise Unreadable(f"{shown(url)}: {error}") from None
        except (aiohttp.ClientError, OSError) as error:
            if isinstance(why := getattr(error, "os_error", None), Unreadable):
                raise Unreadable(f"{shown(url)}: {why}") from None
            raise Unsteady(str(error) or type(error).__name__) from None

    def _require_open(self, url: URL) -> None:
        """Refuses addresses that are written out; those of names are seen by the resolver."""
        host, port = url.host or "", url.port or 0
        if address := literal_address(host):
            try:
                require_public(address, host, port, self._access)
            except Unreadable as error:
                raise Unreadable(f"{shown(str(url))}: {error}") from None

    def _hop(self, first: URL, here: URL, location: str) -> URL:
        there = here.join(_parse(location))
        told = f"{shown(str(first))}: is redirected to {shown(str(there))}"
        if not location or there.scheme not in ("http", "https"):
            raise Unreadable(f"{told}, which is not a url of a web server")
        if here.scheme == "https" and there.scheme == "http":
            raise Unreadable(f"{told}, from https to http")
        if there.host != first.host and not self._access.lists(there.host or "", there.port or 0):
            raise Unreadable(f"{told}; another host must be listed")
        return there

    def _described(
        self, response: aiohttp.ClientResponse, url: str, start: int, end: int
    ) -> tuple[Stat, int]:
        """What an answer says of its file, and how many bytes of the body lie before `start`."""
        if response.content_type == "text/html":
            raise Unreadable(f"{shown(url)}: an HTML page came, not the file")
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise Unreadable(f"{shown(url)}: came encoded, although plain bytes were asked for")
        length = response.content_length
        if response.status == 206:
            said = response.headers.get("Content-Range", "")
            if not (match := _CONTENT_RANGE.fullmatch(said)):
                raise Unreadable(f"{shown(url)}: no range of a known size came ({said!r})")
            low, high, size = map(int, match.groups())
            if low != start or high >= min(end, size) or length not in (None, high + 1 - low):
                raise Unreadable(
                    f"{shown(url)}: bytes {start} to {end} were asked for, {said!r} came with "
                    f"{length} bytes"
                )
            return Stat(size, _tag(response)), 0
        if response.status != 200 or length is None:
            raise Unreadable(f"{shown(url)}: {response.status} without a length came for a range")
        if start or end < length:
            self._allow_whole(url, length)
        return Stat(length, _tag(response)), start

    def _allow_whole(self, url: str, length: int) -> None:
        if length > WHOLE:
            raise Unreadable(
                f"{shown(url)}: the server ignores ranges, and sends all of its {length} bytes"
            )
        host = URL(url).authority.rpartition("@")[2]
        if host not in self._whole:
            self._whole.add(host)
            say(f"{host} ignores ranges and sends whole files: reading there is slow")


class _Resolver(AbstractResolver):
    """The system's resolver, less the addresses that may not be reached. The connection is made to
    the very addresses that were seen here."""

    def __init__(self, access: Access) -> None:
        self._access, self._names = access, ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: AddressFamily = AF_UNSPEC
    ) -> list[ResolveResult]:
        async with asyncio.timeout(self._access.timeout_s):
            found = await self._names.resolve(host, port, family)
        for address in found:
            require_public(address["host"], host, port, self._access)
        return found

    async def close(self) -> None:
        await self._names.close()


def _parse(url: str) -> URL:
    # What is signed must stay as it was written, so only what cannot be sent is quoted.
    if not url.isprintable() or " " in url:
        raise Unreadable(f"{url!r} is not a url")
    try:
        return URL(url, encoded=url.isascii())
    except ValueError as error:
        raise Unreadable(f"{shown(url)} is not a url: {error}") from None


def _require_good(response: aiohttp.ClientResponse, url: str) -> None:
    status = response.status
    if status in (200, 206, 412, 416):
        return
    why = f"{status} {response.reason}"
    if status in _MAY_PASS or status >= 500:
        raise Unsteady(why, _seconds(response.headers.get("Retry-After", "")))
    raise Unreadable(f"{shown(url)}: {why}")


def _seconds(retry_after: str) -> float:
    """The seconds that a Retry-After header asks for; it may name a date (RFC 9110, 10.2.3)."""
    if retry_after.isdecimal():
        return float(retry_after)
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return 0.0


def _tag(response: aiohttp.ClientResponse) -> str:
    return response.headers.get("ETag", response.headers.get("Last-Modified", ""))
