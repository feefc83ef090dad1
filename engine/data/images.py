"""Images by their names: files, folders of them, indexed shards; read and decoded as they come.

Nothing is listed or read before it is needed, so that a million images take no more memory than a
few batches of them.
"""

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from engine.config import UserError
from engine.data.corpus import Corpus, Sample
from engine.data.crop import clip_view
from engine.data.decode import Decoder
from engine.data.header import BadImage, check_format, read_header
from engine.data.manifest import MANIFEST
from engine.data.views import TEST_VIEW, ViewPolicy, test_windows

__all__ = ["Decoded", "Picture", "decoded", "find", "samples", "test_views"]

_HEAD = 65536  # bytes, by which a file that is no image is known
_BLOCK = 64  # samples of a shard that are read at once
Source = Path | Corpus
Picture = str | Path | Image.Image | np.ndarray  # a file, or pixels


class Decoded(NamedTuple):
    """Named images in the test view. Those with a reason could not be decoded, and are black."""

    names: tuple[str, ...]
    images_BCHW: Tensor  # uint8
    reasons: list[str | None]


def find(names: Sequence[str]) -> list[Source]:
    """What lies at these names: files, folders, shards (`.tar`), indexed folders of shards, or
    globs of any. Raises UserError for what is not there, and for shards that are not indexed."""
    return [source for name in names for source in _at(name)]


def _at(name: str) -> Iterator[Source]:
    if os.path.exists(name):
        yield _source(Path(name))
    elif name.endswith(".tar") and glob.has_magic(name):
        yield Corpus.open(name, _BLOCK, "images")
    elif found := sorted(glob.glob(name, recursive=True)):
        yield from (_source(Path(path)) for path in found)
    else:
        raise UserError(f"images: {name}: no such file or folder")


def _source(path: Path) -> Source:
    if path.suffix == ".tar" and path.is_file():
        return Corpus.open(glob.escape(str(path)), _BLOCK, "images")
    if (path / MANIFEST).exists():
        return Corpus.open(str(path), _BLOCK, "images")
    return path


def samples(sources: Sequence[Source]) -> Iterator[tuple[str, Sample]]:
    """The images of `sources` and their names: the path of a file, SHARD.tar/KEY of a sample.

    Folders are walked in the order of names, without hidden files and linked folders. A file that
    cannot be read, or is gone by then, is a sample with a reason.
    """
    for source in sources:
        if isinstance(source, Corpus):
            yield from _of_corpus(source)
        elif source.is_dir():
            yield from _of_folder(source)
        else:
            yield str(source), _read(source)


def _of_corpus(corpus: Corpus) -> Iterator[tuple[str, Sample]]:
    for sample in corpus:
        yield f"{corpus.shards[sample.shard]}/{sample.key}", sample


def _of_folder(folder: Path) -> Iterator[tuple[str, Sample]]:
    for name in sorted(os.listdir(folder)):
        path = folder / name
        if name.startswith(".") or (path.is_symlink() and path.is_dir()):
            continue
        if path.is_dir() or path.is_file() or not path.exists():  # no pipe, no device
            yield from samples([_source(path)])


def _read(file: Path) -> Sample:
    try:
        with open(file, "rb") as opened:
            head = opened.read(_HEAD)
            check_format(head)
            data = memoryview(head + opened.read())
            return Sample(0, 0, data, None, None, header=read_header(data))
    except BadImage as bad:
        return Sample(0, 0, None, str(bad), None)
    except OSError:
        return Sample(0, 0, None, "unreadable", None)


def decoded(named: Iterator[tuple[str, Sample]], decoder: Decoder, batch: int) -> Iterator[Decoded]:
    """Images in batches; the next one is read and decoded on a thread while one is used."""

    def following() -> Decoded | None:
        part = list(islice(named, batch))
        if not part:
            return None
        names, chosen = zip(*part, strict=True)
        return Decoded(names, *decoder.decode(chosen, TEST_VIEW))

    with ThreadPoolExecutor(1, thread_name_prefix="decoder") as thread:
        coming = thread.submit(following)
        while (current := coming.result()) is not None:
            coming = thread.submit(following)
            yield current


def test_views(pictures: Picture | Iterable[Picture], pixels: int, batch: int) -> Iterator[Tensor]:
    """CLIP's test view of pictures, uint8 [B, 3, pixels, pixels], in batches.

    Raises UserError for a file that is not a usable image, and for an array that is not uint8
    [H, W, 3].
    """
    if isinstance(pictures, str | Path | Image.Image | np.ndarray):
        pictures = [pictures]
    coming = iter(pictures)
    decoder = Decoder(ViewPolicy(0, pixels), "cpu", threads=2)
    try:
        while part := list(islice(coming, batch)):
            yield torch.cat([_test_view(picture, decoder) for picture in part])
    finally:
        decoder.close()


def _test_view(picture: Picture, decoder: Decoder) -> Tensor:
    """uint8 [1, 3, S, S]."""
    if isinstance(picture, str | Path):
        images_1CHW, (reason,) = decoder.decode([_read(Path(picture))], TEST_VIEW)
        if reason:
            raise UserError(f"images: {picture} cannot be used ({reason})")
        return images_1CHW
    if isinstance(picture, Image.Image):
        pixels_HWC = np.array(ImageOps.exif_transpose(picture).convert("RGB"))
    else:
        pixels_HWC = np.array(picture)  # a copy, which torch may have
    if pixels_HWC.dtype != np.uint8 or pixels_HWC.ndim != 3 or pixels_HWC.shape[2] != 3:
        raise UserError(
            f"images: an array of {pixels_HWC.dtype} {list(pixels_HWC.shape)}, and was to be of "
            "uint8 [H, W, 3]"
        )
    height, width, _ = pixels_HWC.shape
    side = decoder.policy.pixels
    windows = test_windows(np.array([[width, height]]), side)
    view_SSC = clip_view(pixels_HWC, windows.xywh_B4[0], side)
    return torch.from_numpy(np.ascontiguousarray(view_SSC)).permute(2, 0, 1)[None]
