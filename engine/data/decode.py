"""Encoded bytes and views to uint8 pixels, by DALI; the same code on a CPU and (mixed) on a GPU.

DALI fails a whole batch for one bad image, and one that its parser rejects can kill the process
inside a large batch. Hence every sample passes three gates first: its magic bytes, DALI's own
header parser in a batch of one, and the pixel limit. A batch that fails all the same is decoded
again one by one, which finds the culprit. A pipeline that has failed is never used again: a new one
takes 10 ms.
"""

import threading
from collections.abc import Sequence

import numpy as np
from nvidia.dali import Pipeline, fn, pipeline_def, types

from engine.data.corpus import Sample
from engine.data.header import MAX_PIXELS, BadImage, check_format
from engine.data.views import ViewPolicy, Windows

__all__ = ["Decoder"]

# The dynamic executor, in step: after an error the others are dead, or blame the next batch.
_EXECUTOR = {
    "prefetch_queue_depth": 1,
    "exec_pipelined": False,
    "exec_async": False,
    "exec_dynamic": True,
}


@pipeline_def(**_EXECUTOR)
def _view_pipeline(pixels: int, device: str):
    def column(name: str, dtype: types.DALIDataType):
        return fn.external_source(name=name, dtype=dtype, ndim=1)

    # The whole image, then the slice: with an ROI decode, whether a truncated JPEG is noticed would
    # depend on the window. Pixels are the same.
    image = fn.decoders.image(column("encoded", types.UINT8), device=device, output_type=types.RGB)
    image = fn.slice(
        image,
        start=column("start", types.INT32),
        shape=column("shape", types.INT32),
        axis_names="HW",
    )
    return fn.resize(
        image,
        size=[pixels, pixels],
        roi_start=column("low", types.FLOAT),
        roi_end=column("high", types.FLOAT),
        interp_type=types.INTERP_CUBIC,
        antialias=True,
    )


@pipeline_def(**_EXECUTOR, batch_size=1, num_threads=1, device_id=None)
def _peek_pipeline():
    encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
    return fn.peek_image_shape(encoded, adjust_orientation=True)


class Decoder:
    """Decodes views of samples under one policy, on `device` (cpu, cuda or cuda:INDEX).

    Not for use by two threads at once.
    """

    def __init__(self, policy: ViewPolicy, device: str, threads: int, batch: int = 64) -> None:
        self.policy = policy
        kind, _, index = device.partition(":")
        self._gpu = int(index or 0) if kind == "cuda" else None
        self._threads, self._batch = threads, batch
        self._busy = threading.Lock()
        self._views: Pipeline | None = None
        self._peek: Pipeline | None = None

    def decode(
        self, samples: Sequence[Sample | None], view: int
    ) -> tuple[np.ndarray, list[str | None]]:
        """Pixels uint8 [B, S, S, 3] of view number `view`, and why a sample has none.

        Samples that are None (padding) or cannot be decoded are black; the latter have a reason:
        that of the index, `empty`, `format`, `header`, `too_large` or `undecodable`.
        """
        free = self._busy.acquire(blocking=False)
        assert free, "a Decoder is not for two threads at once"
        try:
            return self._decode(samples, view)
        finally:
            self._busy.release()

    def _decode(
        self, samples: Sequence[Sample | None], view: int
    ) -> tuple[np.ndarray, list[str | None]]:
        side = self.policy.pixels
        images = np.zeros((len(samples), side, side, 3), np.uint8)
        reasons: list[str | None] = [None] * len(samples)
        usable, sizes = [], []
        for i, sample in enumerate(samples):
            if sample is None:
                continue
            try:
                sizes.append(self._size(sample))
                usable.append(i)
            except BadImage as bad:
                reasons[i] = str(bad)
        if not usable:
            return images, reasons

        chosen = [sample for i in usable if (sample := samples[i]) is not None]
        sizes_B2 = np.array(sizes, np.int64)
        windows = self.policy.windows(
            view,
            np.array([sample.shard for sample in chosen]),
            np.array([sample.position for sample in chosen]),
            sizes_B2,
        )
        columns = _columns(windows, sizes_B2, side)
        encoded = [np.frombuffer(sample.data, np.uint8) for sample in chosen if sample.data]
        for low in range(0, len(usable), self._batch):
            part = np.arange(low, min(low + self._batch, len(usable)))
            pixels, bad_rows = self._decoded(encoded, columns, part)
            images[np.array(usable)[part]] = pixels
            for row in bad_rows:
                reasons[usable[row]] = "undecodable"
        return images, reasons

    def _size(self, sample: Sample) -> tuple[int, int]:
        """Upright width and height; raises BadImage."""
        if sample.data is None:
            raise BadImage(sample.reason or "no_image")
        check_format(sample.data)
        if self._peek is None:
            self._peek = _peek_pipeline()
        try:
            (shape,) = self._peek.run(encoded=[np.frombuffer(sample.data, np.uint8)])
            height, width, _ = np.asarray(shape.at(0)).tolist()
        except RuntimeError:
            self._peek = None
            raise BadImage("header") from None
        if width * height > MAX_PIXELS:
            raise BadImage("too_large")
        return width, height

    def _decoded(
        self, encoded: list[np.ndarray], columns: dict[str, np.ndarray], rows: np.ndarray
    ) -> tuple[np.ndarray, list[int]]:
        """Pixels of `rows`, black for those that fail, and which these are."""
        if self._views is None:
            self._views = _view_pipeline(
                self.policy.pixels,
                "cpu" if self._gpu is None else "mixed",
                batch_size=self._batch,
                num_threads=self._threads,
                device_id=self._gpu,
            )
        try:
            (images,) = self._views.run(
                encoded=[encoded[row] for row in rows],
                **{name: column[rows] for name, column in columns.items()},
            )
            return images.as_cpu().as_array(), []
        except RuntimeError:
            self._views = None
        if len(rows) == 1:
            side = self.policy.pixels
            return np.zeros((1, side, side, 3), np.uint8), rows.tolist()
        singles = [self._decoded(encoded, columns, rows[i : i + 1]) for i in range(len(rows))]
        bad_rows = [row for _, bad in singles for row in bad]
        return np.concatenate([pixels for pixels, _ in singles]), bad_rows


def _columns(windows: Windows, size_B2: np.ndarray, pixels: int) -> dict[str, np.ndarray]:
    """Inputs of the pipeline: what to slice out of each image, what of the slice to resize.

    Swapping the ends of an axis mirrors it.
    """
    corner, extent = windows.xywh_B4[:, :2], windows.xywh_B4[:, 2:]
    # A view that CLIP cuts after resizing sees around it, as far as the cubic filter reaches.
    margin = 2 * np.maximum(1, extent / pixels) + 2 if windows.bleeds else 0
    first = np.maximum(0, np.floor(corner - margin))
    last = np.minimum(size_B2, np.ceil(corner + extent + margin))
    low, high = corner - first, corner - first + extent
    flip = windows.flip_B
    low[flip, 0], high[flip, 0] = high[flip, 0], low[flip, 0]
    return {
        "start": first[:, ::-1].astype(np.int32),
        "shape": (last - first)[:, ::-1].astype(np.int32),
        "low": low[:, ::-1].astype(np.float32),
        "high": high[:, ::-1].astype(np.float32),
    }
