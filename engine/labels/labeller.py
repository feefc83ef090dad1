"""From a block to what is sent of it: reads, decodes, has it labelled, records. Plain torch."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.data.corpus import Corpus, Sample
from engine.data.isolate import AnyDecoder
from engine.labels.store import Recorded
from engine.labels.targets import BlockView, SoftTargets, Wire, finite, pack
from engine.labels.teacher import Team
from engine.telemetry import Stopwatch

__all__ = ["Decoded", "Labeller"]


class Decoded(NamedTuple):
    """A block's images by their size in pixels, and which of them there are."""

    images: dict[int, Tensor]
    valid_n: np.ndarray
    lasts: bool  # another time, no more of them would be there
    ready: torch.cuda.Event | None = None  # after which images on a GPU are there


class Labeller:
    """Soft targets of blocks: reads, decodes and labels; a pure function of its argument.

    Its steps may be called from a thread each, to overlap. Labels are written to `recorded`, the
    corpora's part of a store, where there is one.
    """

    def __init__(
        self,
        team: Team,
        corpora: Mapping[str, Corpus],
        decoders: Mapping[int, AnyDecoder],
        fingerprints: Mapping[str, str],
        wire: Wire = "fp16",
        recorded: Mapping[str, Recorded] | None = None,
    ) -> None:
        assert team.pixels <= decoders.keys()
        self._team, self._corpora, self._decoders = team, corpora, decoders
        self._fingerprints, self._wire = fingerprints, wire
        self._recorded = recorded or {}
        self._clocks = {step: Stopwatch() for step in ("read", "decode", "forward", "write")}
        self._images = 0
        device = team.w_ND.device
        # A stream of its own: on the usual one, decoding would wait for the forwards before it.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def label(self, wanted: BlockView) -> SoftTargets:
        """Raises OSError for a block of which nothing can be read: that may pass, and is no
        label."""
        if found := self.stored(wanted):
            return found
        decoded = self.decode(wanted, self.read(wanted))
        targets = self.forward(wanted, decoded)
        self.write(wanted, decoded, targets)
        return targets

    def stored(self, wanted: BlockView) -> SoftTargets | None:
        """What another has recorded of it meanwhile."""
        if wanted.corpus not in self._recorded:
            return None
        length = self._corpora[wanted.corpus].blocks.at(wanted.block).length
        return self._recorded[wanted.corpus].get(wanted, length)

    def read(self, wanted: BlockView) -> list[Sample]:
        corpus = self._corpora[wanted.corpus]
        with self._clocks["read"].lap():
            samples = corpus.read(wanted.block)
        reasons = {sample.reason for sample in samples}
        if "unreadable" in reasons and None not in reasons:
            shard = corpus.shards[corpus.blocks.at(wanted.block).shard]
            raise OSError(f"the teacher cannot read block {wanted.block}, of {shard}")
        return samples

    def decode(self, wanted: BlockView, samples: Sequence[Sample]) -> Decoded:
        images, valid_n = {}, np.ones(len(samples), bool)
        lasts = all(sample.reason != "unreadable" for sample in samples)
        ready = torch.cuda.Event() if self._stream else None
        with self._clocks["decode"].lap(), torch.cuda.stream(self._stream):
            for pixels, decoder in self._decoders.items():
                images[pixels], reasons = decoder.decode(samples, wanted.view)
                valid_n &= np.array([reason is None for reason in reasons])
            if ready:
                ready.record()
        return Decoded(images, valid_n, lasts, ready)

    def forward(self, wanted: BlockView, decoded: Decoded) -> SoftTargets:
        team = self._team
        with self._clocks["forward"].lap():
            told = self._fingerprints[wanted.corpus]
            if decoded.ready:
                torch.cuda.current_stream().wait_event(decoded.ready)
                for images_BCHW in decoded.images.values():
                    if images_BCHW.is_cuda:
                        images_BCHW.record_stream(torch.cuda.current_stream())
            values_nX = team.values(decoded.images)
            targets = pack(
                team.form, values_nX, decoded.valid_n, told, self._wire, team.w_ND, team.scale
            )
        self._images += len(decoded.valid_n)
        return targets

    def write(self, wanted: BlockView, decoded: Decoded, targets: SoftTargets) -> None:
        """Records labels that would be the same another time."""
        if wanted.corpus in self._recorded and decoded.lasts and finite(targets):
            with self._clocks["write"].lap(targets.bytes):
                self._recorded[wanted.corpus].put(wanted, targets)

    def statement(self) -> dict[str, float]:
        """Images labelled, seconds of each step, blocks that a full store did not take, and what
        the team tells."""
        busy = {f"{step}_s": clock.total_s for step, clock in self._clocks.items()}
        lost = sum(recorded.unrecorded for recorded in self._recorded.values())
        return {"labelled": self._images, **busy, "unrecorded": lost, **self._team.statement()}

    def close(self) -> None:
        for corpus in self._corpora.values():
            corpus.close()
        for decoder in self._decoders.values():
            decoder.close()
