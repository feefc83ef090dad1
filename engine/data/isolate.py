"""Decoding in an expendable process: an image that crashes or hangs a native decoder costs one
sample, and not the worker.

Encoded images go to the child, and pixels come back, through memory that both map and that has no
name (memfd): it is gone with its last process, and no limit of /dev/shm applies. A pipe carries
questions and answers, as JSON. What a lost child was asked is asked again of a new one, image by
image: each loss costs a start of seconds, and halving would lose a child for every half.

It guards against accidents and is no sandbox: the child may do what its parent may.
"""

import ctypes
import json
import math
import mmap
import os
import resource
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib import import_module
from multiprocessing.connection import Connection, Pipe
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.config import CorpusConfig
from engine.data.corpus import Sample
from engine.data.decode import Decoder, refusal
from engine.data.header import Header
from engine.data.manifest import digest
from engine.data.views import ViewPolicy
from engine.progress import say

__all__ = ["AnyDecoder", "IsolatedDecoder", "decoder_of", "serve"]

_PROGRAM = "import sys; from engine.data.isolate import serve; serve(*sys.argv[1:])"
_STARTS = 3  # of children in a row that end without having answered
_START_S = 120.0  # longest: torch and DALI may come from a slow disk
_PR_SET_PDEATHSIG = 1  # prctl(2)
# Why images are given to no decoder of this process again, by their digest: a corpus may name
# another sample by the same numbers.
_QUARANTINE: dict[int, str] = {}


class IsolatedDecoder:
    """A Decoder on the CPU, in a child process.

    It gives the same pixels and reasons, and two reasons more, `crashed` and `timed_out`, for an
    image with which, alone, a child died or took longer than `timeout_s`. Such an image is
    announced, and not decoded again in this process. The child is asked for at most `batch` images
    at once, for which together `timeout_s` holds, too. It ends with close() and with its parent,
    whatever that dies of. Not for use by two threads at once.
    """

    def __init__(
        self,
        policy: ViewPolicy,
        threads: int,
        batch: int = 64,
        timeout_s: float = 60.0,
        decoder: type[Decoder] = Decoder,
    ) -> None:
        self.policy = policy
        self._batch, self._timeout_s = batch, timeout_s
        self._told = json.dumps(
            {
                "decoder": (decoder.__module__, decoder.__qualname__),
                "policy": asdict(policy),
                "threads": threads,
                "batch": batch,
            }
        )
        self._busy = threading.Lock()
        # A child is to be killed when the thread that started it ends (prctl), so not a caller's.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="isolate")
        self._file = open(os.memfd_create("decoder"), "r+b", buffering=0)
        self._memory = self._mapped(batch * 3 * policy.pixels**2)
        self._child: _Child | None = self._started()  # loads while the caller goes on

    def close(self) -> None:
        """Ends the child and frees the memory."""
        self._end_child()
        self._starter.shutdown()
        self._memory.close()
        self._file.close()

    def decode(
        self, samples: Sequence[Sample | None], view: int
    ) -> tuple[Tensor, list[str | None]]:
        """As Decoder.decode(). Raises RuntimeError where no child comes up, or the decoder in it
        raises an error."""
        free = self._busy.acquire(blocking=False)
        assert free, "a decoder is not for two threads at once"
        try:
            return self._decode(samples, view)
        except BaseException:
            self._end_child()  # its answer would be taken for that to the next question
            raise
        finally:
            self._busy.release()

    def _decode(
        self, samples: Sequence[Sample | None], view: int
    ) -> tuple[Tensor, list[str | None]]:
        side = self.policy.pixels
        images_BSSC = np.zeros((len(samples), side, side, 3), np.uint8)
        reasons = [refusal(sample) for sample in samples]
        wanted = []
        for row, sample in enumerate(samples):
            if sample is not None and sample.data is not None:
                assert sample.header is not None, "data come with their header"
                wanted.append(_Wanted(row, sample, sample.data, sample.header))
        for low in range(0, len(wanted), self._batch):
            batch = []
            for one in wanted[low : low + self._batch]:
                reasons[one.row] = _quarantined(one.data)
                if reasons[one.row] is None:
                    batch.append(one)
            if not batch:
                continue
            try:
                told = self._ask(batch, view, images_BSSC)
            except _Lost as lost:
                say(f"{lost}; what it was decoding, {len(batch)} images, is tried one by one")
                told = [self._alone(one, view, images_BSSC) for one in batch]
            for one, reason in zip(batch, told, strict=True):
                reasons[one.row] = reason
        return torch.from_numpy(images_BSSC).permute(0, 3, 1, 2), reasons

    def _alone(self, one: "_Wanted", view: int, images_BSSC: np.ndarray) -> str | None:
        """Decodes one image of a batch that has cost a child; why it has no pixels."""
        if why := _quarantined(one.data):  # a copy of it came before
            return why
        try:
            return self._ask([one], view, images_BSSC)[0]
        except _Lost as lost:
            _QUARANTINE[digest(one.data)] = lost.reason
            where = f"sample {one.sample.position} of shard {one.sample.shard} ({one.sample.key})"
            say(f"{lost} over {where}, which is left out from now on: {lost.reason}")
            return lost.reason

    def _ask(
        self, batch: Sequence["_Wanted"], view: int, images_BSSC: np.ndarray
    ) -> list[str | None]:
        """Has the child decode a batch into its rows; why images have no pixels. Raises _Lost."""
        child = self._running()
        shape = (len(batch), *images_BSSC.shape[1:])
        at = pixels = math.prod(shape)  # bytes; behind them come the encoded images
        if (size := pixels + sum(len(one.data) for one in batch)) > len(self._memory):
            self._memory.close()
            self._memory = self._mapped(size)
        for one in batch:
            self._memory[at : at + len(one.data)] = one.data
            at += len(one.data)
        question = {
            "view": view,
            "memory": len(self._memory),
            "samples": [
                (one.sample.shard, one.sample.position, len(one.data), *one.header) for one in batch
            ],
        }
        try:
            answer = child.answer(question, self._timeout_s)
        except _Lost:
            self._child = None
            raise
        if "error" in answer:
            raise RuntimeError(f"in the decoding process:\n{answer['error']}")
        reasons = answer["reasons"]
        decoded = np.frombuffer(self._memory, np.uint8, pixels).reshape(shape)
        for one, reason, view_SSC in zip(batch, reasons, decoded, strict=True):
            if reason is None:
                images_BSSC[one.row] = view_SSC
        return reasons

    def _running(self) -> "_Child":
        """A child that has answered, started where there is none."""
        if self._child and self._child.ready and self._child.has_ended():
            say(f"an idle decoding process died (exit code {self._child.end()}); a new one starts")
            self._child = None
        for _ in range(_STARTS):
            self._child = self._child or self._started()
            try:
                self._child.wait_till_ready()
                return self._child
            except _Lost as lost:
                self._child, last = None, lost
        raise RuntimeError(f"no decoding process comes up, in {_STARTS} tries: {last}")

    def _started(self) -> "_Child":
        return self._starter.submit(_Child, self._told, self._file.fileno()).result()

    def _end_child(self) -> None:
        if self._child:
            self._child.end()
            self._child = None

    def _mapped(self, size: int) -> mmap.mmap:
        self._file.truncate(size)
        return mmap.mmap(self._file.fileno(), size)


AnyDecoder = Decoder | IsolatedDecoder


def decoder_of(policy: ViewPolicy, device: str, threads: int, config: CorpusConfig) -> AnyDecoder:
    """The decoder of a worker; `config.isolate` is for the CPU alone."""
    if not config.isolate:
        return Decoder(policy, device, threads, hardware=config.hardware_jpeg)
    assert device == "cpu", "the driver has refused corpus.isolate on a GPU"
    return IsolatedDecoder(policy, threads)


class _Wanted(NamedTuple):
    """An image to be decoded into one row of the batch."""

    row: int
    sample: Sample
    data: memoryview
    header: Header


def _quarantined(data: memoryview) -> str | None:
    return _QUARANTINE.get(digest(data)) if _QUARANTINE else None


class _Lost(Exception):
    """A child is gone, and with it what it was asked. `reason` is `crashed` or `timed_out`."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class _Child:
    """A decoding process and the pipe to it. `ready` once it has answered."""

    def __init__(self, told: str, memory: int) -> None:
        self._pipe, theirs = Pipe()
        with theirs:
            files = (theirs.fileno(), memory)
            # -P and the path: it imports what its parent would. A group: Ctrl-C is not for it.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _PROGRAM, str(os.getpid()), *map(str, files), told],
                pass_fds=files,
                stdin=subprocess.DEVNULL,
                stdout=2,
                process_group=0,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path),
                },
            )
        self.ready = False

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def wait_till_ready(self) -> None:
        """Raises _Lost."""
        if not self.ready:
            self._receive(_START_S)
            self.ready = True

    def answer(self, question: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """Raises _Lost; the child has ended then."""
        try:
            self._pipe.send_bytes(json.dumps(question).encode())
        except ConnectionError:
            pass  # it has just died, as is found out below
        return self._receive(timeout_s)

    def _receive(self, timeout_s: float) -> dict[str, Any]:
        try:
            if self._pipe.poll(timeout_s):
                return json.loads(self._pipe.recv_bytes())
        except (EOFError, ConnectionError):
            raise _Lost("crashed", f"a decoding process died (exit code {self.end()})") from None
        self.end()
        raise _Lost("timed_out", f"a decoding process gave no answer in {timeout_s:g} s")

    def end(self) -> int:
        """Its exit code, minus the signal it died of."""
        self._process.kill()
        self._pipe.close()
        return self._process.wait()


def serve(parent: str, pipe: str, memory: str, told: str) -> None:
    """The child: decodes what it is asked, till its parent (a process id) has gone. `pipe` and
    `memory` are file descriptors that it has inherited."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # dumping one takes longer than a new start
    # The end of the pipe is not seen while a decoder hangs.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):
        return
    asked = json.loads(told)
    module, name = asked["decoder"]
    make: type[Decoder] = getattr(import_module(module), name)
    decoder = make(ViewPolicy(**asked["policy"]), "cpu", asked["threads"], asked["batch"])
    import_module("engine.data.dali")  # now, and not in the time of its first image
    decoder.decode([], 0)
    mapped = mmap.mmap(int(memory), 0)
    with Connection(int(pipe)) as connection:
        connection.send_bytes(b"{}")
        while True:
            try:
                question = json.loads(connection.recv_bytes())
            except (EOFError, ConnectionError):
                return
            if question["memory"] != len(mapped):
                mapped = mmap.mmap(int(memory), question["memory"])
            answer: dict[str, Any]
            try:
                answer = {"reasons": _decoded(decoder, mapped, question)}
            except Exception:  # raised again by the parent
                answer = {"error": traceback.format_exc()}
            connection.send_bytes(json.dumps(answer).encode())


def _decoded(decoder: Decoder, memory: mmap.mmap, question: dict[str, Any]) -> list[str | None]:
    """Decodes images, to the memory's beginning; behind their pixels they lie one after another."""
    side, images = decoder.policy.pixels, len(question["samples"])
    at = pixels = images * side * side * 3
    samples = []
    for shard, position, size, *header in question["samples"]:
        data = memoryview(memory)[at : at + size]
        samples.append(Sample(shard, position, data, None, None, header=Header(*header)))
        at += size
    images_BSSC = np.frombuffer(memory, np.uint8, pixels).reshape(images, side, side, 3)
    return decoder.decode_into(torch.from_numpy(images_BSSC), samples, question["view"])
