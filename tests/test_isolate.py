"""engine.data.isolate: images that crash or hang a decoder for real, in a child of this process."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from crashing import CRASH, HANG, PAIR, Broken, Crashing, Stillborn

from engine.data.corpus import Sample
from engine.data.decode import Decoder
from engine.data.header import BadImage, read_header
from engine.data.isolate import IsolatedDecoder
from engine.data.loader import Loader, Work
from engine.data.order import Share
from engine.data.views import TEST_VIEW, ViewPolicy
from engine.train.ledger import Ledger

POLICY = ViewPolicy(seed=3, pixels=48)
REPLACED_S = 20  # 3 on an idle machine


def sample(data: bytes, position: int = 0) -> Sample:
    """As a corpus gives it: with its header, or without data and with a reason."""
    try:
        header = read_header(data)
        return Sample(2, position, memoryview(data), None, None, f"key{position}", header)
    except BadImage as bad:
        return Sample(2, position, None, str(bad), None)


@pytest.fixture(scope="module")
def bare() -> Decoder:
    return Decoder(POLICY, "cpu", threads=1)


@pytest.fixture(scope="module")
def isolated():
    """One for all tests that leave a child, or its successor, alive."""
    decoder = IsolatedDecoder(POLICY, threads=1, timeout_s=2, decoder=Crashing)
    yield decoder
    decoder.close()


@pytest.fixture
def photos(encoded):
    """photos(n): n samples of many sizes and formats."""
    kinds = ("jpeg", "png", "webp")

    def make(n: int) -> list[Sample]:
        return [sample(encoded(50 + 9 * i, 300 - i, i, kinds[i % 3]), i) for i in range(n)]

    return make


def marked(encoded, mark: bytes, position: int) -> Sample:
    """A good JPEG, but for what Crashing makes of the bytes behind its end."""
    return sample(encoded(90, 70, position) + mark, position)


def assert_same(ours, theirs) -> None:
    assert torch.equal(ours[0], theirs[0]) and ours[1] == theirs[1]
    assert ours[0].stride() == theirs[0].stride()


def soon(is_so: Callable[[], bool]) -> bool:
    """Whether it is so within ten seconds."""
    return any(is_so() or time.sleep(0.05) for _ in range(200))


def has_ended(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def children() -> set[psutil.Process]:
    """Decoding processes of this one; those of other tests (a resource tracker) do not count."""
    found = set()
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if not child.cmdline() or "engine.data.isolate" in " ".join(child.cmdline()):
                found.add(child)  # without a command line: it has ended, and is not reaped yet
    return found


def test_it_gives_what_a_decoder_gives(isolated, bare, encoded, photos):
    """Over several questions and a growing memory; with padding, refusals and damage."""
    damaged = bytearray(encoded(90, 90, kind="png"))
    damaged[-200:-100] = bytes(100)
    odd = [None, sample(b"x"), sample(bytes(damaged), 7), Sample(0, 0, None, "changed", None)]
    large = [sample(encoded(700, 500, i, "png"), i) for i in range(2)]
    kept = isolated.decode(photos(5), 0)
    for batch in (photos(80), [*odd, *photos(9), *odd], large, odd[:2], []):
        for view in (TEST_VIEW, 0, 1):
            assert_same(isolated.decode(batch, view), bare.decode(batch, view))
    assert_same(kept, bare.decode(photos(5), 0))  # nothing was written over it


def test_a_child_killed_while_it_waits(isolated, bare, photos, capfd):
    """Costs nothing but a start; its successor outlives the thread that asked for it."""
    isolated.decode(photos(1), 0)
    (child,) = children()
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # leaves the rest to its parent
    started = time.perf_counter()
    with ThreadPoolExecutor(1) as thread:
        ours = thread.submit(isolated.decode, photos(5), 0).result()
    assert time.perf_counter() - started < REPLACED_S
    assert_same(ours, bare.decode(photos(5), 0))
    time.sleep(0.3)
    (successor,) = children()
    assert not has_ended(successor)
    assert "an idle decoding process died (exit code -9)" in capfd.readouterr().err


def test_culprits_cost_themselves_alone(isolated, bare, encoded, photos, capfd):
    """Two of 64, and copies there and in the next 64; and they are not decoded again."""
    batch, bad = photos(70), (9, 40, 41, 66)
    expected = bare.decode([None if i in bad else s for i, s in enumerate(batch)], 1)
    batch[9], batch[40] = marked(encoded, CRASH, 9), marked(encoded, CRASH, 40)
    batch[41], batch[66] = (batch[40]._replace(position=position) for position in (41, 66))
    images, reasons = isolated.decode(batch, 1)
    assert torch.equal(images, expected[0])  # black where padding was
    assert {i: why for i, why in enumerate(reasons) if why} == dict.fromkeys(bad, "crashed")
    told = " ".join(capfd.readouterr().err.split())
    assert told.count("tried one by one") == 1 and told.count("left out from now on") == 2
    assert "over sample 9 of shard 2 (key9), which is left out from now on: crashed" in told
    assert "exit code -11" in told

    started = time.perf_counter()
    assert isolated.decode(batch[:1], 0)[1] == [None]
    assert time.perf_counter() - started < REPLACED_S
    before = children()
    assert isolated.decode(batch, 0)[1] == reasons
    again = IsolatedDecoder(POLICY, 1, decoder=Crashing)  # another of this process knows it, too
    assert again.decode([batch[9], batch[40]], TEST_VIEW)[1] == ["crashed", "crashed"]
    again.close()
    assert children() == before and capfd.readouterr().err == ""


def test_a_crash_that_no_image_repeats_blames_none(isolated, bare, encoded, photos, capfd):
    batch = [*photos(3), marked(encoded, PAIR, 3), marked(encoded, PAIR, 4)]
    assert_same(isolated.decode(batch, 0), bare.decode(batch, 0))
    told = capfd.readouterr().err
    assert "tried one by one" in told and "left out" not in told


def test_a_hanging_image_alone(isolated, encoded, capfd):
    started = time.perf_counter()
    images, reasons = isolated.decode([marked(encoded, HANG, 5)], 0)
    assert reasons == ["timed_out"] and not images.any()
    assert time.perf_counter() - started < 2 * (2 + REPLACED_S)
    told = " ".join(capfd.readouterr().err.split())
    assert told.count("gave no answer in 2 s") == 2 and "timed_out" in told
    started = time.perf_counter()
    assert isolated.decode([marked(encoded, HANG, 5)], 1)[1] == ["timed_out"]
    assert time.perf_counter() - started < 1


class Given:
    """Samples as a corpus of one block."""

    def __init__(self, samples: list[Sample]) -> None:
        self.samples = samples

    def read(self, block: int) -> list[Sample]:
        return self.samples

    def block_bytes(self, block: int) -> int:
        return sum(len(sample.data) for sample in self.samples)


def test_a_crash_is_a_failure_in_the_ledger(isolated, encoded, photos):
    """By which a run of too many is stopped; the image is that of the test above."""
    samples = [*photos(9), marked(encoded, CRASH, 9)]
    share = Share(np.zeros(10, int), np.arange(10), np.ones(10, bool))
    loader = Loader(Given(samples), isolated, [Work("shards", 0, 1, share)], 1 << 20)
    (batch,) = loader
    loader.close()
    ledger = Ledger()
    ledger.add(batch, batch.valid_B)
    assert (ledger.trained, ledger.skipped, ledger.failed) == (9, {"crashed": 1}, 1)


def mapped() -> int:
    """Pieces of memory that this process shares with children of a decoder."""
    return Path("/proc/self/maps").read_text().count("memfd:decoder")


def held() -> set:
    """What this process has: children, threads, and open files."""
    files = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of listdir() itself
            files.add((name, os.readlink(f"/proc/self/fd/{name}")))
    return children() | files | set(os.listdir("/proc/self/task"))


def left_since(before: set) -> set:
    """What this process has beside that; of it, what is there for seconds. Earlier tests' threads
    come and go meanwhile."""
    ends = time.monotonic() + 5
    new = held() - before
    while new and time.monotonic() < ends:
        time.sleep(0.05)
        new &= held()
    return new


def test_nothing_is_left_behind_by_a_decoder_that_raises(photos):
    """And its error is its parent's: it is no image's fault."""
    before, maps, alive = held(), mapped(), children()
    decoder = IsolatedDecoder(POLICY, 1, decoder=Broken)
    assert mapped() == maps + 1
    assert decoder.decode([None], 0)[1] == [None]
    with pytest.raises(RuntimeError, match="AssertionError: a broken invariant"):
        decoder.decode(photos(2), 0)
    assert children() == alive  # nobody waits for its answer
    decoder.close()
    decoder.close()
    assert left_since(before) == set() and mapped() == maps


def test_a_child_that_cannot_start_is_no_loop(photos):
    before, maps = held(), mapped()
    decoder = IsolatedDecoder(POLICY, 1, decoder=Stillborn)
    with pytest.raises(RuntimeError, match=r"in 3 tries: .*\(exit code -11\)"):
        decoder.decode(photos(2), 0)
    decoder.close()
    assert left_since(before) == set() and mapped() == maps


def test_children_end_with_a_parent_that_is_killed(encoded, tmp_path):
    """One that waits, and one that hangs and cannot see its pipe's end."""
    (tmp_path / "a.jpg").write_bytes(encoded(90, 70))
    program = f"""
import pathlib
from crashing import HANG, Crashing
from engine.data.corpus import Sample
from engine.data.header import read_header
from engine.data.isolate import IsolatedDecoder
from engine.data.views import ViewPolicy
data = pathlib.Path({str(tmp_path / "a.jpg")!r}).read_bytes()
header = read_header(data)
idle, busy = (IsolatedDecoder(ViewPolicy(0, 48), 1, decoder=Crashing) for _ in range(2))
for decoder, end in ((idle, b""), (busy, HANG)):
    decoder.decode([Sample(0, 0, memoryview(data + end), None, None, header=header)], 0)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) as parent:
        assert parent.stderr.readline() == b"hangs\n"
        orphans = psutil.Process(parent.pid).children()
        parent.kill()
        parent.wait()
        assert len(orphans) == 2 and soon(lambda: all(map(has_ended, orphans)))
