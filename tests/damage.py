"""Images, and the ways in which they come to harm."""

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image

Draw = np.random.Generator
FORMS: tuple[tuple[str, str, dict], ...] = (
    *[
        ("jpeg", mode, {"subsampling": subsampling, "progressive": progressive})
        for mode, subsampling in (("RGB", 0), ("RGB", 1), ("RGB", 2), ("L", -1))
        for progressive in (False, True)
    ],
    ("jpeg", "RGB", {"subsampling": "4:1:1"}),
    ("jpeg", "RGB", {"restart_marker_blocks": 3}),
    ("jpeg", "RGB", {"restart_marker_rows": 1, "progressive": True}),
    ("jpeg", "CMYK", {}),
    *[("png", mode, {}) for mode in ("RGB", "RGBA", "L", "P", "1", "I;16")],
    *[("webp", mode, {"lossless": lossless}) for mode in ("RGB", "RGBA") for lossless in (0, 1)],
)


def whole_image(draw: Draw) -> tuple[str, bytes]:
    """One of these forms, of an odd size, upright or not."""
    kind, mode, save = FORMS[draw.integers(len(FORMS))]
    coarse = draw.integers(0, 256, (draw.integers(2, 40), draw.integers(2, 40), 3), dtype=np.uint8)
    width, height = (int(side) for side in np.exp(draw.uniform(2.1, 6.2, 2)))  # 8 to 490
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    else:
        image = image.convert(mode)
    if kind != "webp" and draw.integers(3) == 0:
        exif = Image.Exif()
        exif[0x0112] = int(draw.integers(1, 9))
        save = {**save, "exif": exif}
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=int(draw.integers(20, 96)), **save)
    return kind, buffer.getvalue()


def flip_bytes(kind: str, data: bytearray, draw: Draw) -> bytearray:
    for _ in range(draw.integers(1, 12)):
        data[draw.integers(len(data))] = draw.integers(256)
    return data


def flip_head(kind: str, data: bytearray, draw: Draw) -> bytearray:
    for _ in range(draw.integers(1, 5)):
        data[draw.integers(min(700, len(data)))] = draw.integers(256)
    return data


def cut(kind: str, data: bytearray, draw: Draw) -> bytearray:
    end = {"jpeg": b"\xff\xd9", "png": data[-12:], "webp": b""}[kind]
    return data[: draw.integers(len(data))] + end * int(draw.integers(2))


def drop(kind: str, data: bytearray, draw: Draw) -> bytearray:
    low, high = sorted(draw.integers(len(data), size=2))
    return data[:low] + data[high:]


def repeat(kind: str, data: bytearray, draw: Draw) -> bytearray:
    low, high = sorted(draw.integers(len(data), size=2))
    return data[:high] + data[low:]


def splice(kind: str, data: bytearray, draw: Draw) -> bytearray:
    _, other = whole_image(draw)
    return data[: draw.integers(len(data))] + other[draw.integers(len(other)) :]


def scramble(kind: str, data: bytearray, draw: Draw) -> bytearray:
    low, high = sorted(draw.integers(len(data), size=2))
    data[low:high] = draw.bytes(high - low)
    return data


def resize(kind: str, data: bytearray, draw: Draw) -> bytearray:
    """Another width and height than its pixels have, in a header that is right otherwise."""
    sides = [int(side) for side in np.exp(draw.uniform(2.1, 10, 2))]
    if kind == "png":
        data[16:24] = struct.pack(">II", *sides)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    elif kind == "webp":
        data[24:30] = draw.bytes(6)
    else:
        for marker in (b"\xff\xc0", b"\xff\xc1", b"\xff\xc2"):
            if (at := data.find(marker)) > 0:
                data[at + 5 : at + 9] = struct.pack(">HH", *sides)
                if draw.integers(3) == 0:
                    data[at + 11 + 3 * int(draw.integers(3))] = draw.choice(
                        [0x11, 0x12, 0x21, 0x41]
                    )
                break
    return data


def segment(kind: str, data: bytearray, draw: Draw) -> bytearray:
    """A table or a header of the JPEG a second time, somewhere, and perhaps changed."""
    places = [at for at in range(2, len(data) - 4) if data[at] == 0xFF and data[at + 1] >= 0xC0]
    if kind != "jpeg" or not places:
        return repeat(kind, data, draw)
    at = places[draw.integers(len(places))]
    size = 2 + int.from_bytes(data[at + 2 : at + 4])
    again = flip_bytes(kind, bytearray(data[at : at + size]), draw)
    to = places[draw.integers(len(places))]
    return data[:to] + again + data[to:]


DAMAGES: tuple[Callable[[str, bytearray, Draw], bytearray], ...] = (
    flip_bytes, flip_head, cut, drop, repeat, splice, scramble, resize, segment,
)  # fmt: skip


def mutated(draw: Draw) -> bytes:
    """An image that is damaged once or twice; perhaps not one any more."""
    kind, data = whole_image(draw)
    spoilt = bytearray(data)
    for _ in range(draw.integers(1, 3)):
        if spoilt:
            spoilt = DAMAGES[draw.integers(len(DAMAGES))](kind, spoilt, draw)
    return bytes(spoilt)
