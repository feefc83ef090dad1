"""Which crop and flip of an image a view is: pure functions of (seed, view number, sample).

Random numbers come from a counter-based generator, Philox4x32-10 (Salmon et al., SC 2011), so
teacher and student, on whatever machine, draw the same view of a sample without talking.
Windows are in pixels of the upright image (EXIF orientation applied).
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

__all__ = [
    "RULES",
    "TEST_VIEW",
    "ViewPolicy",
    "Windows",
    "on_grid",
    "philox",
    "test_windows",
    "train_windows",
]

# To be raised where a change of this file, of cropping or of decoding changes pixels: recorded
# labels belong to the pixels that they were made of.
RULES = 1
TEST_VIEW = -1  # the view number of the deterministic test view
_TRIES = 10
_LARGE, _GRID = 448, 8  # pixels: of twice CLIP's usual view; what a JPEG decoder shrinks by at most
_LOW = np.uint64(0xFFFFFFFF)


@dataclass(frozen=True)
class ViewPolicy:
    """What all views of a run have in common. `pixels` is the side of the square they become."""

    seed: int
    pixels: int
    crop_scale: float = 0.08

    def windows(
        self, view: int, shard_B: np.ndarray, position_B: np.ndarray, size_B2: np.ndarray
    ) -> "Windows":
        """Windows of view number `view`, or TEST_VIEW, of B samples of upright (w, h)."""
        if view == TEST_VIEW:
            return test_windows(size_B2, self.pixels)
        drawn = train_windows(self.seed, view, shard_B, position_B, size_B2, self.crop_scale)
        return Windows(on_grid(drawn.xywh_B4), drawn.flip_B)


class Windows(NamedTuple):
    """Crops of B upright images, to be resized to the view's square and mirrored where `flip`."""

    xywh_B4: np.ndarray  # float64: left, top, width, height in pixels
    flip_B: np.ndarray  # bool
    bleeds: bool = False  # resized first, cropped after: pixels around the window shine through


def philox(counter_B4: np.ndarray, key: int) -> np.ndarray:
    """Philox4x32-10: four 32-bit words, uint64 [B, 4], of each counter and a 64-bit key."""
    c0, c1, c2, c3 = (counter_B4[:, i].astype(np.uint64) & _LOW for i in range(4))
    k0, k1 = np.uint64(key & 0xFFFFFFFF), np.uint64(key >> 32 & 0xFFFFFFFF)
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (
            (p1 >> np.uint64(32)) ^ c1 ^ k0,
            p1 & _LOW,
            (p0 >> np.uint64(32)) ^ c3 ^ k1,
            p0 & _LOW,
        )
        k0, k1 = k0 + np.uint64(0x9E3779B9) & _LOW, k1 + np.uint64(0xBB67AE85) & _LOW
    return np.stack([c0, c1, c2, c3], axis=1)


def train_windows(
    seed: int,
    view: int,
    shard_B: np.ndarray,
    position_B: np.ndarray,
    size_B2: np.ndarray,
    crop_scale: float,
) -> Windows:
    """RandomResizedCrop (scale crop_scale..1, ratio 3/4..4/3, as torchvision's) and a fair flip."""
    n = len(position_B)
    counter = np.zeros((_TRIES + 1, n, 4), np.uint64)
    counter[..., 0] = np.arange(_TRIES + 1)[:, None]
    counter[..., 1] = view
    counter[..., 2] = shard_B
    counter[..., 3] = position_B
    words = philox(counter.reshape(-1, 4), seed).reshape(_TRIES + 1, n, 4)
    u_area, u_ratio, u_x, u_y = np.moveaxis(words[:_TRIES] / 2.0**32, -1, 0)

    width, height = size_B2[:, 0], size_B2[:, 1]
    area = width * height * (crop_scale + (1 - crop_scale) * u_area)
    ratio = np.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * u_ratio)
    w = np.rint(np.sqrt(area * ratio)).astype(np.int64)
    h = np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (w > 0) & (h > 0) & (w <= width) & (h <= height)
    x = np.floor(u_x * (width - w + 1)).astype(np.int64)
    y = np.floor(u_y * (height - h + 1)).astype(np.int64)

    tries = np.stack([x, y, w, h], axis=-1)
    drawn = tries[fits.argmax(axis=0), np.arange(n)]
    windows = np.where(fits.any(axis=0)[:, None], drawn, _central(width, height))
    return Windows(windows.astype(np.float64), words[_TRIES, :, 0] >= 2**31)


def on_grid(xywh_B4: np.ndarray) -> np.ndarray:
    """Large windows, laid on a grid of 8 pixels: where a JPEG decoder shrinks by 2, 4 or 8, their
    edges are still between pixels. Whatever the view's size: teacher and student may differ."""
    large = xywh_B4[:, 2:].min(axis=1) >= _LARGE
    return np.where(large[:, None], xywh_B4 // _GRID * _GRID, xywh_B4)


def _central(width: np.ndarray, height: np.ndarray) -> np.ndarray:
    """torchvision's fallback: the largest central window whose ratio is in bounds."""
    w = np.minimum(width, np.rint(height * 4 / 3).astype(np.int64))
    h = np.minimum(height, np.rint(width / (3 / 4)).astype(np.int64))
    return np.stack([(width - w) // 2, (height - h) // 2, w, h], axis=-1)


def test_windows(size_B2: np.ndarray, pixels: int) -> Windows:
    """CLIP's test transform, shorter side to `pixels` and then the centre crop, as one window.

    The crop is cut out of the resized image at whole pixels there, hence at fractions here.
    """
    width, height = size_B2[:, 0], size_B2[:, 1]
    shorter = np.minimum(width, height)
    # torchvision's Resize truncates the longer side
    resized = np.stack([pixels * width // shorter, pixels * height // shorter], axis=-1)
    corner = np.rint((resized - pixels) / 2)
    scale = size_B2 / resized
    xywh = np.concatenate([corner * scale, pixels * scale], axis=-1)
    return Windows(xywh, np.zeros(len(size_B2), bool), bleeds=True)
