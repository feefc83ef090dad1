"""Loaders of photos: ours and its peers, from the same shards, with the same work.

The work is a random resized crop (area 0.08 to 1, bicubic, antialiased) to 224 x 224 and a fair
flip, as batches of bytes. A provider is started once, with its processes and threads; each call of
what it gives then loads all photos `passes` times, from the first read to the last batch.
"""

import importlib
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import islice

import numpy as np
import torch
import webdataset as wds
from photos import Photos
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2

from engine.data import turbojpeg
from engine.data.batches import training_works
from engine.data.corpus import Corpus
from engine.data.decode import Decoder
from engine.data.loader import Loader, Work
from engine.data.order import Order
from engine.data.views import ViewPolicy

PIXELS = 224
AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
LANES, WINDOW_BLOCKS = 4, 4
MOST_BYTES = 1 << 30

Load = Callable[[], Iterator[Tensor]]  # batches [B, 3, S, S], or [B, S, S, 3] of a peer


def corpus_and_works(photos: Photos, passes: int, batch: int) -> tuple[Corpus, list[Work]]:
    """Blocks are whole shards, and every pass is of another view, as in training."""
    corpus = Corpus.open(str(photos.folder), photos.images // len(photos.shards))
    window = WINDOW_BLOCKS * corpus.blocks.block_samples
    order = Order(corpus.blocks, LANES, batch, window, seed=1)
    return corpus, list(training_works(order, passes, passes, 0, 1, 0))


def ours(photos: Photos, passes: int, batch: int, threads: int) -> Load:
    corpus, works = corpus_and_works(photos, passes, batch)
    decoder = Decoder(ViewPolicy(1, PIXELS), "cpu", threads, batch)

    def load() -> Iterator[Tensor]:
        loader = Loader(corpus, decoder, works, MOST_BYTES)
        for made in loader:
            yield made.images_BCHW
        loader.close()

    return load


def ours_decode(photos: Photos, passes: int, batch: int, threads: int) -> Load:
    """Our decoder alone: the same views of the same samples, which are in memory."""
    corpus, works = corpus_and_works(photos, passes, batch)
    decoder = Decoder(ViewPolicy(1, PIXELS), "cpu", threads, batch)
    blocks = [corpus.read(block) for block in range(len(corpus.blocks))]
    batches = [
        (
            work.view,
            [
                blocks[block][offset] if valid else None
                for block, offset, valid in zip(*work.share, strict=True)
            ],
        )
        for work in works
    ]

    def load() -> Iterator[Tensor]:
        for view, samples in batches:
            yield decoder.decode(samples, view)[0]

    return load


def webdataset_pil(photos: Photos, passes: int, batch: int, threads: int) -> Load:
    dataset = wds.WebDataset(photos.shards * passes, shardshuffle=False).decode("pil")
    crop = v2.Compose([*_crop_and_flip(), v2.PILToTensor()])
    return _by_workers(dataset.to_tuple("jpg").map_tuple(crop), batch, threads)


def torchvision(photos: Photos, passes: int, batch: int, threads: int) -> Load:
    """Its JPEG decoder and transforms of tensors; webdataset reads the shards."""
    dataset = wds.WebDataset(photos.shards * passes, shardshuffle=False)
    crop = v2.Compose([_decoded, *_crop_and_flip()])
    return _by_workers(dataset.to_tuple("jpg").map_tuple(crop), batch, threads)


def dali(photos: Photos, passes: int, batch: int, threads: int) -> Load:
    """Decodes no more than the crop, as ours does; its views are not copied to tensors."""
    from nvidia.dali import fn, pipeline_def, types

    depth = 2

    @pipeline_def(
        batch_size=batch, num_threads=threads, device_id=None, seed=1, prefetch_queue_depth=depth
    )
    def pipeline():
        jpeg = fn.readers.webdataset(
            paths=photos.shards,
            index_paths=[shard.replace(".tar", ".idx") for shard in photos.shards],
            ext=["jpg"],
        )
        crop = fn.decoders.image_random_crop(
            jpeg, output_type=types.RGB, random_area=AREA, random_aspect_ratio=RATIO
        )
        view = fn.resize(
            crop, size=[PIXELS, PIXELS], interp_type=types.INTERP_CUBIC, antialias=True
        )
        return fn.flip(view, horizontal=fn.random.coin_flip())

    built = pipeline()
    built.build()
    batches = photos.images * passes // batch

    def load() -> Iterator[Tensor]:
        for _ in range(min(depth, batches)):  # what run() does, but nothing for the next call
            built.schedule_run()
        for made in range(batches):
            (views,) = built.share_outputs()
            yield torch.from_dlpack(views.as_tensor())
            built.release_outputs()
            if made + depth < batches:
                built.schedule_run()

    return load


def spdl(photos: Photos, passes: int, batch: int, threads: int) -> Load:
    """FFmpeg decodes, cuts and resizes (swscale's bicubic), in threads of one process."""
    from spdl import io
    from spdl.pipeline import PipelineBuilder

    generator = np.random.default_rng(1)

    def members() -> Iterator[bytes]:
        for shard in photos.shards * passes:
            with open(shard, "rb") as file:
                for _, jpeg in io.iter_tarfile(file):
                    yield jpeg

    def view(jpeg: bytes) -> "io.ImageFrames":
        packets = io.demux_image(jpeg)
        x, y, w, h = _window(packets.width, packets.height, generator)
        flip = "hflip," if generator.random() < 0.5 else ""
        size = f"{PIXELS}:{PIXELS}"
        chain = f"crop={w}:{h}:{x}:{y}:exact=1,scale={size}:flags=bicubic,{flip}format=rgb24"
        return io.decode_packets(packets, filter_desc=chain)

    def load() -> Iterator[Tensor]:
        stages = PipelineBuilder().add_source(members()).pipe(view, concurrency=threads)
        stages = stages.aggregate(batch).pipe(io.convert_frames).add_sink(2)
        with (pipeline := stages.build(num_threads=threads)).auto_stop():
            for made in pipeline:
                yield io.to_torch(made)

    return load


def versions() -> str:
    """Of what the peers are made of; DALI's is told by every row."""
    packages = ["webdataset", "torchvision", "pillow"]
    packages += [] if why_no_spdl() else ["spdl-core", "spdl-io"]
    return " ".join(f"{package}={version(package)}" for package in packages)


def why_not(provider: str) -> str:
    """Why a provider cannot take part, "" if it can."""
    if provider == "spdl":
        return why_no_spdl()
    if provider == "dali":
        return why_no_dali()
    if provider.startswith("ours") and turbojpeg.library() is None:
        return why_no_dali() and "there is neither TurboJPEG (the package turbojpeg) nor DALI"
    return ""


def why_no_dali() -> str:
    """Why DALI cannot take part, "" if it can."""
    try:
        importlib.import_module("nvidia.dali")
    except ImportError as error:
        return str(error)
    return ""


def why_no_spdl() -> str:
    """Why SPDL cannot take part, "" if it can. It needs the packages spdl-core and spdl-io, and
    FFmpeg's shared libraries where the loader finds them (LD_LIBRARY_PATH)."""
    try:
        importlib.import_module("spdl.pipeline")
        importlib.import_module("spdl.io").demux_config()  # has FFmpeg loaded
    except (ImportError, RuntimeError) as error:
        return str(error).split(",", 1)[0]
    return ""


def _crop_and_flip() -> list[v2.Transform]:
    bicubic = v2.InterpolationMode.BICUBIC
    crop = v2.RandomResizedCrop(PIXELS, AREA, RATIO, interpolation=bicubic, antialias=True)
    return [crop, v2.RandomHorizontalFlip()]


def _decoded(jpeg: bytes) -> Tensor:
    return decode_jpeg(torch.frombuffer(bytearray(jpeg), dtype=torch.uint8), ImageReadMode.RGB)


def _by_workers(dataset: wds.WebDataset, batch: int, workers: int) -> Load:
    loader = wds.WebLoader(
        dataset.batched(batch), batch_size=None, num_workers=workers, persistent_workers=True
    )

    def load() -> Iterator[Tensor]:
        for (views,) in loader:
            yield views

    return load


def _window(width: int, height: int, generator: np.random.Generator) -> tuple[int, int, int, int]:
    """The random resized crop: left, top, width and height."""

    def tries() -> Iterator[tuple[int, int]]:
        while True:
            area = width * height * generator.uniform(*AREA)
            ratio = np.exp(generator.uniform(*np.log(RATIO)))
            yield round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))

    fitting = ((w, h) for w, h in islice(tries(), 10) if w <= width and h <= height)
    w, h = next(fitting, (min(width, height), min(width, height)))
    return int(generator.integers(width - w + 1)), int(generator.integers(height - h + 1)), w, h
