"""The child process of `thumbnails`: encoded images in, small JPEGs out. Run as a script.

It imports Pillow and nothing of ours, so it is there in a tenth of a second. An image that crashes
or hangs a decoder costs this process, which its parent starts again behind that image. Limits of
processor time and memory are its own. What comes in was checked by its parent: digest, magic bytes,
header, size.

On standard input, image by image: its length and its orientation (EXIF's, 1 to 8), each of 4 bytes,
big end first, then its bytes. On standard output, in the same order: a length and a JPEG, or a
length of 0 for what cannot be decoded.
"""

import io
import resource
import struct
import sys
import warnings

from PIL import Image

SIDE = 96  # pixels, at most
MOST_PIXELS = 100_000_000
_CPU_S, _MEMORY_BYTES = 20, 2 << 30
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def shrunk(data: bytes, orientation: int) -> bytes:
    """A small JPEG, upright; empty where the image cannot be decoded."""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
            if image.width * image.height > MOST_PIXELS:
                return b""
            image.draft("RGB", (2 * SIDE, 2 * SIDE))  # a JPEG's decoder shrinks it for nothing
            small = image.convert("RGBA") if image.has_transparency_data else image.convert("RGB")
            small.thumbnail((SIDE, SIDE))
    except (OSError, ValueError, SyntaxError, MemoryError, struct.error, EOFError):
        return b""  # what Pillow raises of damaged images
    if orientation in _TURNS:
        small = small.transpose(_TURNS[orientation])
    if small.mode == "RGBA":
        ground = Image.new("RGBA", small.size, "white")
        small = Image.alpha_composite(ground, small).convert("RGB")
    out = io.BytesIO()
    small.save(out, "JPEG", quality=72)
    return out.getvalue()


def main() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_S, _CPU_S))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore")
    questions, answers = sys.stdin.buffer, sys.stdout.buffer
    while head := questions.read(8):
        size, orientation = struct.unpack(">II", head)
        answer = shrunk(questions.read(size), orientation)
        answers.write(struct.pack(">I", len(answer)) + answer)
        answers.flush()


if __name__ == "__main__":
    main()
