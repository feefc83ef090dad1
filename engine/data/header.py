"""What an encoded image says of itself, checked before any native decoder sees its bytes."""

import io
import warnings
from typing import NamedTuple

from PIL import Image

__all__ = ["MAX_PIXELS", "BadImage", "Header", "check_format", "read_header"]

MAX_PIXELS = 100_000_000
_FORMATS = {"jpg": b"\xff\xd8\xff", "png": b"\x89PNG\r\n\x1a\n", "webp": b"RIFF"}
_PNG_HEAD = 65536  # bytes in which the chunks before the pixels are looked for
_ORIENTATION = 0x0112  # EXIF tag
_SIDEWAYS = (5, 6, 7, 8)


class BadImage(ValueError):
    """An image that is not decoded; the message is its reason, one word."""


class Header(NamedTuple):
    """Format by content, and width and height in pixels once upright."""

    format: str
    width: int
    height: int


def check_format(data: bytes | memoryview) -> str:
    """jpg, png or webp, by magic bytes; raises BadImage `empty`, `format` or `animated`."""
    start = bytes(data[:12])
    if not start:
        raise BadImage("empty")
    kind = next((kind for kind, magic in _FORMATS.items() if start.startswith(magic)), None)
    if kind is None or (kind == "webp" and start[8:] != b"WEBP"):
        raise BadImage("format")
    if kind == "png" and _hidden_still(bytes(data[:_PNG_HEAD])):
        raise BadImage("animated")
    return kind


def _hidden_still(head: bytes) -> bool:
    """Whether an animated PNG's still image is not its first frame: DALI would decode it black."""
    before_pixels = head.partition(b"IDAT")[0]
    return b"acTL" in before_pixels and b"fcTL" not in before_pixels


def read_header(data: bytes | memoryview) -> Header:
    """Checks magic bytes and header of an image, without decoding it.

    Raises BadImage: `empty`, `format` (not JPEG, PNG or WebP by content), `animated` (a PNG whose
    still image is not a frame), `header` (unreadable), `too_large` (more than MAX_PIXELS),
    `no_pixels`.
    """
    kind = check_format(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a broken EXIF block or a large image is ours to judge
            image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP"))
            width, height = image.size
            if _has_exif(image) and image.getexif().get(_ORIENTATION) in _SIDEWAYS:
                width, height = height, width
    except Image.DecompressionBombError:
        raise BadImage("too_large") from None
    except Exception as error:  # Pillow's plugins raise whatever their parsers trip over
        raise BadImage("header") from error
    if width < 1 or height < 1:
        raise BadImage("no_pixels")
    if width * height > MAX_PIXELS:
        raise BadImage("too_large")
    return Header(kind, width, height)


def _has_exif(image: Image.Image) -> bool:
    return "exif" in image.info or "Raw profile type exif" in image.info
