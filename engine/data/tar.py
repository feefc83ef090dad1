"""The regular files of a plain tar, by their headers alone; nothing is ever extracted.

Reads USTAR, GNU and PAX archives and those of old (v7) tar (POSIX.1-2017, pax; GNU tar manual,
"Basic Tar Format"). Whatever the bytes are, no error is raised, and the time is linear in them.
"""

import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

__all__ = ["MAX_MEMBER_BYTES", "Member", "Walk"]

MAX_MEMBER_BYTES = 1 << 30
_MAX_EXTENSION_BYTES = 1 << 20  # of a long name, or of the pax records of one member
_FARTHEST = 1 << 62  # bytes: no file is as large
_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_FIRST_WINDOW, _LAST_WINDOW = 1 << 12, 1 << 20  # bytes that are searched at once
_REGULAR = (b"0", b"\0", b"7")
_REFUSED = {b"1": "link", b"2": "link", b"3": "device", b"4": "device", b"6": "device"}
_TYPES = frozenset(b"01234567\0xXgLKSDMNV")
_OCTAL = frozenset(b" 01234567")
_Said = tuple[str | None, int | None, str | None]
_NOTHING: _Said = (None, None, None)


class Member(NamedTuple):
    """A regular file of a tar. Its name is only a name: no path to be followed."""

    name: str  # UTF-8, other bytes as surrogates
    offset: int  # of its data
    size: int  # bytes


class Walk:
    """The members of a tar, in order, to be iterated once.

    `view(offset, size)` gives the bytes there, of a file of `size` bytes, fewer only at its end. It
    is asked for headers, always forwards. After a header that does not hold, or a mark of the end,
    the next one is searched for in steps of a block: only the damaged member is lost, and nothing
    behind a hole of zeros or of another tar that was appended.

    complete: whether the mark of the end, two blocks of zeros, follows the last member at once.
    cut:      the last member, if its data goes past the end of the file; it is not yielded.
    damaged:  how many times a header did not hold, or stood behind a mark of the end.
    refused:  members that are not yielded, by reason: `link`, `device`, `sparse`, `too_large` (more
              than MAX_MEMBER_BYTES), `negative`, `pax` (records or a long name of more than 1 MiB,
              or unreadable) or `other`. Directories are not counted.
    """

    def __init__(self, view: Callable[[int, int], memoryview], size: int) -> None:
        self._view, self._size = view, size
        self.complete = False
        self.cut: Member | None = None
        self.damaged = 0
        self.refused: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Member]:
        at = 0
        name, told_size, reason = _NOTHING  # what was said before of the next member
        while len(block := bytes(self._view(at, _BLOCK))) == _BLOCK:
            if block == _ZEROS:
                second = self._view(at + _BLOCK, _BLOCK)
                if len(second) < _BLOCK:
                    return
                if second == _ZEROS:
                    if (found := self._next_header(at + 2 * _BLOCK)) is None:
                        self.complete = True
                        return
                    self.damaged += 1
                    name, told_size, reason = _NOTHING
                    at = found
                    continue
            size = _size(block) if _holds(block) else None
            at += _BLOCK
            if size is None:
                self.damaged += 1
                name, told_size, reason = _NOTHING
                if (found := self._next_header(at)) is None:
                    return
                at = found
                continue
            kind = block[156:157]
            if size < 0:
                self.refused["negative"] += 1
                name, told_size, reason = _NOTHING
                continue
            if kind in (b"x", b"X", b"L"):
                if size > _MAX_EXTENSION_BYTES:
                    reason = "pax"
                elif kind == b"L":
                    name = _text(bytes(self._view(at, size)))
                else:
                    name, told_size, reason = _told(bytes(self._view(at, size)), name)
            elif kind in _REGULAR:
                size = size if told_size is None else told_size
                name = _name(block) if name is None else name
                reason = "too_large" if size > MAX_MEMBER_BYTES else reason
                if reason:
                    self.refused[reason] += 1
                elif not name.endswith("/"):  # in old archives, a directory
                    member = Member(name, at, size)
                    if at + size > self._size:
                        self.cut = member
                        return
                    yield member
                name, told_size, reason = _NOTHING
            elif kind not in (b"g", b"K"):
                if kind == b"S":
                    at = self._after_sparse_map(block, at)
                if kind == b"5" or kind in _REFUSED:
                    size = 0  # whatever it says, no data follows
                if kind != b"5":
                    self.refused["sparse" if kind == b"S" else _REFUSED.get(kind, "other")] += 1
                name, told_size, reason = _NOTHING
            at += -(-size // _BLOCK) * _BLOCK

    def _next_header(self, at: int) -> int | None:
        """Where the next block lies that is surely a header."""
        window = _FIRST_WINDOW
        while True:
            data = bytes(self._view(at, window))
            for low in range(0, len(data) - _BLOCK + 1, _BLOCK):
                if data[low + 148] in _OCTAL and data[low + 156] in _TYPES:
                    block = data[low : low + _BLOCK]
                    known = block[257:262] == b"ustar" or (block[0] and not any(block[257:265]))
                    if known and _holds(block) and _size(block) is not None:
                        return at + low
            if len(data) < window:
                return None
            at += window
            window = min(4 * window, _LAST_WINDOW)

    def _after_sparse_map(self, block: bytes, at: int) -> int:
        """Where the data of a GNU sparse file begins: its map may go on in further blocks."""
        more = block[482]
        while more and len(block := bytes(self._view(at, _BLOCK))) == _BLOCK:
            at, more = at + _BLOCK, block[504]
        return at


def _holds(block: bytes) -> bool:
    """Whether a header has the checksum that it tells: the sum of its bytes, those of the checksum
    itself taken for blanks. Some old tars added signed bytes."""
    field = block[148:156]
    try:
        told = int(field.split(b"\0", 1)[0], 8)
    except ValueError:
        return False
    # Adler-32 holds the sum, plus one and modulo a prime: much faster than adding in Python.
    if told + sum(field) - 255 - (zlib.adler32(block) & 0xFFFF) in (0, 65521):
        return True
    signed = sum(struct.unpack("512b", block)) - sum(struct.unpack("8b", field)) + 256
    return not block.isascii() and told == signed


def _size(block: bytes) -> int | None:
    """As an octal number, or in base 256; None where it is neither, or beyond all files."""
    field = block[124:136]
    try:
        if field[0] in (0x80, 0xFF):
            size = int.from_bytes(field[1:], "big") - (field[0] == 0xFF) * 256**11
        else:
            size = int(field.split(b"\0", 1)[0].strip() or b"0", 8)
    except ValueError:
        return None
    return size if size < _FARTHEST else None


def _text(data: bytes) -> str:
    return data.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _name(block: bytes) -> str:
    name = _text(block[:100])
    if block[345] and block[257:263] == b"ustar\0":
        return f"{_text(block[345:500])}/{name}"
    return name


def _told(body: bytes, name: str | None) -> _Said:
    """The name (or else `name`) and size that pax records tell, and why the member is refused."""
    size = reason = None
    at = 0
    while at < len(body) and body[at]:
        space = body.find(b" ", at, at + 8)
        length = body[at:space] if space > 0 else b""
        end = at + int(length) if length.isdigit() else 0
        key, equals, value = body[space + 1 : end - 1].partition(b"=")
        if not space + 1 < end <= len(body) or body[end - 1] != 0x0A or not equals:
            return None, None, "pax"
        if key == b"path":
            name = value.decode("utf-8", "surrogateescape")
        elif key == b"size":
            if not value.isdigit() or len(value) > 18:
                return None, None, "pax"
            size = int(value)
        elif key.startswith(b"GNU.sparse."):
            reason = "sparse"
        at = end
    return name, size, reason
