"""Shards of photos, as large as a camera's, for the benchmarks of reading and decoding.

Made of the sixteen small photos in $PROMPTKD_DATA/imagenet_stubs: enlarged bicubically, with grain
that makes a JPEG of quality 90 as large as a camera's. Without them, of drawn pictures.
"""

import io
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import webdataset as wds
from PIL import Image

QUALITY = 90
GRAIN = 10  # steps of luminance, uniform


@dataclass(frozen=True)
class Photos:
    """Indexed shards in a folder of their own."""

    folder: Path
    images: int
    config: dict[str, object]  # what a row of results tells of them

    @property
    def shards(self) -> list[str]:
        return sorted(map(str, self.folder.glob("*.tar")))


def photos(folder: Path, size: tuple[int, int], images: int, shards: int) -> Photos:
    """Draws photos of this size and packs them in so many shards."""
    return packed(folder, size, draw(size, images), shards)


def draw(size: tuple[int, int], images: int) -> list[bytes]:
    """JPEGs of (width, height), each of its own grain."""
    originals = [original.resize(size, Image.Resampling.BICUBIC) for original in _originals()]
    return [_jpeg(originals[i % len(originals)], i) for i in range(images)]


def packed(folder: Path, size: tuple[int, int], jpegs: Sequence[bytes], shards: int) -> Photos:
    """Packs JPEGs of about this size in so many shards of equal length."""
    from engine.index import index  # which needs more than drawing does

    folder.mkdir(parents=True)
    each = -(-len(jpegs) // shards)
    for shard in range(shards):
        with wds.TarWriter(str(folder / f"{shard:06d}.tar"), mtime=0) as tar:
            for i, jpeg in enumerate(jpegs[shard * each : (shard + 1) * each]):
                tar.write({"__key__": f"{shard * each + i:08d}", "jpg": jpeg})
    index(str(folder), workers=1)
    config: dict[str, object] = {
        "pixels": "x".join(map(str, size)),
        "images": len(jpegs),
        "kB": round(sum(map(len, jpegs)) / len(jpegs) / 1000, 1),
        "jpeg": f"quality {QUALITY}, 4:2:0",
        "of": "photos" if _stubs() else "drawn pictures",
    }
    return Photos(folder, len(jpegs), config)


def flipped(jpeg: bytes, seed: int, bits: int = 16) -> bytes:
    """With some bits of the second half turned over: of a photo, that is its scan."""
    damaged, generator = bytearray(jpeg), np.random.default_rng(seed)
    for at in generator.integers(len(jpeg) // 2, len(jpeg) - 2, bits):
        damaged[at] ^= 1 << int(generator.integers(8))
    return bytes(damaged)


def flip_inside(shard: Path, name: str, seed: int) -> None:
    """The same to a file in a shard, where it lies."""
    with tarfile.open(shard) as tar:
        member = tar.getmember(name)
    with open(shard, "r+b") as file:
        file.seek(member.offset_data)
        jpeg = file.read(member.size)
        file.seek(member.offset_data)
        file.write(flipped(jpeg, seed))


def _jpeg(picture: Image.Image, seed: int) -> bytes:
    pixels_HWC = np.asarray(picture).astype(np.int16)
    grain_HW1 = np.random.default_rng(seed).integers(-GRAIN, GRAIN + 1, (*pixels_HWC.shape[:2], 1))
    grained = Image.fromarray((pixels_HWC + grain_HW1).clip(0, 255).astype(np.uint8))
    file = io.BytesIO()
    grained.save(file, "jpeg", quality=QUALITY, subsampling="4:2:0")
    return file.getvalue()


def _originals() -> list[Image.Image]:
    if stubs := _stubs():
        return [Image.open(stub).convert("RGB") for stub in stubs]
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (16, 24, 24, 3), np.uint8)
    return [Image.fromarray(cells).resize((299, 299), Image.Resampling.BICUBIC) for cells in coarse]


def _stubs() -> list[Path]:
    data = os.environ.get("PROMPTKD_DATA")
    return sorted(Path(data, "imagenet_stubs").glob("*.jpg")) if data else []
