"""engine.data.header: what is refused before a decoder sees it, and why."""

import io

import pytest
from PIL import Image

from engine.data import header
from engine.data.header import BadImage, Header, check_format, read_header


@pytest.mark.parametrize(("kind", "name"), [("jpeg", "jpg"), ("png", "png"), ("webp", "webp")])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_format_is_told_by_content_and_size_is_read(encoded, kind: str, name: str, mode: str):
    data = encoded(31, 17, kind=kind, mode=mode)
    assert read_header(data) == Header(name, 31, 17)
    assert read_header(memoryview(data)) == Header(name, 31, 17)
    assert check_format(memoryview(data)) == name


@pytest.mark.parametrize("orientation", range(1, 9))
def test_size_is_that_of_the_upright_image(photo, orientation: int):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("jpeg", "png", "webp"):
        buffer = io.BytesIO()
        photo(31, 17).save(buffer, kind, exif=exif)
        upright = (31, 17) if orientation < 5 else (17, 31)
        assert read_header(buffer.getvalue())[1:] == upright


def reason(data: bytes) -> str:
    with pytest.raises(BadImage) as bad:
        read_header(data)
    return str(bad.value)


@pytest.mark.parametrize("kind", ["gif", "bmp", "tiff", "ppm"])
def test_other_formats_are_refused(encoded, kind: str):
    assert reason(encoded(8, 8, kind=kind)) == "format"


def test_what_is_no_image_is_refused(encoded):
    assert reason(b"") == "empty"
    assert reason(b"<svg xmlns='http://www.w3.org/2000/svg'/>") == "format"
    assert reason(b"RIFF\x24\0\0\0WAVEfmt ") == "format"
    assert reason(encoded(30, 20)[1:]) == "format"


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_a_header_cut_short_is_refused(encoded, kind: str):
    assert reason(encoded(30, 20, kind=kind)[:16]) == "header"


def test_the_pixel_limit_is_the_last_size_taken(encoded, monkeypatch):
    monkeypatch.setattr(header, "MAX_PIXELS", 30 * 20)
    assert read_header(encoded(30, 20)).width == 30
    assert reason(encoded(30, 21)) == "too_large"
    assert reason(encoded(31, 20, kind="png")) == "too_large"


def test_a_bomb_is_refused_by_its_header_alone(encoded):
    """A PNG of 60,000 x 60,000 in 100 bytes."""
    import struct
    import zlib

    size = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + size
    data += struct.pack(">I", zlib.crc32(size)) + struct.pack(">I", 0) + b"IDAT"
    assert reason(data + struct.pack(">I", zlib.crc32(b"IDAT"))) == "too_large"


def test_odd_images_are_judged_without_a_crash(data_folder):
    """Whatever Pillow opens and is of a known format has Pillow's size; the rest a reason."""
    reasons = {}
    for file in sorted((data_folder / "odd_images").glob("*/*")):
        try:
            found = read_header(file.read_bytes())
        except BadImage as bad:
            reasons[file.name] = str(bad)
            continue
        with Image.open(file) as image:
            assert {found.width, found.height} == set(image.size), file.name
    assert set(reasons.values()) == {"format", "header", "animated"}
    assert {n for n, why in reasons.items() if why == "animated"} == {
        "mode_16bit.png",
        "mode_grayscale_alpha.png",
        "mode_palette_1bit_alpha.png",
    }
    assert {n for n, why in reasons.items() if why == "header"} == {
        "broken.png",
        "monkey12.jpg",
        "png_decompression_dos.png",
        "unknown_compression_method.png",
    }
