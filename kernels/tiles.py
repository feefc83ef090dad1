"""Images a few at a time, so that of their logits there is never more than a tile."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

__all__ = ["by_tiles", "tiles"]

# Logits of one side. On CPUs products want a few hundred rows, lest packing W costs more than they
# do, and what goes through logits number by number wants these in a core's cache.
PRODUCT, CPU_PRODUCT, CPU_CACHE = 2**24, 2**22, 2**18


def tiles(images: int, classes: int, device: torch.device, cached: bool = False) -> Iterator[slice]:
    """Slices of the images, whose logits are a tile: for a product, or for a core's cache. One
    that is empty if there are none."""
    logits = PRODUCT if device.type != "cpu" else CPU_CACHE if cached else CPU_PRODUCT
    parts = -(-images // max(1, logits // classes))
    size = max(1, -(-images // max(1, parts)))  # equal, since small products are slow
    for start in range(0, max(1, images), size):
        yield slice(start, min(start + size, images))


def by_tiles(
    work: Callable[..., tuple[Tensor, ...]], w_ND: Tensor, sides: int, *columns: Tensor | None
) -> tuple[Tensor, ...]:
    """What `work` gives of a tile's rows of all columns, and memory for the logits of so many
    sides [sides * R, N], put together again."""
    told: list[tuple[Tensor, ...]] = []
    memory = w_ND.new_empty(0)
    first = columns[0]
    assert first is not None
    for rows in tiles(len(first), len(w_ND), w_ND.device):
        size = sides * (rows.stop - rows.start)
        if not told:
            memory = w_ND.new_empty(size, len(w_ND))
        parts = (column if column is None else column[rows] for column in columns)
        told.append(work(memory[:size], *parts))
    if len(told) == 1:
        return told[0]
    return tuple(torch.cat(parts) for parts in zip(*told, strict=True))
