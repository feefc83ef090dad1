"""Images a few at a time."""

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels import tiles as module
from kernels.tiles import by_tiles, tiles

CPU = torch.device("cpu")


@given(st.integers(0, 5000), st.integers(1, 3_000_000), st.booleans())
def test_tiles_are_equal_and_hold_all_images_once(images, classes, cached):
    found = list(tiles(images, classes, CPU, cached))
    assert found[0].start == 0 and found[-1].stop == images
    assert all(a.stop == b.start for a, b in pairwise(found))
    sizes = [rows.stop - rows.start for rows in found]
    logits = module.CPU_CACHE if cached else module.CPU_PRODUCT
    assert max(sizes) * classes <= max(logits, classes)
    assert len(set(sizes[:-1])) <= 1 and sizes[-1] <= sizes[0]
    assert images == 0 or min(sizes) > 0


def test_what_tiles_give_is_put_together(monkeypatch):
    monkeypatch.setattr(module, "CPU_PRODUCT", 30)
    seen = []

    def work(memory, x_RD, weight_R):
        assert weight_R is None
        seen.append((memory.shape, memory.data_ptr()))
        return x_RD.sum(-1), 2 * x_RD

    x_BD = torch.arange(28.0).view(14, 2)
    sums_B, doubles_BD = by_tiles(work, torch.ones(10, 2), 2, x_BD, None)
    assert torch.equal(sums_B, x_BD.sum(-1)) and torch.equal(doubles_BD, 2 * x_BD)
    assert {shape for shape, _ in seen} == {(6, 10), (4, 10)}  # 14 images, 3 at a time
    assert len({place for _, place in seen}) == 1
