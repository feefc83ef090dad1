"""engine.data.header: what is refused before a decoder sees it, and why; held to DALI's parser."""

import io
import random
import struct
import time
import tracemalloc
import zlib

import numpy as np
import pytest
from nvidia.dali import Pipeline, fn, pipeline_def, types
from PIL import Image, ImageOps, PngImagePlugin

from engine.data import header
from engine.data.header import BadImage, Header, check_format, read_header

KINDS = ("jpeg", "png", "webp")
EXECUTOR = {"prefetch_queue_depth": 1, "exec_pipelined": False, "exec_async": False}


@pipeline_def(**EXECUTOR, exec_dynamic=True, batch_size=1, num_threads=1, device_id=None)
def dali(decoded: bool):
    encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
    if decoded:
        return fn.decoders.image(encoded, output_type=types.RGB)
    return fn.peek_image_shape(encoded)


@pytest.fixture(scope="module")
def by_dali():
    """by_dali(data, decoded): upright pixels or (width, height); RuntimeError where it refuses."""
    pipelines: dict[bool, Pipeline] = {}

    def run(data: bytes, decoded: bool = False):
        pipeline = pipelines.pop(decoded, None) or dali(decoded)
        (found,) = pipeline.run(encoded=[np.frombuffer(data, np.uint8)])
        pipelines[decoded] = pipeline  # one that has failed is not used again
        array = np.asarray(found.at(0))
        return array if decoded else (int(array[1]), int(array[0]))

    return run


def reason(data: bytes) -> str:
    with pytest.raises(BadImage) as bad:
        read_header(data)
    return str(bad.value)


def with_exif(orientation: int, endian: str = "<") -> Image.Exif:
    exif = Image.Exif()
    exif.endian = endian
    exif[0x010F] = "the maker of the camera"
    exif[0x0110] = "X"
    exif[0x0112] = orientation
    exif[0x011A] = exif[0x011B] = 72.0
    exif[0x013E] = (0.3, 0.3)
    exif[0x8298] = "somebody else"
    return exif


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_of(width: int, height: int, *fields: int) -> bytes:
    """The start of a PNG that says it has that size."""
    ihdr = struct.pack(">IIBBBBB", width, height, *(fields or (8, 2, 0, 0, 0)))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", ihdr)


def riff_chunk(name: bytes, body: bytes) -> bytes:
    return name + struct.pack("<I", len(body)) + body + bytes(len(body) % 2)


def webp_of(width: int, height: int, flags: int, *chunks: bytes) -> bytes:
    size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBP" + riff_chunk(b"VP8X", bytes([flags, 0, 0, 0]) + size) + b"".join(chunks)
    return riff_chunk(b"RIFF", body)


def jpeg_of(data: bytes, width: int, height: int) -> bytes:
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


@pytest.mark.parametrize(("kind", "name"), [("jpeg", "jpg"), ("png", "png"), ("webp", "webp")])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_format_is_told_by_content_and_size_is_read(encoded, kind: str, name: str, mode: str):
    data = encoded(31, 17, kind=kind, mode=mode)
    assert read_header(data) == Header(name, 31, 17, 1, kind == "jpeg")
    assert read_header(memoryview(data)) == Header(name, 31, 17, 1, kind == "jpeg")
    assert check_format(memoryview(data)) == name


def test_every_way_of_storing_has_its_size(encoded):
    for save in (
        {"kind": "webp", "lossless": True},
        {"kind": "webp", "mode": "RGBA", "lossless": True},
        {"kind": "webp", "mode": "RGBA"},
        {"kind": "jpeg", "progressive": True},
        *({"kind": "jpeg", "subsampling": chroma} for chroma in (0, 1, 2)),
        *({"kind": "png", "mode": mode} for mode in ("1", "P", "LA", "RGBA", "I;16")),
    ):
        if save.get("mode") != "I;16":
            data = encoded(131, 77, **save)
        else:
            buffer = io.BytesIO()
            Image.fromarray(np.zeros((77, 131), np.uint16)).save(buffer, "png")
            data = buffer.getvalue()
        assert read_header(data)[1:4] == (131, 77, 1), save


def test_a_plain_jpeg_is_the_same_picture_to_dali_and_pillow(by_dali, encoded, photo):
    """Also one that stores RGB, and says so by Adobe's marker or by the names of its components;
    one of four components is not plain."""
    buffer = io.BytesIO()
    photo(64, 48).save(buffer, "jpeg", keep_rgb=True, quality=95)
    adobe = buffer.getvalue()
    assert adobe[6:11] == b"Adobe"
    named = adobe[:2] + adobe[18:]
    for data in (adobe, named, encoded(64, 48), encoded(64, 48, mode="L")):
        assert read_header(data).plain
        pillows = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
        assert np.abs(by_dali(data, decoded=True) - pillows).mean() < 0.5
    assert not read_header(encoded(64, 48, mode="CMYK")).plain


@pytest.mark.parametrize("kind", ["gif", "bmp", "tiff", "ppm"])
def test_other_formats_are_refused(encoded, kind: str):
    assert reason(encoded(8, 8, kind=kind)) == "format"


def test_what_is_no_image_is_refused(encoded):
    assert reason(b"") == "empty"
    assert reason(b"<svg xmlns='http://www.w3.org/2000/svg'/>") == "format"
    assert reason(b"RIFF\x24\0\0\0WAVEfmt ") == "format"
    assert reason(encoded(30, 20)[1:]) == "format"


@pytest.mark.parametrize("kind", KINDS)
def test_no_part_of_a_file_is_taken_for_the_whole(encoded, kind: str):
    """Cut anywhere; but what follows the end is none of our business."""
    data = encoded(90, 60, kind=kind)
    assert reason(data[:16]) == "header"
    told = {reason(data[:cut]) for cut in range(len(data))}
    assert told == {"empty", "format", "header", "truncated"}
    assert reason(data[: len(data) * 3 // 4]) == "truncated"
    assert read_header(data + b"\0\r\n more") == read_header(data)


def test_the_end_of_a_thumbnail_is_not_the_end(encoded):
    thumbnail = b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0" + encoded(16, 16)
    data = encoded(90, 60)
    whole = data[:2] + segment(0xE1, thumbnail) + data[2:]
    assert read_header(whole).width == 90
    assert reason(whole[:-300]) == "truncated"


def test_the_limits_of_size(encoded, monkeypatch):
    assert read_header(encoded(8, 800))[1:3] == (8, 800)
    assert reason(encoded(7, 30)) == reason(encoded(30, 7, kind="png")) == "too_small"
    assert reason(encoded(8, 801)) == reason(encoded(801, 8, kind="webp")) == "too_long"
    monkeypatch.setattr(header, "MAX_PIXELS", 30 * 20)
    assert read_header(encoded(30, 20)).width == 30
    assert reason(encoded(30, 21)) == "too_large"
    assert reason(encoded(31, 20, kind="png")) == "too_large"


def test_a_bomb_is_refused_by_its_header_alone(encoded):
    """Huge sizes in a few bytes: in less than a millisecond, and no memory."""
    jpeg = encoded(30, 20)
    bombs = [png_of(side, side) for side in (30_000, 2**31 - 1, 2**32 - 1)]
    bombs += [jpeg_of(jpeg, 65_500, 65_500), webp_of(1 << 24, 1 << 24, 0)]
    for bomb in bombs:
        tracemalloc.start()
        assert reason(bomb) == "too_large"
        assert tracemalloc.get_traced_memory()[1] < 20_000
        tracemalloc.stop()
        seconds = []
        for _ in range(5):
            started = time.perf_counter()
            reason(bomb)
            seconds.append(time.perf_counter() - started)
        assert min(seconds) < 1e-3
    assert reason(png_of(0, 30)) == reason(jpeg_of(jpeg, 30, 0)) == "no_pixels"


def test_millions_of_empty_parts_end_soon(encoded):
    jpeg, png, webp = (encoded(30, 20, kind=kind) for kind in KINDS)
    endless = [
        jpeg[:2] + b"\xff" * 3_000_000 + jpeg[2:],
        jpeg[:2] + b"\xff\xfe\0\2" * 3_000_000 + jpeg[2:],
        png[:-12] + png_chunk(b"teXt", b"") * 1_000_000 + png[-12:],
        webp_of(30, 20, 8, b"ABCD\0\0\0\0" * 1_000_000, webp[12:]),
    ]
    started = time.perf_counter()
    assert {reason(data) for data in endless} == {"header"}
    assert time.perf_counter() - started < 1


def test_a_jpeg_that_no_decoder_agrees_on_is_refused(encoded):
    data = encoded(90, 60)
    sof, sos = data.index(b"\xff\xc0"), data.index(b"\xff\xda")
    frame = data[sof : sof + 19]

    def patched(at: int, value: int) -> bytes:
        return data[:at] + bytes([value]) + data[at + 1 :]

    for broken in (
        data[:sof] + data[sof + 19 :],  # no frame
        data[:sof] + frame + data[sof:],  # two
        patched(sof + 1, 0xC3),  # lossless
        patched(sof + 1, 0xC8),
        patched(sof + 4, 12),  # bits
        patched(sof + 9, 2),  # components
        patched(sof + 9, 5),
        patched(sof + 11, 0x01),  # a sampling factor of 0
        patched(sof + 11, 0x15),
        patched(sof + 3, 18),  # length
        patched(sos + 3, 5),
        data[:2] + b"\xff\xe1\0\1" + data[2:],
        data[:2] + b"\xff\xe1\0\7Exif\0\0" + data[2:],  # DALI: a vector of 2^64 - 1 bytes
        data[:2] + b"\xff\xe1\xff\xff" + data[2:],
        data[:20] + b"\xff\0" + data[20:],
        data[:20] + b"\xff\xd0" + data[20:],
        data[:20] + b"\xff\xd9" + data[20:],
        data[:20] + b"junk" + data[20:],
    ):
        assert reason(broken) == "header"
    assert read_header(data[:20] + b"\xff\xff\xff" + data[20:]).plain  # fill bytes
    assert read_header(patched(sof + 1, 0xC1)).plain
    assert not read_header(patched(sof + 1, 0xC9)).plain  # arithmetic coding


def test_a_png_is_what_its_standard_allows():
    pixels = png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b"")
    legal = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
    for colour in range(256):
        for bits in (0, 1, 2, 3, 4, 5, 8, 16, 24, 32):
            data = png_of(30, 20, bits, colour, 0, 0, 0) + pixels
            if bits in legal.get(colour, ()):
                assert read_header(data)[:3] == ("png", 30, 20)
            else:
                assert reason(data) == "header"
    for odd in ((8, 2, 1, 0, 0), (8, 2, 0, 1, 0), (8, 2, 0, 0, 2)):
        assert reason(png_of(30, 20, *odd) + pixels) == "header"
    start = png_of(30, 20)
    assert reason(start[:-1] + b"?" + pixels) == "header"  # the checksum
    assert reason(start[:8] + pixels) == "header"
    assert reason(start + png_chunk(b"IEND", b"")) == "truncated"
    assert reason(start + png_chunk(b"IDAT", b"")) == "truncated"
    assert reason(start + pixels[:-1]) == "truncated"


def test_an_animated_png_is_taken_if_its_still_image_is_a_frame():
    start, control, frame = png_of(30, 20), png_chunk(b"acTL", bytes(8)), png_chunk(b"fcTL", b"")
    pixels, end = png_chunk(b"IDAT", b""), png_chunk(b"IEND", b"")
    assert reason(start + control + pixels + frame + end) == "animated"
    assert read_header(start + control + frame + pixels + end).width == 30
    with pytest.raises(BadImage, match="animated"):
        check_format(start + control + pixels)


def test_a_webp_keeps_to_its_container(encoded):
    data = encoded(30, 20, kind="webp")
    lossless = encoded(30, 20, kind="webp", lossless=True)
    for broken in (
        data[:23] + b"\x9d\x01\x2b" + data[26:],
        data[:20] + bytes([data[20] | 1]) + data[21:],  # not a key frame
        lossless[:20] + b"\x2e" + lossless[21:],
        lossless[:24] + b"\xff" + lossless[25:],  # another version
        data[:12] + b"VP9 " + data[16:],
        data[:16] + struct.pack("<I", 1 << 20) + data[20:],  # a chunk larger than the file
        webp_of(30, 20, 8, data[12:]),  # EXIF announced, and none
    ):
        assert reason(broken) == "header"
    assert reason(data[:4] + struct.pack("<I", len(data)) + data[8:]) == "truncated"


@pytest.mark.parametrize("endian", "<>")
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_dalis_and_pillows(by_dali, photo, orientation: int, endian: str):
    for kind in KINDS:
        buffer = io.BytesIO()
        photo(32, 17).save(buffer, kind, exif=with_exif(orientation, endian), quality=95)
        data = buffer.getvalue()
        size = (32, 17) if orientation < 5 else (17, 32)
        upright = by_dali(data, decoded=True)
        assert read_header(data)[1:4] == (*size, orientation)
        pillows = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
        assert np.abs(upright.astype(int) - pillows).mean() < 1


def test_dali_does_not_find_exif_after_a_chunk_of_odd_size(by_dali, encoded):
    pixels = encoded(32, 17, kind="webp")[12:]
    exif = riff_chunk(b"EXIF", b"II*\0\x08\0\0\0\1\0" + struct.pack("<HHII", 0x0112, 3, 1, 6))
    even = webp_of(32, 17, 8, riff_chunk(b"ICCP", b"even"), pixels, exif)
    assert read_header(even)[1:3] == by_dali(even) == (17, 32)
    odd = webp_of(32, 17, 8, riff_chunk(b"ICCP", b"odd"), pixels, exif)
    assert reason(odd) == "header"
    with pytest.raises(RuntimeError):
        by_dali(odd)


def test_odd_exif_is_read_as_dali_reads_it(by_dali, encoded):
    """Each block of these, put into a JPEG, a PNG and a WebP of 32 x 17."""
    upright_tag, sideways_tag = (struct.pack("<HHIHH", 0x0112, 3, 1, value, 0) for value in (1, 6))
    outside = struct.pack("<HHII", 0x010F, 2, 999, 60_000)
    start = b"II*\0\x08\0\0\0"
    blocks = {
        "sideways": start + b"\1\0" + sideways_tag,
        "the first of two tags": start + b"\2\0" + sideways_tag + upright_tag,
        "then a tag outside": start + b"\2\0" + sideways_tag + outside,
        "a tag outside, then": start + b"\2\0" + outside + sideways_tag,
        "cut after its value": start + b"\1\0" + sideways_tag[:-2],
        "cut in its value": start + b"\1\0" + sideways_tag[:-3],
        "more entries than there are": start + b"\xff\xff" + sideways_tag,
        "no entries": start + b"\0\0",
        "another mark": b"II+\0" + start[4:] + b"\1\0" + sideways_tag,
        "another byte order": b"MM" + start[2:] + b"\1\0" + sideways_tag,
        "a prefix": b"Exif\0\0" + start + b"\1\0" + sideways_tag,
        "zero": start + b"\1\0" + struct.pack("<HHII", 0x0112, 3, 1, 0),
        "nine": start + b"\1\0" + struct.pack("<HHII", 0x0112, 3, 1, 9),
        "a long": start + b"\1\0" + struct.pack("<HHII", 0x0112, 4, 1, 6),
        "far away": b"II*\0\xff\xff\xff\xff",
        "empty": b"",
        "one byte": b"I",
    }
    jpeg, png, webp = (encoded(32, 17, kind=kind) for kind in KINDS)
    sizes = {}
    for name, block in blocks.items():
        chunk = png_chunk(b"eXIf", block)
        in_jpeg = jpeg[:2] + segment(0xE1, b"Exif\0\0" + block) + jpeg[2:]
        in_png, late = png[:33] + chunk + png[33:], png[:-12] + chunk + png[-12:]
        in_webp = webp_of(32, 17, 8, webp[12:], riff_chunk(b"EXIF", block))
        for data in (in_jpeg, in_png, late, in_webp):
            assert read_header(data)[1:3] == by_dali(data), name
        sizes[name] = read_header(in_jpeg)[1:3]
    sideways = {"sideways", "the first of two tags", "a long", "cut after its value"}
    assert {name for name, size in sizes.items() if size == (17, 32)} == sideways


def test_of_several_exif_blocks_dali_takes_the_last(by_dali, encoded):
    first, last = (
        b"II*\0\x08\0\0\0\1\0" + struct.pack("<HHII", 0x0112, 3, 1, value) for value in (1, 6)
    )
    jpeg, png = encoded(32, 17), encoded(32, 17, kind="png")
    for one, two in ((first, last), (last, first)):
        parts = b"".join(segment(0xE1, b"Exif\0\0" + block) for block in (one, two))
        adobe = segment(0xEE, b"Adobe\0\x64\0\0\0\0\1")
        chunks = b"".join(png_chunk(b"eXIf", block) for block in (one, two))
        sof = jpeg.index(b"\xff\xc0") + 19
        for data in (
            jpeg[:2] + parts + jpeg[2:],
            jpeg[:2] + adobe + parts + jpeg[2:],
            jpeg[:sof] + parts + jpeg[sof:],
            png[:33] + chunks + png[33:],
        ):
            assert (
                read_header(data)[1:3] == by_dali(data) == ((17, 32) if two is last else (32, 17))
            )


def test_exif_written_as_text_into_a_png_is_left_alone_as_by_dali(by_dali, photo):
    text = PngImagePlugin.PngInfo()
    exif = with_exif(6).tobytes()
    text.add_text("Raw profile type exif", f"\nexif\n{len(exif):8}\n{exif.hex()}")
    buffer = io.BytesIO()
    photo(32, 17).save(buffer, "png", pnginfo=text)
    assert read_header(buffer.getvalue())[1:3] == by_dali(buffer.getvalue()) == (32, 17)


SMALL = (*range(11), 42, 0x49, 0x4D, 0x7F, 0x80, 0xC0, 0xC4, 0xD8, 0xD9, 0xDA, 0xE1, 0xFE, 0xFF)


def mutated(data: bytes, dice: random.Random) -> bytes:
    """A few bytes of it changed, lost, added or repeated, near its start or in its EXIF."""
    found = bytearray(data)
    exif = max(found.find(b"II*\0"), found.find(b"MM\0*"))
    for _ in range(dice.choice((1, 1, 1, 2, 3, 6))):
        at = dice.randrange(min(len(found), dice.choice((40, 200, 500, len(found)))))
        if exif > 0 and dice.random() < 0.5:
            at = min(exif + dice.randrange(130), len(found) - 1)
        what = dice.random()
        if what < 0.4:
            found[at] = dice.choice(SMALL)
        elif what < 0.5:
            found[at] ^= 1 << dice.randrange(8)
        elif what < 0.6 and len(found) > 40:
            del found[at : at + dice.randrange(1, 9)]
        elif what < 0.75:
            found[at:at] = bytes(dice.choices(SMALL, k=dice.randrange(1, 5)))
        elif what < 0.95:
            start = dice.randrange(len(found))
            found[at:at] = found[start : start + dice.randrange(2, 60)]
        else:
            del found[dice.randrange(30, max(31, len(found))) :]
    if found.startswith(b"\x89PNG") and dice.random() < 0.8:
        found[29:33] = struct.pack(">I", zlib.crc32(found[12:29]))
    return bytes(found)


@pytest.mark.parametrize("count", [8000, pytest.param(400_000, marks=pytest.mark.slow)])
def test_what_is_taken_dali_takes_too_with_the_same_size(by_dali, encoded, monkeypatch, count):
    """Mutants of all kinds of files. It matters: one image that DALI's parser refuses can end the
    process inside a large batch."""
    monkeypatch.setattr(header, "MIN_SIDE", 1)
    dice = random.Random(count)
    whole = [encoded(31, 17, progressive=True)]
    for kind, mode in (
        *(("jpeg", mode) for mode in ("RGB", "L", "CMYK")),
        *(("png", mode) for mode in ("RGB", "P", "RGBA")),
        *(("webp", mode) for mode in ("RGB", "RGBA")),
    ):
        whole.append(encoded(31, 17, 0, kind, mode))
        for orientation, endian in ((6, "<"), (8, ">"), (3, ">")):
            exif = with_exif(orientation, endian)
            whole.append(encoded(31, 17, 0, kind, mode, exif=exif))
    taken = sideways = 0
    for _ in range(count):
        data = mutated(dice.choice(whole), dice)
        try:
            found = read_header(data)
        except BadImage:
            continue
        assert (found.width, found.height) == by_dali(data), data.hex()
        taken += 1
        sideways += found.orientation > 4
    assert taken > count / 5 and sideways > count / 20


def test_odd_images_are_judged_without_a_crash(by_dali, data_folder):
    """What is taken has DALI's size, and Pillow's if it opens it; the rest a reason."""
    reasons = {}
    for file in sorted((data_folder / "odd_images").glob("*/*")):
        data = file.read_bytes()
        try:
            found = read_header(data)
        except BadImage as bad:
            reasons.setdefault(str(bad), set()).add(file.name)
            continue
        assert (found.width, found.height) == by_dali(data), file.name
        if file.name != "unknown_compression_method.png":  # that of its colour profile
            with Image.open(file) as image:
                assert {found.width, found.height} == set(image.size), file.name
    assert reasons.pop("format") and reasons == {
        "animated": {"mode_16bit.png", "mode_grayscale_alpha.png", "mode_palette_1bit_alpha.png"},
        "header": {
            "broken.png",
            "jpeg_ff00_header.jpg",
            "monkey12.jpg",
            "oss-fuzz-36829.jpeg",
            "photoshop-200dpi-broken.jpg",
        },
        "truncated": {
            "broken_data_stream.png",
            "truncated.jpg",
            "truncated_end_chunk.png",
            "truncated_image.png",
            "truncated_jpeg.jpg",
            "ultrahdr.jpg",
        },
        "too_small": {
            "blend_transparency.png",
            "issue#2026.png",
            "multiple_exif.jpg",
            "png_decompression_dos.png",
        },
    }
