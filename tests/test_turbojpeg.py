"""engine.data.turbojpeg: its pixels are Pillow's, whatever the region."""

import io

import numpy as np
import pytest
from PIL import Image

from engine.data.turbojpeg import JpegError, decompress, library

TURBO = library()
pytestmark = pytest.mark.skipif(TURBO is None, reason="needs the wheel `turbojpeg` (x86_64)")


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0", "gray"])
@pytest.mark.parametrize("size", [(301, 223), (64, 48), (9, 17), (1, 1)])
def test_every_region_is_that_of_the_whole(encoded, size, subsampling: str, progressive: bool):
    mode = {"mode": "L"} if subsampling == "gray" else {"subsampling": subsampling}
    data = encoded(*size, progressive=progressive, **mode)
    with Image.open(io.BytesIO(data)) as image:
        by_pillow = np.asarray(image.convert("RGB"))
    draw = np.random.default_rng(0)
    for shrink in (1, 2, 4, 8):
        whole, box = decompress(TURBO, data, size, (0, 0, *size), shrink)
        assert whole.shape == (-(-size[1] // shrink), -(-size[0] // shrink), 3)
        assert box == (0, 0, size[0] / shrink, size[1] / shrink)
        if shrink == 1:
            assert np.array_equal(whole, by_pillow)
        for _ in range(10):
            left, top = (int(draw.integers(side)) for side in size)
            right, bottom = (
                int(draw.integers(left, size[0])) + 1,
                int(draw.integers(top, size[1])) + 1,
            )
            part, box = decompress(TURBO, data, size, (left, top, right, bottom), shrink)
            x, y = left // shrink, top // shrink
            height, width, _ = part.shape
            assert np.array_equal(part, whole[y : y + height, x : x + width])
            wanted = (left / shrink, top / shrink, right / shrink, bottom / shrink)
            assert np.allclose(box, np.subtract(wanted, (x, y, x, y)))
            assert width - 1 < box[2] <= width and height - 1 < box[3] <= height


def test_what_is_wrong_is_told(encoded):
    data = encoded(80, 60)
    for size in ((80, 61), (60, 80)):
        with pytest.raises(JpegError, match="80, 60"):
            decompress(TURBO, data, size, (0, 0, *size))
    with pytest.raises(JpegError, match="Premature end"):
        decompress(TURBO, data[:-200], (80, 60), (0, 0, 80, 60))
    with pytest.raises(JpegError):
        decompress(TURBO, b"\xff\xd8\xff" + bytes(40), (80, 60), (0, 0, 80, 60))


def test_unusual_colours_are_whole_and_unshrunk(encoded):
    """4:1:1, whose blocks are as many as those of 4:2:0, only in other places."""
    data = encoded(64, 48, quality=95, subsampling="4:2:0")
    frame = data.index(b"\xff\xc0")
    assert data[frame + 11] == 0x22
    data = data[: frame + 11] + b"\x41" + data[frame + 12 :]
    with Image.open(io.BytesIO(data)) as image:
        by_pillow = np.asarray(image.convert("RGB"))
    for shrink in (1, 8):
        part, box = decompress(TURBO, data, (64, 48), (5, 3, 60, 41), shrink)
        assert np.array_equal(part, by_pillow[3:41, 5:60]) and box == (0, 0, 55, 38)


def test_scans_are_limited():
    """Of a progressive JPEG: each costs as much as the image is large, however few its bytes."""
    buffer = io.BytesIO()
    Image.new("L", (80, 60)).save(buffer, "jpeg", progressive=True)
    start, first, second, *_ = buffer.getvalue().split(b"\xff\xda")
    scan = bytearray(b"\xff\xda" + second.split(b"\xff")[0])
    scan[9] = 0  # all bits at once, which may be said again
    for scans, good in ((90, True), (110, False)):
        data = start + b"\xff\xda" + first + bytes(scan) * scans + b"\xff\xd9"
        if good:
            decompress(TURBO, data, (80, 60), (0, 0, 80, 60))
        else:
            with pytest.raises(JpegError, match="scans"):
                decompress(TURBO, data, (80, 60), (0, 0, 80, 60))
