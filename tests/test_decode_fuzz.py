"""engine.data.decode on damaged images: nothing crashes, and no image harms another."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from damage import Draw, mutated, whole_image

from engine.data.corpus import Sample
from engine.data.decode import Decoder
from engine.data.header import BadImage, read_header
from engine.data.views import TEST_VIEW, ViewPolicy

POLICY = ViewPolicy(seed=5, pixels=32)  # small, so that the larger images are shrunk by 2, 4 and 8


def damaged(draw: Draw) -> Iterator[Sample]:
    """Images that are damaged once or twice, as far as their headers are accepted."""
    while True:
        spoilt = mutated(draw)
        try:
            header = read_header(spoilt)
        except BadImage:
            continue
        position = int(draw.integers(1 << 20))
        yield Sample(1, position, memoryview(spoilt), None, None, header=header)


def good(draw: Draw) -> Sample:
    _, data = whole_image(draw)
    position = int(draw.integers(1 << 20))
    return Sample(2, position, memoryview(data), None, None, header=read_header(data))


def fuzz(images: int, seed: int) -> dict[str | None, int]:
    """Decodes that many damaged images, with good ones among them; how many had which reason."""
    draw = np.random.default_rng(seed)
    decoder, alone = Decoder(POLICY, "cpu", 2, batch=8), Decoder(POLICY, "cpu", 1, batch=1)
    neighbours = [good(draw) for _ in range(12)]
    views = (TEST_VIEW, 0, 1, 2)
    wanted = {view: alone.decode(neighbours, view)[0] for view in views}
    source = damaged(draw)
    counted: dict[str | None, int] = {}
    for first in range(0, images, 40):
        batch = [next(source) for _ in range(min(40, images - first))]
        kept = draw.choice(len(neighbours), 4, replace=False).tolist()
        mixed = batch + [neighbours[one] for one in kept]
        order = draw.permutation(len(mixed)).tolist()
        view = int(draw.choice(views))
        images_BCHW, reasons = decoder.decode([mixed[at] for at in order], view)
        for row, at in enumerate(order):
            if at >= len(batch):
                assert reasons[row] is None
                assert torch.equal(images_BCHW[row], wanted[view][kept[at - len(batch)]])
            elif reasons[row] is not None:
                assert not images_BCHW[row].any()
            if at < len(batch):
                counted[reasons[row]] = counted.get(reasons[row], 0) + 1
    decoder.close()
    alone.close()
    return counted


def test_damaged_images_are_pixels_or_a_reason():
    counted = fuzz(600, seed=1)
    assert counted.keys() == {None, "undecodable"} and min(counted.values()) > 60


@pytest.mark.slow
def test_many_damaged_images_are_pixels_or_a_reason():
    assert sum(fuzz(10_000, seed=2).values()) == 10_000
