"""Near-duplicates among the teacher's features.

As SemDeDup has it (Abbas et al., 2023, section 3): k-means parts the samples into buckets, and
within a bucket all are compared. Of two images that are alike and lie on both sides of a border
between buckets, both stay; up to `MOST` samples there is one bucket, and nothing is missed.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.data.permute import permute
from engine.progress import track

__all__ = ["MOST", "buckets", "near_duplicates"]

MOST = 32_768  # samples of a bucket, all of which are compared with each other
_LOOKED_AT = 1 << 17  # samples that k-means goes by
_ROUNDS = 10  # of k-means
_TILE = 2048
_TILE_NUMBERS = 1 << 25  # of a product with the centroids


def near_duplicates(
    features: np.ndarray, ordered: np.ndarray, least: float, device: torch.device, most: int = MOST
) -> tuple[np.ndarray, np.ndarray]:
    """Which of some samples are too like others. `features`: unit rows [samples, X]; `ordered`:
    rows of it int64 [n], those that are to stay rather first.

    Taken in this order, a sample stays unless its cosine to one that stays is `least` or more: so
    each that goes has its like among those that stay, and no chain of ever less similar images goes
    for the sake of one. Gives, in this order, the row of the nearest that stays and comes before
    int64 [n], but of one that stays its own; and the cosine to that nearest fp32 [n], -1 for the
    first of a bucket.
    """
    originals, nearest = ordered.copy(), np.full(len(ordered), -1, np.float32)
    for places in track(buckets(features, ordered, device, most), "comparing"):
        originals[places], nearest[places] = _within(features, ordered[places], least, device)
    return originals, nearest


def buckets(
    features: np.ndarray, rows: np.ndarray, device: torch.device, most: int = MOST
) -> Iterator[np.ndarray]:
    """Places in `rows` int64, ascending, parted into buckets of up to `most`; of more only where
    k-means cannot part them, since they are all alike."""
    whole = [np.arange(len(rows))]
    while whole:
        places = whole.pop()
        if len(places) <= most:
            yield places
            continue
        numbers = _nearest(features, rows[places], _centroids(features, rows[places], most, device))
        order = np.argsort(numbers, kind="stable")
        borders = np.flatnonzero(np.diff(numbers[order])) + 1
        parts = np.split(places[order], borders)
        if max(map(len, parts)) > 0.9 * len(places):
            yield places
        else:
            whole += parts


def _within(
    features: np.ndarray, rows: np.ndarray, least: float, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """near_duplicates() of one bucket: tile by tile against those that stay."""
    originals, nearest = rows.copy(), np.full(len(rows), -1, np.float32)
    staying: list[tuple[Tensor, np.ndarray]] = []  # features of each tile, and their rows
    for start in range(0, len(rows), _TILE):
        tile = rows[start : start + _TILE]
        u_nX = _rows(features, tile, device)
        best, like = np.full(len(tile), -1, np.float32), tile.copy()
        for known_kX, known in staying:
            _improve(best, like, u_nX @ known_kX.T, known)
        before_nn = torch.ones(len(tile), len(tile), dtype=torch.bool, device=device).tril(-1)
        cosines_nn = (u_nX @ u_nX.T).masked_fill(~before_nn, -2)
        alike = (cosines_nn >= least).cpu().numpy()
        stays = best < least
        for row in np.flatnonzero(stays & alike.any(axis=1)):
            stays[row] = not (alike[row] & stays).any()
        there = torch.from_numpy(stays).to(device)
        _improve(best, like, cosines_nn.masked_fill(~there, -2), tile)
        originals[start : start + _TILE] = np.where(stays, tile, like)
        nearest[start : start + _TILE] = best
        if stays.any():
            staying.append((u_nX[there], tile[stays]))
    return originals, nearest


def _improve(best: np.ndarray, like: np.ndarray, cosines_nk: Tensor, known: np.ndarray) -> None:
    """Takes the larger of the best cosines up to now, and of those to the rows `known`."""
    cosines, places = (column.cpu().numpy() for column in cosines_nk.max(dim=1))
    better = cosines > best
    best[better], like[better] = cosines[better], known[places[better]]


def _centroids(features: np.ndarray, rows: np.ndarray, most: int, device: torch.device) -> Tensor:
    """Unit rows [K, X] of spherical k-means, for buckets of half of `most` on average."""
    number, size = -(-2 * len(rows) // most), min(len(rows), _LOOKED_AT)
    few = rows[permute(np.arange(size), len(rows), len(rows))]
    u_nX = _rows(features, few, device)
    centroids_KX = u_nX[:number].clone()
    for _ in range(_ROUNDS):
        # In fp64, so that the order in which a GPU adds does not count.
        sums_KX = torch.zeros_like(centroids_KX, dtype=torch.float64)
        for part_nX in u_nX.split(_tile(number)):
            nearest_n = (part_nX @ centroids_KX.T).argmax(1)
            sums_KX.index_add_(0, nearest_n, part_nX.double())
        means_KX = F.normalize(sums_KX, dim=-1).float()
        centroids_KX = torch.where(sums_KX.any(-1, keepdim=True), means_KX, centroids_KX)
    return centroids_KX


def _nearest(features: np.ndarray, rows: np.ndarray, centroids_KX: Tensor) -> np.ndarray:
    """The number of the nearest centroid, int64 [n]."""
    size = _tile(len(centroids_KX))
    found = np.empty(len(rows), np.int64)
    for start in range(0, len(rows), size):
        u_nX = _rows(features, rows[start : start + size], centroids_KX.device)
        found[start : start + size] = (u_nX @ centroids_KX.T).argmax(1).cpu().numpy()
    return found


def _tile(columns: int) -> int:
    """Rows that are multiplied at once."""
    return max(1, min(_TILE, _TILE_NUMBERS // columns))


def _rows(features: np.ndarray, rows: np.ndarray, device: torch.device) -> Tensor:
    """Unit rows fp32 on the device."""
    return F.normalize(torch.from_numpy(features[rows]).to(device).float(), dim=-1)
