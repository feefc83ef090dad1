"""Encoded bytes and views to uint8 pixels.

On a CPU, usual JPEGs are decoded by TurboJPEG, as large as the view needs and no further than its
window, and everything else by DALI; torch resizes. On a GPU, DALI does it all.

Every sample comes with its header, which `read_header` has checked. DALI fails a whole batch for
one bad image; such a batch is decoded again one by one, which finds the culprit. A pipeline that
has failed is never used again: a new one takes 10 ms.

Damage is found, and the image refused, where the decoder comes across it: below the window of a
baseline JPEG it does not look. That a JPEG has lost its end is found by its header's reader.
"""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from ctypes import CDLL
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.data import turbojpeg
from engine.data.corpus import Sample
from engine.data.crop import (
    Part,
    clip_view,
    parts,
    put,
    shrinkage,
    stored_part,
    upright,
    window_view,
)
from engine.data.header import MAX_PIXELS, Header
from engine.data.turbojpeg import JpegError, decompress
from engine.data.views import ViewPolicy
from engine.progress import say

if TYPE_CHECKING:
    from nvidia.dali import Pipeline

__all__ = ["Decoder", "jpeg_decoder", "refusal"]


def refusal(sample: Sample | None) -> str | None:
    """Why a sample has no image to decode; None where it has one, and for padding."""
    return None if sample is None or sample.data is not None else sample.reason or "no_image"


class _Wanted(NamedTuple):
    """A view to be decoded into one row of the batch."""

    row: int
    data: memoryview
    header: Header
    part: Part  # of the upright image, to be decoded
    xywh: np.ndarray  # the window, float64
    bleeds: bool
    flip: bool


class Decoder:
    """Decodes views of samples under one policy, on `device` (cpu, cuda or cuda:INDEX).

    `hardware` is the share of JPEGs for a GPU's hardware decoder, if it has one. Not for use by two
    threads at once.
    """

    def __init__(
        self,
        policy: ViewPolicy,
        device: str,
        threads: int,
        batch: int = 64,
        hardware: float = 0.65,
    ) -> None:
        self.policy, self._hardware = policy, hardware
        kind, _, index = device.partition(":")
        self._device = torch.device(kind, int(index or 0)) if kind == "cuda" else torch.device(kind)
        self._turbo = _turbo() if kind == "cpu" else None
        self._threads, self._batch = threads, batch
        self._busy = threading.Lock()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._dali: Pipeline | None = None

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown()
        self._dali = None

    def decode(
        self, samples: Sequence[Sample | None], view: int
    ) -> tuple[Tensor, list[str | None]]:
        """Pixels uint8 [B, 3, S, S] (channels_last) of view number `view`, on the decoder's device,
        and why a sample has none.

        Samples that are None (padding) or cannot be decoded are black; the latter have a reason:
        their own, `no_image` or `undecodable`.
        """
        side = self.policy.pixels
        shape = (len(samples), side, side, 3)
        if self._device.type == "cuda":
            images_BSSC = torch.zeros(shape, dtype=torch.uint8, device=self._device)
        else:  # torch would start threads to write zeros
            images_BSSC = torch.from_numpy(np.zeros(shape, np.uint8))
        return images_BSSC.permute(0, 3, 1, 2), self.decode_into(images_BSSC, samples, view)

    def decode_into(
        self, images_BSSC: Tensor, samples: Sequence[Sample | None], view: int
    ) -> list[str | None]:
        """As decode(), into uint8 [B, S, S, 3], whose rows without an image stay as they are. Gives
        the reasons."""
        free = self._busy.acquire(blocking=False)
        assert free, "a Decoder is not for two threads at once"
        try:
            return self._decode_into(images_BSSC, samples, view)
        finally:
            self._busy.release()

    def _decode_into(
        self, images_BSSC: Tensor, samples: Sequence[Sample | None], view: int
    ) -> list[str | None]:
        reasons = [refusal(sample) for sample in samples]
        by_turbo, by_dali = [], []
        for wanted in self._wanted(samples, view):
            if self._turbo and wanted.header.plain:
                by_turbo.append(wanted)
            else:
                by_dali.append(wanted)

        def turbo(wanted: _Wanted) -> bool:
            return self._by_turbojpeg(wanted, images_BSSC)

        for wanted, good in zip(by_turbo, self._pool.map(turbo, by_turbo), strict=True):
            if not good:
                reasons[wanted.row] = "undecodable"
        for batch in _batches(by_dali, self._batch):
            for row in self._by_dali(batch, images_BSSC):
                reasons[row] = "undecodable"
        return reasons

    def _wanted(self, samples: Sequence[Sample | None], view: int) -> list[_Wanted]:
        chosen, ids, sizes = [], [], []
        for row, sample in enumerate(samples):
            if sample is not None and sample.data is not None:
                assert sample.header is not None, "data come with their header"
                chosen.append((row, sample.data, sample.header))
                ids.append((sample.shard, sample.position))
                sizes.append((sample.header.width, sample.header.height))
        if not chosen:
            return []
        size_B2 = np.array(sizes, np.int64)
        shard_B, position_B = np.array(ids).T
        windows = self.policy.windows(view, shard_B, position_B, size_B2)
        if windows.bleeds and self._device.type == "cpu":
            parts_B4 = np.concatenate([np.zeros_like(size_B2), size_B2], axis=1)  # see clip_view()
        else:
            parts_B4 = parts(windows, size_B2, self.policy.pixels)
        return [
            _Wanted(*one, (left, top, right, bottom), xywh, windows.bleeds, flip)
            for one, (left, top, right, bottom), xywh, flip in zip(
                chosen, parts_B4.tolist(), windows.xywh_B4, windows.flip_B.tolist(), strict=True
            )
        ]

    def _by_turbojpeg(self, wanted: _Wanted, images_BSSC: Tensor) -> bool:
        """Whether it went well; on a thread of the pool."""
        header, side = wanted.header, self.policy.pixels
        assert self._turbo is not None
        part = stored_part(wanted.part, header)
        size = stored_part((0, 0, header.width, header.height), header)[2:]
        # Shrunk by the decoder, a test view would differ from CLIP's by up to 0.04 in mean.
        shrink = 1 if wanted.bleeds else shrinkage(part, side)
        try:
            pixels_HWC, box = decompress(self._turbo, wanted.data, size, part, shrink)
        except JpegError:
            return False
        if wanted.bleeds:
            view_SSC = clip_view(upright(pixels_HWC, header.orientation), wanted.xywh, side)
        else:
            view_SSC = upright(window_view(pixels_HWC, box, side), header.orientation)
        put(view_SSC, wanted.flip, images_BSSC[wanted.row].numpy())
        return True

    def _by_dali(self, batch: list[_Wanted], images_BSSC: Tensor) -> list[int]:
        """Decodes a batch; the rows of those that fail."""
        if self._dali is None:
            from engine.data.dali import pipeline  # plain JPEGs on a CPU can do without DALI

            self._dali = pipeline(
                "mixed" if self._device.type == "cuda" else "cpu",
                self.policy.pixels,
                self._hardware,
                batch_size=self._batch,
                num_threads=self._threads,
                device_id=self._device.index,
            )
        try:
            (images,) = self._dali.run(
                encoded=[np.frombuffer(wanted.data, np.uint8) for wanted in batch],
                **_columns(batch, on_gpu=self._device.type == "cuda"),
            )
        except RuntimeError:
            self._dali = None
            if len(batch) == 1:
                return [batch[0].row]
            return [row for wanted in batch for row in self._by_dali([wanted], images_BSSC)]
        if self._device.type == "cuda":
            views_BSSC = torch.from_dlpack(images.as_tensor())
            images_BSSC[[wanted.row for wanted in batch]] = views_BSSC
            torch.cuda.current_stream(self._device).synchronize()  # DALI's memory is DALI's again
            return []

        def resized(i: int) -> bool:
            wanted, pixels_HWC, side = batch[i], images.at(i), self.policy.pixels
            left, top, right, bottom = wanted.part
            width, height = right - left, bottom - top
            if pixels_HWC.shape != (height, width, 3):
                return False
            if wanted.bleeds:
                view_SSC = clip_view(pixels_HWC, wanted.xywh, side)
            else:
                view_SSC = window_view(pixels_HWC, (0, 0, width, height), side)
            put(view_SSC, wanted.flip, images_BSSC[wanted.row].numpy())
            return True

        good = self._pool.map(resized, range(len(batch)))
        return [wanted.row for wanted, well in zip(batch, good, strict=True) if not well]


def jpeg_decoder(device: str) -> str:
    """What decodes JPEGs there, on this machine."""
    if device != "cpu":
        return "dali on a gpu"
    return "turbojpeg" if _turbo() else "dali"


@cache
def _turbo() -> CDLL | None:
    turbo = turbojpeg.library()
    if turbo is None:
        say("TurboJPEG is not installed: JPEGs are decoded by DALI, at half the speed or less")
    return turbo


def _batches(wanted: list[_Wanted], most: int) -> Iterator[list[_Wanted]]:
    """Batches of at most `most` images, and together at most as large as a single one may be."""
    batch: list[_Wanted] = []
    pixels = 0
    for one in wanted:
        more = one.header.width * one.header.height
        if batch and (len(batch) == most or pixels + more > MAX_PIXELS):
            yield batch
            batch, pixels = [], 0
        batch.append(one)
        pixels += more
    if batch:
        yield batch


def _columns(batch: list[_Wanted], on_gpu: bool) -> dict[str, np.ndarray]:
    """Inputs of the pipeline: what to decode of each image, what of that to resize."""
    part_B4 = np.array([wanted.part for wanted in batch])
    first_B2, last_B2 = part_B4[:, :2], part_B4[:, 2:]
    columns = {"start": first_B2.astype(np.int32), "shape": (last_B2 - first_B2).astype(np.int32)}
    if on_gpu:
        xywh_B4 = np.stack([wanted.xywh for wanted in batch])
        flip_B = np.array([wanted.flip for wanted in batch])
        low_B2 = xywh_B4[:, :2] - first_B2
        high_B2 = low_B2 + xywh_B4[:, 2:]
        low_B2[flip_B, 0], high_B2[flip_B, 0] = high_B2[flip_B, 0], low_B2[flip_B, 0]
        columns |= {"low": low_B2.astype(np.float32), "high": high_B2.astype(np.float32)}
    return {name: np.ascontiguousarray(column[:, ::-1]) for name, column in columns.items()}
