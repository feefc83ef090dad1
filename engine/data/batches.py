"""Which samples, in which view, come in which batch; and those batches, decoded."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from engine.config import CorpusConfig
from engine.data.corpus import Corpus
from engine.data.decode import Decoder
from engine.data.loader import AHEAD, Batch, Loader, Work
from engine.data.order import Order, Share
from engine.data.views import TEST_VIEW, ViewPolicy

__all__ = ["batches", "test_shares", "training_works"]

_HELD_BYTES = 1 << 30  # of encoded images


def training_works(
    order: Order, passes: int, views: int, rank: int, world: int, start: int
) -> Iterator[Work]:
    """The batches of this rank, from step `start` of the run on."""
    for step in range(start, passes * order.steps):
        pass_, within = divmod(step, order.steps)
        coming = order.coming(pass_, within, rank, world, afresh=step == start)
        soon = tuple((p % views, block) for p, block in coming if p < passes)
        share = order.share(pass_, within, rank, world)
        yield Work("shards", step, pass_ % views, share, soon)


def test_shares(
    corpus: Corpus, blocks: Sequence[int], batch: int
) -> Iterator[tuple[Share, tuple[tuple[int, int], ...]]]:
    """Batches of each block in turn, with the (view, block) that come next."""
    for place, block in enumerate(blocks):
        soon = tuple((TEST_VIEW, other) for other in blocks[place : place + AHEAD])
        for low in range(0, corpus.blocks.at(block).length, batch):
            offsets = np.arange(low, min(low + batch, corpus.blocks.at(block).length))
            yield Share(np.full_like(offsets, block), offsets, np.ones(len(offsets), bool)), soon


def batches(
    corpus: Corpus,
    pixels: int,
    batch: int,
    passes: int | None,
    seed: int,
    crop_scale: float,
    threads: int,
    device: str,
) -> Iterator[Batch]:
    """Batches of uint8 images [B, 3, pixels, pixels] on `device`, decoded by `threads` CPU threads
    while the last one is used.

    With `passes`: every sample once a pass, shuffled, in a new random crop (at least `crop_scale`
    of the image's area) and flip each pass; crops are those of a run of this seed, its order that
    of corpus.lanes = 1. The last batch of a pass is filled up with black images. Without: every
    sample once, in the order of the shards, in CLIP's test view, no batch across two blocks.

    Rows that are no image, or could not be decoded, are black and not in `valid_B`; `reasons` tells
    why.
    """
    where = torch.device(device)
    works: Iterator[Work]
    if passes is None:
        shares = test_shares(corpus, range(len(corpus.blocks)), batch)
        works = (
            Work("shards", step, TEST_VIEW, share, soon)
            for step, (share, soon) in enumerate(shares)
        )
    else:
        window = CorpusConfig.window_blocks * corpus.blocks.block_samples
        works = training_works(
            Order(corpus.blocks, 1, batch, window, seed), passes, passes, 0, 1, 0
        )
    decoder = Decoder(ViewPolicy(seed, pixels, crop_scale), device, threads)
    loader = Loader(corpus, decoder, works, _HELD_BYTES, device=where)
    try:
        yield from loader
    finally:
        loader.close()
        decoder.close()
