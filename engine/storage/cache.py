"""A folder on a node's own disk that keeps blocks which came from afar."""

import fcntl
import hashlib
import os
import struct
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.progress import say

__all__ = ["BlockCache"]

_HEADER = struct.Struct("<4s16sQI")  # magic, digest of the key, bytes of data, their CRC-32
_MAGIC = b"PKB1"
_KEPT = 0.9  # of the limit, after some have been put out
_ABANDONED_S = 3600.0  # age of a half-written file that its writer has left
_SUFFIX, _PART, _LOCK = ".block", ".part", "lock"


class BlockCache:
    """Blocks of bytes by key, at most `limit_bytes` on disk; those unused for longest go first.

    Processes and threads of a node may share the folder. A damaged file is a miss, never wrong
    bytes. Where the folder cannot be used or is full, the cache says so once and is off.
    """

    def __init__(self, folder: str | Path, limit_bytes: int) -> None:
        assert limit_bytes > 0
        self._folder, self._limit = Path(folder), limit_bytes
        self._off = False
        with self._or_off():
            self._folder.mkdir(0o700, parents=True, exist_ok=True)

    def get(self, key: str) -> bytes | None:
        """The block of a key, None where it is not there."""
        digest, path = self._place(key)
        if self._off:
            return None
        with self._or_off():
            try:
                with open(path, "rb", buffering=0) as file:
                    header, data = file.read(_HEADER.size), file.read()
                    if header == _header(digest, data):
                        os.utime(file.fileno())
                        return data
            except FileNotFoundError:
                return None
            path.unlink(missing_ok=True)
        return None

    def put(self, key: str, data: bytes) -> None:
        """Keeps a block, if it is smaller than the whole cache may be."""
        digest, path = self._place(key)
        size = _HEADER.size + len(data)
        if self._off or size > _KEPT * self._limit:
            return
        with self._or_off():
            handle, part = tempfile.mkstemp(_PART, dir=self._folder)
            try:
                with open(handle, "wb", buffering=0) as file:
                    _write(file.fileno(), _header(digest, data))
                    _write(file.fileno(), data)
                self._take_in(Path(part), path, size)
            finally:
                Path(part).unlink(missing_ok=True)

    def _take_in(self, part: Path, path: Path, size: int) -> None:
        """Gives a written file its name, under the lock of the folder, whose file has the sum of
        all sizes. A crash may leave that sum wrong until the next time that blocks are put out."""
        lock = os.open(self._folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            told = os.pread(lock, 32, 0)
            total = int(told) if told.isdigit() else self._limit
            if path.exists():  # another process was faster
                return
            if total + size > self._limit:
                total = self._put_out(_KEPT * self._limit - size)
            part.rename(path)
            os.ftruncate(lock, 0)
            os.pwrite(lock, str(total + size).encode(), 0)
        finally:
            os.close(lock)

    def _put_out(self, most: float) -> int:
        """Removes the blocks that were unused for longest, until `most` bytes are left; returns
        how many are."""
        found = []
        for entry in os.scandir(self._folder):
            try:
                about = entry.stat()
            except FileNotFoundError:  # another process has removed or renamed it
                continue
            if entry.name.endswith(_SUFFIX):
                found.append((about.st_mtime_ns, about.st_size, entry.path))
            elif entry.name.endswith(_PART) and time.time() - about.st_mtime > _ABANDONED_S:
                Path(entry.path).unlink(missing_ok=True)
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= most:
                break
            Path(path).unlink(missing_ok=True)
            total -= size
        return total

    def _place(self, key: str) -> tuple[bytes, Path]:
        digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
        return digest, self._folder / f"{digest.hex()}{_SUFFIX}"

    @contextmanager
    def _or_off(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._off:
                self._off = True
                say(f"{self._folder}: the cache is off: {error.strerror}")


def _header(digest: bytes, data: bytes) -> bytes:
    return _HEADER.pack(_MAGIC, digest, len(data), zlib.crc32(data))


def _write(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:  # a nearly full disk may take a part
        view = view[os.write(file, view) :]
