"""The engine's own training loop in this process, on a group of one, without Ray.

Of a run only what feeds it is exchanged: pixels that lie on the device already, in place of shards
and decoder, and one or another source of labels. Rates are the loop's own records, one a window of
steps, at whose end it waits for the GPU.
"""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from decoders import decoder_of
from engine_setup import Size, assignment_of, cores, join_group, order_of
from intervals import Summary, Tracer
from photos import photos
from torch import Tensor

from engine.config import TeacherPrecision
from engine.data.corpus import Corpus, Sample
from engine.data.loader import Batch
from engine.labels.inline import InlineSource
from engine.labels.recorded import RecordedSource
from engine.labels.store import Store
from engine.labels.targets import BlockView, SoftTargets, Targets, TargetSource
from engine.labels.teacher import Team
from engine.train.loop import kept, train
from engine.train.worker import Task, Worker

__all__ = ["Resident", "Rig", "rates"]


class Resident:
    """A corpus and its decoder in one: the same pixels for all samples, on the device already."""

    def __init__(self, images_BCHW: Tensor, block: int) -> None:
        self._images_BCHW = images_BCHW
        self._samples = [Sample(0, place, None, None, None) for place in range(block)]

    def read(self, block: int) -> list[Sample]:
        return self._samples

    def block_bytes(self, block: int) -> int:
        return 0

    def decode(
        self, samples: Sequence[Sample | None], view: int
    ) -> tuple[Tensor, list[str | None]]:
        return self._images_BCHW, [None] * len(samples)


class _Repeated:
    """A corpus over and over, as if it were as long as a run."""

    def __init__(self, corpus: Corpus) -> None:
        self._corpus = corpus

    def read(self, block: int) -> list[Sample]:
        return self._corpus.read(block % len(self._corpus.blocks))

    def block_bytes(self, block: int) -> int:
        return self._corpus.block_bytes(block % len(self._corpus.blocks))


class _Traced:
    """A source that has some steps traced: those from step `first` on."""

    def __init__(self, inner: TargetSource, tracer: Tracer, first: int, steps: int) -> None:
        self._inner, self._tracer = inner, tracer
        self._first, self._last, self._asked = first, first + steps, 0

    @property
    def waited_s(self) -> float:
        return self._inner.waited_s

    def request(self, wanted: Sequence[BlockView]) -> None:
        self._inner.request(wanted)

    def targets(self, batch: Batch) -> Targets:
        if self._asked == self._first:
            self._tracer.start()
        if self._asked == self._last:
            self._tracer.stop()
        self._asked += 1
        return self._inner.targets(batch)

    def statement(self) -> dict[str, float]:
        return self._inner.statement()

    def close(self) -> None:
        self._inner.close()


class Rig:
    """Models, photos and a worker, in a folder of their own; one in a process. close() ends it."""

    def __init__(
        self, place: Path, size: Size, device: torch.device, precision: TeacherPrecision
    ) -> None:
        """`precision`: of the teacher."""
        self.size, self.device, self._place = size, device, place
        self._runs = 0
        torch.set_num_threads(cores())
        self.photos = photos(place / "shards", size.photo, size.shards * size.block, size.shards)
        self._assignment = assignment_of(place, size, device, precision)
        join_group(place, device)
        config = self._assignment.config
        self._worker = Worker(Task(config, self._assignment, None, "synthetic"), device)
        self._order = order_of(size)
        self._worker.order = self._order  # a learning rate goes by it
        self._team = Team.load(self._assignment.labels, device, size.batch)
        shape = (size.batch, 3, size.student.pixels, size.student.pixels)
        images_BCHW = torch.randint(256, shape, dtype=torch.uint8, device=device)
        self._images_BCHW = images_BCHW.contiguous(memory_format=torch.channels_last)  # as decoded
        pixels, batch = size.student.pixels, size.batch
        self._decoder, self.decodes = decoder_of(pixels, device, cores(), batch)

    @property
    def decodable(self) -> bool:
        """Whether there is a decoder; `decodes` tells which, or why not."""
        return self._decoder is not None

    def close(self) -> None:
        self._worker.decoder.close()
        if self._decoder:
            self._decoder.close()
        dist.destroy_process_group()

    # ------------------------------------------------------------ stages alone, in plain loops

    def teacher(self) -> list[float]:
        """Images/s of each window."""
        images = {self.size.student.pixels: self._images_BCHW}
        return self._windows(lambda step: self._team.values(images))

    def student(self) -> list[float]:
        """Images/s of each window."""
        values_BX = self._team.values({self.size.student.pixels: self._images_BCHW}).clone()
        targets = Targets(self._team.form, values_BX, np.ones(self.size.batch, bool))
        trainer = self._worker.trainer(None, 0)
        try:
            return self._windows(lambda step: trainer.step(step, self._images_BCHW, targets))
        finally:
            trainer.engine.destroy()

    def _windows(self, call: Callable[[int], object]) -> list[float]:
        found, size = [], self.size
        for window in range(size.warm + size.windows):
            self._settle()
            began = time.perf_counter()
            for step in range(size.steps):
                call(window * size.steps + step)
            self._settle()
            found.append(size.steps * size.batch / (time.perf_counter() - began))
        return found[size.warm :]

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    # ------------------------------------------------------------ the engine

    def inline(self, resident: bool) -> list[float]:
        """Images/s of each window, with a teacher in this process."""
        return self._run(InlineSource(self._team), resident)

    def replay(self, resident: bool) -> list[float]:
        """The same, of recorded labels."""
        return self._run(self._recorded(), resident)

    def traced(self, resident: bool) -> Summary:
        """Of the first window that counts of an inline run."""
        assert self.size.windows > 1, "the trace ends with the next one's first step"
        size, tracer = self.size, Tracer(self.device)
        source = _Traced(InlineSource(self._team), tracer, size.warm * size.steps, size.steps)
        self._run(source, resident)
        return tracer.summary()

    def _run(self, source: TargetSource, resident: bool) -> list[float]:
        self._runs += 1
        folder = self._place / f"run-{self._runs}"
        folder.mkdir()
        setting = self._worker.setting._replace(source=source, order=self._order, folder=folder)
        if resident:
            pixels: Any = Resident(self._images_BCHW, self.size.block)
            setting = setting._replace(corpus=pixels, decoder=pixels)
        else:
            assert self._decoder, self.decodes
            corpus: Any = _Repeated(self._worker.corpora["shards"])
            setting = setting._replace(corpus=corpus, decoder=self._decoder)
        trainer = self._worker.trainer(None, 0)
        try:
            train(trainer, setting, None, lambda pass_: None)
        finally:
            trainer.engine.destroy()
            source.close()
        return rates(folder / "metrics.jsonl")[self.size.warm :]

    def _recorded(self) -> RecordedSource:
        """Labels that mean nothing, of all blocks of a run."""
        labels, labelling = self._assignment.labels, self._assignment.labellings["shards"]
        recorded = Store(str(self._place / "labels")).recorded(labelling)
        blocks = self._order.blocks
        if recorded.missing(0, blocks):
            generator = np.random.default_rng(1)
            for block in range(len(blocks)):
                length = blocks.at(block).length
                values_nX = generator.standard_normal((length, labels.width), np.float32)
                values_nX /= np.linalg.norm(values_nX, axis=1, keepdims=True)
                told = SoftTargets(
                    labels.form,
                    values_nX.astype(np.float16),
                    None,
                    np.ones(length, bool),
                    labelling.fingerprint,
                )
                recorded.put(BlockView("shards", block, 0), told)
        return RecordedSource(
            {"shards": recorded},
            {"shards": blocks},
            None,
            kept(self._order, 1),
            labels.form,
            labels.width,
            self.device,
        )


def rates(file: Path) -> list[float]:
    """Images/s of each record of a run's steps."""
    records = map(json.loads, file.read_text().splitlines())
    return [record["images_per_second"] for record in records if record["kind"] == "train"]
