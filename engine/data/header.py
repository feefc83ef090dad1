"""What an encoded image says of itself, checked before any native decoder sees its bytes.

The parsers are strict: what they take, DALI's own parser (nvImageCodec) takes too, with the same
upright size; a test holds them to it. Where DALI reads EXIF in its own way, so do they. No parser
allocates by a number that it has read, and each does a bounded number of steps.
"""

import zlib
from struct import Struct, error
from typing import NamedTuple

__all__ = [
    "MAX_ASPECT",
    "MAX_PIXELS",
    "MIN_SIDE",
    "BadImage",
    "Header",
    "check_format",
    "read_header",
]

MAX_PIXELS = 100_000_000
MIN_SIDE = 8  # pixels
MAX_ASPECT = 100  # longer side by shorter side
_MAX_PARTS = 1 << 17  # segments or chunks of a file: a GiB in libpng's chunks of 8 KiB
_FORMATS = {"jpg": b"\xff\xd8\xff", "png": b"\x89PNG\r\n\x1a\n", "webp": b"RIFF"}
_PNG_HEAD = 65536  # bytes in which the chunks before the pixels are looked for
_SIDEWAYS = (5, 6, 7, 8)

# JPEG, ITU-T T.81, Annex B.
_SEGMENT = Struct(">BBH").unpack_from
_FRAME = Struct(">BHHB").unpack_from
_HUFFMAN = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive
_FRAMES = (*_HUFFMAN, 0xC9, 0xCA)  # the same, coded arithmetically; nobody decodes the others
_APP1, _SCAN, _FILL = 0xE1, 0xDA, 0xFF
_OTHERS = frozenset([0xC4, 0xCC, 0xDB, 0xDC, 0xDD, *range(0xE0, 0xF0), 0xFE])  # tables, APPn, COM
_FACTORS = frozenset(16 * h + v for h in range(1, 5) for v in range(1, 5))  # of sampling
_END_OF_IMAGE = b"\xff\xd9"

# PNG, third edition, 5.3 and 11.2.1.
_CHUNK = Struct(">I4s").unpack_from
_IHDR = Struct(">I4sIIBBBBBI").unpack_from
_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}  # by colour

# WebP: RFC 9649.
_RIFF = Struct("<4xI4x4sI").unpack_from
_RIFF_CHUNK = Struct("<4sI").unpack_from
_LOSSY = Struct("<3s3sHH").unpack_from
_LOSSLESS = Struct("<BI").unpack_from
_HAS_EXIF = 8

# EXIF: TIFF 6.0, and what nvImageCodec reads of it.
_ORIENTATION = 0x0112
_TEXTS = frozenset([0x010E, 0x010F, 0x0110, 0x0131, 0x0132, 0x8298])
_SHORTS = frozenset([0x0128, 0x0213])
_RATIONALS = {0x011A: 1, 0x011B: 1, 0x013E: 2, 0x013F: 6, 0x0211: 3, 0x0214: 6}  # how many
_READS = {
    order: tuple(Struct(order + fields).unpack_from for fields in ("HI", "H", "I"))
    for order in "<>"
}


class BadImage(ValueError):
    """An image that is not decoded; the message is its reason, one word."""


class Header(NamedTuple):
    """Format by content, and width and height in pixels once upright."""

    format: str  # jpg, png or webp
    width: int
    height: int
    orientation: int  # EXIF, 1 to 8: how the stored image is to be turned upright
    plain: bool  # a JPEG coded by Huffman, of 8 bits and one or three components


def check_format(data: bytes | memoryview) -> str:
    """jpg, png or webp, by magic bytes; raises BadImage `empty`, `format` or `animated`."""
    kind = _kind(data)
    if kind == "png":
        before_pixels = bytes(data[:_PNG_HEAD]).partition(b"IDAT")[0]
        if b"acTL" in before_pixels and b"fcTL" not in before_pixels:
            raise BadImage("animated")
    return kind


def _kind(data: bytes | memoryview) -> str:
    start = bytes(data[:12])
    for kind, magic in _FORMATS.items():
        if start.startswith(magic) and (kind != "webp" or start[8:] == b"WEBP"):
            return kind
    raise BadImage("format" if start else "empty")


def read_header(data: bytes | memoryview) -> Header:
    """Checks magic bytes, header and completeness of an image, without decoding it.

    Raises BadImage: `empty`; `format` (not JPEG, PNG or WebP by content); `header` (unreadable, or
    not for DALI); `no_pixels`; `too_large` (more than MAX_PIXELS); `too_small` (a side below
    MIN_SIDE); `too_long` (sides beyond MAX_ASPECT to one); `animated` (a PNG whose still image is
    not a frame: DALI decodes it black); `truncated` (its end is missing).
    """
    kind = _kind(data)
    try:
        width, height, orientation, plain = _PARSERS[kind](data)
    except error:  # a field beyond the end of the data
        raise BadImage("header") from None
    if orientation in _SIDEWAYS:
        width, height = height, width
    return Header(kind, width, height, orientation, plain)


def _check_size(width: int, height: int) -> None:
    if not (width and height):
        raise BadImage("no_pixels")
    if width * height > MAX_PIXELS:
        raise BadImage("too_large")
    if min(width, height) < MIN_SIDE:
        raise BadImage("too_small")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadImage("too_long")


def _jpeg(data: bytes | memoryview) -> tuple[int, int, int, bool]:
    at, frame, orientation = 2, 0, 1
    for _ in range(_MAX_PARTS):
        prefix, marker, size = _SEGMENT(data, at)
        if prefix != 0xFF:
            raise BadImage("header")
        if marker == _FILL:
            at += 1
            continue
        if size < 2 or marker == _SCAN:
            break
        if marker == _APP1:
            if data[at + 4 : at + 10] == b"Exif\0\0":
                found, whole = _orientation(bytes(data[at + 10 : at + 2 + size]))
                orientation = found if found and whole else orientation
        elif marker in _FRAMES and not frame:
            frame = marker
            bits, height, width, components = _FRAME(data, at + 4)
            factors = bytes(data[at + 11 : at + 2 + size : 3])
            if bits != 8 or components not in (1, 3, 4) or size != 8 + 3 * components:
                raise BadImage("header")
            if not _FACTORS.issuperset(factors):
                raise BadImage("header")
        elif marker not in _OTHERS:
            raise BadImage("header")
        at += 2 + size
    if not frame or marker != _SCAN or not 8 <= size <= 14:
        raise BadImage("header")
    _check_size(width, height)
    at += 2 + size
    if at + 2 > len(data) or (
        data[-2:] != _END_OF_IMAGE and bytes(data[at:]).rfind(_END_OF_IMAGE) < 0
    ):
        raise BadImage("truncated")
    return width, height, orientation, frame in _HUFFMAN and components != 4


def _png(data: bytes | memoryview) -> tuple[int, int, int, bool]:
    size, name, width, height, bits, colour, packing, filters, lace, crc = _IHDR(data, 8)
    if size != 13 or name != b"IHDR" or bits not in _DEPTHS.get(colour, ()):
        raise BadImage("header")
    if packing or filters or lace > 1 or crc != zlib.crc32(data[12:29]):
        raise BadImage("header")
    _check_size(width, height)
    at, orientation = 33, 1
    control = frame = pixels = False
    try:
        for _ in range(_MAX_PARTS):
            size, name = _CHUNK(data, at)
            if name == b"IDAT":
                if control and not frame:
                    raise BadImage("animated")
                pixels = True
            elif name == b"IEND":
                break
            elif name == b"eXIf":
                found, whole = _orientation(bytes(data[at + 8 : at + 8 + size]))
                orientation = found if found and whole else orientation
            elif name == b"acTL":
                control = True
            elif name == b"fcTL":
                frame = True
            at += 12 + size
    except error:
        raise BadImage("truncated") from None
    if name != b"IEND":
        raise BadImage("header")
    if not pixels or at + 12 > len(data):
        raise BadImage("truncated")
    return width, height, orientation, False


def _webp(data: bytes | memoryview) -> tuple[int, int, int, bool]:
    riff, name, size = _RIFF(data, 0)
    orientation, flags = 1, 0
    if name == b"VP8 ":
        tag, sync, width, height = _LOSSY(data, 20)
        if sync != b"\x9d\x01\x2a" or tag[0] & 1:  # 1: not a key frame
            raise BadImage("header")
        width, height = width & 0x3FFF, height & 0x3FFF
    elif name == b"VP8L":
        signature, packed = _LOSSLESS(data, 20)
        if signature != 0x2F or packed >> 29:
            raise BadImage("header")
        width, height = (packed & 0x3FFF) + 1, (packed >> 14 & 0x3FFF) + 1
    elif name == b"VP8X" and size == 10 and len(data) >= 30:
        flags = data[20]
        width = int.from_bytes(data[24:27], "little") + 1
        height = int.from_bytes(data[27:30], "little") + 1
    else:
        raise BadImage("header")
    _check_size(width, height)
    end = 8 + riff
    if end > len(data):
        raise BadImage("truncated")
    if 20 + size > end:
        raise BadImage("header")
    if flags & _HAS_EXIF:
        orientation = _webp_orientation(data, 20 + size, end)
    return width, height, orientation, False


def _webp_orientation(data: bytes | memoryview, at: int, end: int) -> int:
    """Of the EXIF chunk that is said to come. DALI does not know that a chunk of odd size is
    padded, and so fails to find it after one."""
    for _ in range(_MAX_PARTS):
        name, size = _RIFF_CHUNK(data, at)
        at += 8
        if at + size > end:
            break
        if name == b"EXIF":
            return _orientation(bytes(data[at : at + size]))[0] or 1
        if size % 2:
            break
        at += size
    raise BadImage("header")


def _orientation(tiff: bytes) -> tuple[int, bool]:
    """The orientation that an EXIF block tells, or 0, and whether the block is whole.

    As nvImageCodec reads it: the first directory alone; a block of which one known entry points
    outside is not whole; a value that means nothing means 1.
    """
    start, short, long = _READS["<" if tiff.startswith(b"II") else ">"]
    found = 0
    try:
        mark, directory = start(tiff, 2)
        if mark != 42:
            return 0, False
        (entries,) = short(tiff, directory)
        for at in range(directory + 2, directory + 2 + 12 * entries, 12):
            (tag,) = short(tiff, at)
            first = size = 0
            if tag == _ORIENTATION:
                (value,) = short(tiff, at + 8)
                found = found or (value if 1 <= value <= 8 else 1)
            elif tag in _TEXTS:
                (size,) = long(tiff, at + 4)
                first = long(tiff, at + 8)[0] if size > 4 else 8
            elif tag in _SHORTS:
                short(tiff, at + 8)
            elif tag in _RATIONALS:
                (first,) = long(tiff, at + 8)
                size = 8 * _RATIONALS[tag]
            if first + size > len(tiff):
                return found, False
    except error:
        return found, False
    return found, True


_PARSERS = {"jpg": _jpeg, "png": _png, "webp": _webp}
