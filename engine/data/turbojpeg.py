"""Part of a JPEG, scaled down: what of libjpeg-turbo's TurboJPEG 3 API the decoder needs.

The shared library is the one that the PyPI wheel `turbojpeg` carries (x86_64 Linux). Signatures and
numbers are those of turbojpeg.h.
"""

import ctypes
import importlib.metadata
from ctypes import c_char_p, c_int, c_size_t, c_void_p
from functools import cache

import numpy as np

__all__ = ["JpegError", "decompress", "library"]

_STOP_ON_WARNING, _SUBSAMPLING, _WIDTH, _HEIGHT, _PRECISION, _SCAN_LIMIT = 0, 4, 5, 6, 7, 13
_DECOMPRESS = 1
_RGB = 0
_MAX_SCANS = 100
_MCU_WIDTH = {0: 8, 1: 16, 2: 16, 3: 8, 4: 8}  # of 4:4:4, 4:2:2, 4:2:0, gray and 4:4:0
_SEEN = 4  # pixels around a region that the upsampling of its colours looks at


class JpegError(ValueError):
    """A JPEG that the library refuses or warns of, or that is not the size it should be."""


class _Factor(ctypes.Structure):
    _fields_ = (("num", c_int), ("denom", c_int))


class _Region(ctypes.Structure):
    _fields_ = (("x", c_int), ("y", c_int), ("w", c_int), ("h", c_int))


_SIGNATURES = {
    "tj3Init": (c_void_p, c_int),
    "tj3Set": (c_int, c_void_p, c_int, c_int),
    "tj3Get": (c_int, c_void_p, c_int),
    "tj3DecompressHeader": (c_int, c_void_p, c_void_p, c_size_t),
    "tj3SetScalingFactor": (c_int, c_void_p, _Factor),
    "tj3SetCroppingRegion": (c_int, c_void_p, _Region),
    "tj3Decompress8": (c_int, c_void_p, c_void_p, c_size_t, c_void_p, c_int, c_int),
    "tj3GetErrorStr": (c_char_p, c_void_p),
    "tj3Destroy": (None, c_void_p),
}


@cache
def library() -> ctypes.CDLL | None:
    """The shared library, or None where its wheel is not installed."""
    try:
        files = importlib.metadata.files("turbojpeg") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = [file for file in files if file.name.startswith("libturbojpeg")]
    if not found:
        return None
    loaded = ctypes.CDLL(str(found[0].locate()))
    for name, (result, *arguments) in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


def decompress(
    turbo: ctypes.CDLL,
    data: bytes | memoryview,
    size: tuple[int, int],
    region: tuple[int, int, int, int],
    shrink: int = 1,
) -> tuple[np.ndarray, tuple[float, float, float, float]]:
    """Pixels uint8 [h, w, 3], RGB, that cover a region (left, top, right, bottom) of a JPEG of 8
    bits and one or three components whose stored (width, height) is `size`; and where in them the
    region lies.

    They are shrunk by `shrink` (1, 2, 4 or 8), unless colours are subsampled in an unusual way.
    What lies below the region is not looked at, but in a progressive JPEG. Raises JpegError.
    """
    left, top, right, bottom = region
    assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1], (size, region)
    # A handle takes 3 us, and one used before would lend this JPEG the tables that it lacks.
    handle = turbo.tj3Init(_DECOMPRESS)
    if not handle:
        raise MemoryError("TurboJPEG gives no handle")
    try:
        return _decompress(turbo, handle, np.frombuffer(data, np.uint8), size, region, shrink)
    finally:
        turbo.tj3Destroy(handle)


def _decompress(
    turbo: ctypes.CDLL,
    handle: int,
    jpeg: np.ndarray,
    size: tuple[int, int],
    region: tuple[int, int, int, int],
    shrink: int,
) -> tuple[np.ndarray, tuple[float, float, float, float]]:
    def check(status: int) -> None:
        if status != 0:
            raise JpegError(turbo.tj3GetErrorStr(handle).decode(errors="replace"))

    def decoded(around: _Region, width: int, height: int) -> np.ndarray:
        check(turbo.tj3SetCroppingRegion(handle, around))
        pixels = np.empty((height, width, 3), np.uint8)
        source, into = (jpeg.ctypes.data, jpeg.size), pixels.ctypes.data
        check(turbo.tj3Decompress8(handle, *source, into, 3 * width, _RGB))
        return pixels

    width, height = size
    left, top, right, bottom = region
    check(turbo.tj3Set(handle, _STOP_ON_WARNING, 1))
    check(turbo.tj3Set(handle, _SCAN_LIMIT, _MAX_SCANS))
    check(turbo.tj3DecompressHeader(handle, jpeg.ctypes.data, jpeg.size))
    told = turbo.tj3Get(handle, _WIDTH), turbo.tj3Get(handle, _HEIGHT)
    if told != size or turbo.tj3Get(handle, _PRECISION) != 8:
        raise JpegError(f"a JPEG of {told} pixels where {size} of 8 bits were told")
    mcu_width = _MCU_WIDTH.get(turbo.tj3Get(handle, _SUBSAMPLING))
    if mcu_width is None:  # no part can be had
        part = decoded(_Region(0, 0, 0, 0), width, height)[top:bottom, left:right]
        return part, (0, 0, right - left, bottom - top)

    check(turbo.tj3SetScalingFactor(handle, _Factor(1, shrink)))
    x, y = left // shrink, top // shrink
    w, h = -(-right // shrink) - x, -(-bottom // shrink) - y
    step = mcu_width // shrink
    first = max(0, x - _SEEN) // step * step  # the library wants whole MCUs to its left
    last = min(-(-width // shrink), x + w + _SEEN)
    above, below = max(0, y - _SEEN), min(-(-height // shrink), y + h + _SEEN)
    around = _Region(first, above, last - first, below - above)
    part = decoded(around, around.w, around.h)[y - above :, x - first :][:h, :w]
    return part, (left / shrink - x, top / shrink - y, right / shrink - x, bottom / shrink - y)
