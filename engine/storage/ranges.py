"""Bytes of shards wherever they lie: on disk, on a web server, or in an object store."""

import asyncio
import glob
import os
import random
import stat
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import CancelledError, Future
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from fsspec.asyn import get_loop

from engine.config import UserError
from engine.progress import say
from engine.storage.access import (
    Access,
    Changed,
    Stat,
    Unreadable,
    Unsteady,
    check_url,
    scheme,
    shown,
)
from engine.storage.cache import BlockCache

if TYPE_CHECKING:  # who reads local files can do without their libraries
    from engine.storage.bucket import Bucket
    from engine.storage.web import Web

__all__ = ["PIECE", "Access", "Changed", "Stat", "Storage", "Unreadable", "check_url"]

T = TypeVar("T")

PIECE = 8 * 2**20  # bytes of a ranged read
PAUSE_S = (0.2, 20.0)  # before the first retry; the most. Each is up to three times the last


class Storage:
    """Reads files of any kind. Its methods may be called from several threads at once.

    `retried` and `given_up` count faults from afar; `bytes_read` counts bytes that were read where
    they lie, so none that the cache had.
    """

    def __init__(self, access: Access) -> None:
        self.retried = self.given_up = self.bytes_read = 0
        self._access = access
        self._lock = threading.Lock()
        self._closed = False
        self._pending: set[Future] = set()
        self._sources: dict[str, Web | Bucket] = {}
        self._announced: set[str] = set()  # hosts and buckets whose first fault was announced
        self._cache = BlockCache(access.cache, access.cache_bytes) if access.cache else None

    def stat(self, url: str) -> Stat:
        """Raises Unreadable."""
        if (path := _local(url)) is not None:
            return _local_stat(path)
        source = self._source(url)
        return self._wait(url, self._steadily(url, partial(source.stat, url)))

    def read(self, url: str, start: int, end: int, expected: Stat | None = None) -> bytes:
        """The bytes from `start` up to `end`, all of them.

        Raises Unreadable, and Changed where the file is not the expected one.
        """
        if (path := _local(url)) is not None:
            data = _local_read(path, start, end, expected)
        else:
            key = f"{url}\n{expected.tag}\n{start}-{end}" if expected and expected.tag else ""
            cache = self._cache if key else None
            if cache and (known := cache.get(key)) is not None:
                return known
            data = self._wait(url, self._fetch(self._source(url), url, start, end, expected))
            if cache:
                cache.put(key, data)
        with self._lock:
            self.bytes_read += len(data)
        return data

    def whole(self, url: str, most_bytes: int) -> bytes:
        """All of a file. Raises Unreadable, also where it is larger than that, and Changed."""
        stat = self.stat(url)
        if stat.bytes > most_bytes:
            raise Unreadable(f"{shown(url)}: has {stat.bytes:,} bytes, more than {most_bytes:,}")
        return self.read(url, 0, stat.bytes, stat)

    def list(self, where: str) -> list[str]:
        """The urls of the files that a glob matches, or that lie in a folder, sorted.

        Raises Unreadable, and UserError for a web server, which cannot be listed.
        """
        if (path := _local(where)) is not None:
            inside = f"{glob.escape(path)}/*" if os.path.isdir(path) else path
            found = sorted(p for p in glob.glob(inside, recursive=True) if os.path.isfile(p))
            return [f"{where[: len(where) - len(path)]}{p}" for p in found]
        source = self._source(where)
        from engine.storage.web import Web

        if isinstance(source, Web):
            raise UserError(
                f"{shown(where)}: a web server cannot be listed; name the shards by braces, as in "
                "train-{000..009}.tar"
            )
        return self._wait(where, self._steadily(where, partial(source.list, where)))

    def close(self) -> None:
        """Ends what is being read, and pauses before retries, at once."""
        with self._lock:
            self._closed = True
            pending, sources = list(self._pending), list(self._sources.values())
        for future in pending:
            future.cancel()
        for source in sources:
            source.close()

    def _source(self, url: str) -> "Web | Bucket":
        from engine.storage.bucket import Bucket
        from engine.storage.web import Web

        check_url(url, "url")
        kind = "http" if scheme(url) == "https" else scheme(url)
        with self._lock:
            if kind not in self._sources:
                web = kind == "http"
                self._sources[kind] = Web(self._access) if web else Bucket(kind, self._access)
            return self._sources[kind]

    def _wait(self, url: str, work: Coroutine[Any, Any, T]) -> T:
        """Runs it on fsspec's event loop, which has a thread of its own."""
        with self._lock:
            if self._closed:
                work.close()
                raise Unreadable(f"{shown(url)}: the storage is closed")
            future = asyncio.run_coroutine_threadsafe(work, get_loop())
            self._pending.add(future)
        try:
            return future.result()
        except CancelledError:
            raise Unreadable(f"{shown(url)}: the storage was closed") from None
        finally:
            future.cancel()  # where the wait was interrupted
            with self._lock:
                self._pending.discard(future)

    async def _fetch(
        self, source: "Web | Bucket", url: str, start: int, end: int, expected: Stat | None
    ) -> bytes:
        # All pieces must be of one version of the file.
        file = expected
        if file is None:
            file = await self._steadily(url, partial(source.stat, url))
        _require_inside(url, start, end, file)
        got = bytearray()

        async def read_on() -> None:
            await source.fetch(url, start + len(got), until, file, got)

        for until in [*range(start + PIECE, end, PIECE), end]:
            if start + len(got) < until:
                await self._steadily(url, read_on)
        return bytes(got)

    async def _steadily(self, url: str, attempt: Callable[[], Awaitable[T]]) -> T:
        """Tries again after faults that may pass, with growing pauses."""
        pause_s, most_s = PAUSE_S
        for left in reversed(range(self._access.retries + 1)):
            try:
                return await attempt()
            except Unsteady as fault:
                if not left:
                    with self._lock:
                        self.given_up += 1
                    times = self._access.retries + 1
                    raise Unreadable(f"{shown(url)}: failed {times} times: {fault}") from None
                self._count_retry(url, fault)
                wait_s = max(random.uniform(0.5, 1.0) * pause_s, fault.after_s)
                await asyncio.sleep(min(wait_s, most_s))
                pause_s = min(3 * pause_s, most_s)
        raise AssertionError("unreachable")

    def _count_retry(self, url: str, fault: Unsteady) -> None:
        host = shown(url).split("/")[2]
        with self._lock:
            self.retried += 1
            first = host not in self._announced
            self._announced.add(host)
        if first:
            say(f"{shown(url)}: {fault}; trying again, as with all faults of {host} from now on")


def _require_inside(url: str, start: int, end: int, found: Stat) -> None:
    assert 0 <= start <= end
    if found.bytes < end:
        raise Unreadable(f"{shown(url)}: ends at byte {found.bytes}, not {end}")


def _local(url: str) -> str | None:
    kind = scheme(url)
    return url.removeprefix("file://") if kind in ("", "file") else None


def _local_stat(path: str) -> Stat:
    try:
        return _stat_of(os.stat(path), path)
    except Unreadable:
        raise
    except OSError as error:
        raise Unreadable(f"{path}: {error.strerror}") from None


def _stat_of(found: os.stat_result, path: str) -> Stat:
    if not stat.S_ISREG(found.st_mode):
        raise Unreadable(f"{path}: is not a file")
    return Stat(found.st_size, str(found.st_mtime_ns))


def _local_read(path: str, start: int, end: int, expected: Stat | None) -> bytes:
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait for its writer
        try:
            found = _stat_of(os.fstat(file), path)
            if expected:
                expected.require(found, path)
            _require_inside(path, start, end, found)
            data = os.pread(file, end - start, start)
            while len(data) < end - start:  # Linux reads at most 2 GiB at once
                more = os.pread(file, end - start - len(data), start + len(data))
                if not more:
                    raise Unreadable(f"{path}: ended while it was read")
                data += more
            return data
        finally:
            os.close(file)
    except (Unreadable, Changed):
        raise
    except OSError as error:
        raise Unreadable(f"{path}: {error.strerror}") from None
