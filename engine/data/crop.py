"""From an image to a view: which part of it is decoded and, on a CPU, turned and resized.

Parts are (left, top, right, bottom) in whole pixels, the last two exclusive.
"""

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

from engine.data.header import Header
from engine.data.views import Windows

__all__ = [
    "Part", "clip_view", "parts", "put", "shrinkage", "stored_part", "upright", "window_view",
]  # fmt: skip

Part = tuple[int, int, int, int]
Box = tuple[float, float, float, float]

# EXIF orientations: a stored image is transposed, then mirrored, then turned upside down
_TRANSPOSED, _MIRRORED, _UPSIDE_DOWN = (5, 6, 7, 8), (2, 3, 6, 7), (3, 4, 7, 8)


def parts(windows: Windows, size_B2: np.ndarray, pixels: int) -> np.ndarray:
    """What views need of upright images of (width, height), at the least, int64 [B, 4].

    That is their windows; where these bleed, also what lies around as far as the cubic filter
    reaches.
    """
    corner_B2, extent_B2 = windows.xywh_B4[:, :2], windows.xywh_B4[:, 2:]
    margin = 2 * np.maximum(1, extent_B2 / pixels) + 2 if windows.bleeds else 0
    low_B2 = np.maximum(0, np.floor(corner_B2 - margin))
    high_B2 = np.minimum(size_B2, np.ceil(corner_B2 + extent_B2 + margin))
    return np.concatenate([low_B2, high_B2], axis=1).astype(np.int64)


def shrinkage(part: Part, pixels: int) -> int:
    """By how much a JPEG decoder may shrink a part: at most 8, both sides staying >= `pixels`."""
    left, top, right, bottom = part
    shorter = min(right - left, bottom - top)
    return next(factor for factor in (8, 4, 2, 1) if factor == 1 or shorter >= factor * pixels)


def stored_part(part: Part, header: Header) -> Part:
    """Where a part of the upright image lies in the image as it is stored."""
    left, top, right, bottom = part
    if header.orientation in _MIRRORED:
        left, right = header.width - right, header.width - left
    if header.orientation in _UPSIDE_DOWN:
        top, bottom = header.height - bottom, header.height - top
    if header.orientation in _TRANSPOSED:
        left, top, right, bottom = top, left, bottom, right
    return left, top, right, bottom


def upright(stored_HWC: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels turned as EXIF says, as a view of those stored."""
    turned = stored_HWC.swapaxes(0, 1) if orientation in _TRANSPOSED else stored_HWC
    if orientation in _MIRRORED:
        turned = turned[:, ::-1]
    return turned[::-1] if orientation in _UPSIDE_DOWN else turned


def window_view(pixels_HWC: np.ndarray, box: Box, side: int) -> np.ndarray:
    """A box of these pixels (left, top, right, bottom, may be fractions) as a square of `side`.

    Bicubic with antialiasing, like all resizing here, in Pillow's arithmetic for bytes.
    """
    height, width, _ = pixels_HWC.shape
    if box == (0, 0, width, height):
        return _bicubic(pixels_HWC, side, side)
    image = Image.fromarray(np.ascontiguousarray(pixels_HWC))  # slower, but it knows fractions
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC, box))


def clip_view(pixels_HWC: np.ndarray, xywh: np.ndarray, side: int) -> np.ndarray:
    """The window `xywh` of the pixels of a whole image: as CLIP does, all is resized, then cut."""
    height, width, _ = pixels_HWC.shape
    ratio = side / xywh[2:]
    columns, rows = np.rint((width, height) * ratio).astype(int).tolist()
    x, y = np.rint(xywh[:2] * ratio).astype(int).tolist()
    return _bicubic(pixels_HWC, rows, columns)[y : y + side, x : x + side]


def put(view_SSC: np.ndarray, flip: bool, out_SSC: np.ndarray) -> None:
    """Copies a view, mirrored or not. torch's copies and flips would start threads of their own."""
    if not flip:
        out_SSC[...] = view_SSC
        return
    for channel in range(3):  # several times faster than pixel by pixel
        out_SSC[..., channel] = view_SSC[:, ::-1, channel]


def _bicubic(pixels_HWC: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """On the calling thread alone: torch resizes bytes so."""
    pixels_1HWC = torch.from_numpy(np.ascontiguousarray(pixels_HWC))[None]
    pixels_1CHW = pixels_1HWC.permute(0, 3, 1, 2)  # channels_last to torch: a third faster
    small_1CHW = interpolate(pixels_1CHW, (rows, columns), mode="bicubic", antialias=True)
    return small_1CHW[0].permute(1, 2, 0).numpy()
