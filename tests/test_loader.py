"""engine.data.loader: batches in order, ahead of their consumer, within bounds."""

import socket
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest
import torch

from engine.data.batches import training_works
from engine.data.corpus import Corpus, Sample
from engine.data.decode import Decoder
from engine.data.loader import Loader, Work, _Shelf
from engine.data.order import Blocks, Order, Share
from engine.data.views import ViewPolicy
from engine.storage.ranges import Access, Storage
from engine.telemetry import Stopwatch

POLICY = ViewPolicy(seed=3, pixels=16)


class Kept(list):
    """A block whose life can be watched."""


class Watched:
    """A corpus that knows which of its blocks were read, and how many samples are alive."""

    def __init__(self, corpus: Corpus, fail_at: int = -1) -> None:
        self._corpus, self._fail_at = corpus, fail_at
        self.reads: list[int] = []
        self.alive = self.most_alive = 0
        self._lock = threading.Lock()

    def read(self, block: int) -> list[Sample]:
        if block == self._fail_at:
            raise OSError(f"block {block} cannot be read")
        kept = Kept(self._corpus.read(block))
        with self._lock:
            self.reads.append(block)
            self.alive += len(kept)
            self.most_alive = max(self.most_alive, self.alive)
        weakref.finalize(kept, self._died, len(kept))
        return kept

    def block_bytes(self, block: int) -> int:
        return 1000 * self._corpus.blocks.at(block).length

    def _died(self, samples: int) -> None:
        with self._lock:
            self.alive -= samples


@pytest.fixture
def corpus(corpus_folder) -> Corpus:
    return Corpus.open(str(corpus_folder), 4)  # blocks of 4, 4, 2, 4, 4, 2, 4


@pytest.fixture
def loader_of(request):
    """loader_of(corpus, works, ...): a Loader that is closed at the end of the test."""

    def make(corpus, works, most_bytes: int = 1 << 30, ahead: int = 2) -> Loader:
        decoder = Decoder(POLICY, "cpu", threads=1)
        loader = Loader(corpus, decoder, works, most_bytes, ahead)
        request.addfinalizer(decoder.close)
        request.addfinalizer(loader.close)
        return loader

    return make


def works_of(corpus: Corpus, passes: int = 2) -> Iterator[Work]:
    order = Order(corpus.blocks, lanes=2, batch=10, window_samples=8, seed=1)
    for pass_ in range(passes):
        for step in range(order.steps):
            soon = tuple((p, block) for p, block in order.coming(pass_, step) if p < passes)
            share = order.share(pass_, step)
            yield Work("shards", pass_ * order.steps + step, pass_, share, soon)


def whole_block(corpus: Corpus, block: int, step: int = 0) -> Work:
    count = corpus.blocks.at(block).length
    share = Share(np.full(count, block), np.arange(count), np.ones(count, bool))
    return Work("shards", step, 0, share)


def test_batches_are_what_direct_reading_and_decoding_give(corpus, loader_of):
    works = list(works_of(corpus))
    batches = list(loader_of(corpus, works))
    assert [batch.work for batch in batches] == works
    decoder, padded = Decoder(POLICY, "cpu", threads=1), 0
    for work, batch in zip(works, batches, strict=True):
        assert batch.images_BCHW.shape == (10, 3, 16, 16)
        for i, (block, offset, valid) in enumerate(zip(*work.share, strict=True)):
            image = batch.images_BCHW[i]
            assert batch.valid_B[i] == valid and batch.reasons[i] is None
            if valid:
                sample = corpus.read(int(block))[offset]
                assert torch.equal(image, decoder.decode([sample], work.view)[0][0])
                assert batch.labels_B[i] == sample.label
            else:
                padded += 1
                assert not image.any() and batch.labels_B[i] == -1
    assert padded == 2 * 6  # 24 samples a pass, in three batches of 10


def test_a_bad_sample_is_not_valid_and_has_its_reason(corpus, loader_of):
    class Spoilt(Watched):
        def read(self, block: int) -> list[Sample]:
            first, *others = super().read(block)
            return [first._replace(data=None, reason="truncated"), *others]

    (batch,) = loader_of(Spoilt(corpus), [whole_block(corpus, 0)])
    assert batch.reasons == ("truncated", None, None, None)
    assert batch.valid_B.tolist() == [False, True, True, True]
    assert batch.labels_B[0] == corpus.read(0)[0].label and not batch.images_BCHW[0].any()


def test_a_reader_s_error_reaches_the_consumer_after_the_good_batches(corpus, loader_of):
    watched = Watched(corpus, fail_at=2)
    loader = loader_of(watched, [whole_block(corpus, block, block) for block in range(5)])
    seen = []
    with pytest.raises(OSError, match="block 2 cannot be read"):
        for batch in loader:
            seen.append(batch.work.step)
    assert seen == [0, 1]
    assert set(watched.reads) == {0, 1}


def test_an_error_of_the_works_reaches_the_consumer(corpus, loader_of):
    def works() -> Iterator[Work]:
        yield whole_block(corpus, 0)
        raise ZeroDivisionError("no more work")

    with pytest.raises(ZeroDivisionError, match="no more work"):
        list(loader_of(corpus, works()))


def wait_until(true) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_it_walks_ahead_but_no_further_than_told(corpus, loader_of):
    """With 2 batches ready, a third is made and waits; a fourth is not begun."""
    taken = []

    def works() -> Iterator[Work]:
        for step in range(20):
            taken.append(step)
            yield whole_block(corpus, step % 7, step)

    batches = iter(loader_of(corpus, works(), ahead=2))
    wait_until(lambda: len(taken) == 3)
    time.sleep(0.3)
    assert len(taken) == 3
    assert next(batches).work.step == 0
    wait_until(lambda: len(taken) == 4)
    time.sleep(0.3)
    assert len(taken) == 4


def test_close_leaves_no_thread_behind_while_it_is_blocked(corpus):
    before = set(threading.enumerate())
    watched, decoder = Watched(corpus), Decoder(POLICY, "cpu", 1)
    works = [whole_block(corpus, step % 7, step) for step in range(50)]
    loader = Loader(watched, decoder, works, 100_000, ahead=1)
    wait_until(lambda: len(watched.reads) >= 2)  # one is ready, the next has nowhere to go
    loader.close()
    loader.close()  # once more does no harm
    decoder.close()
    wait_until(lambda: set(threading.enumerate()) <= before)  # readers are not waited for
    assert len(set(watched.reads)) < 7


def test_close_does_not_wait_for_a_stalled_read(corpus):
    """And the corpus is as good as before: another loader may read it."""
    stalled, told = threading.Event(), threading.Event()

    class Stalling(Watched):
        def read(self, block: int) -> list[Sample]:
            stalled.set()
            assert told.wait(60)
            return super().read(block)

    before, slow, decoder = set(threading.enumerate()), Stalling(corpus), Decoder(POLICY, "cpu", 1)
    loader = Loader(slow, decoder, [whole_block(corpus, 0)], 1 << 30)
    assert stalled.wait(20)
    began = time.monotonic()
    loader.close()
    assert time.monotonic() - began < 2
    told.set()
    again = Loader(slow, decoder, [whole_block(corpus, 0)], 1 << 30)
    assert [batch.valid_B.all() for batch in again] == [True]
    again.close()
    decoder.close()
    wait_until(lambda: set(threading.enumerate()) <= before)


def test_a_closed_corpus_ends_its_stalled_reads(corpus):
    """A server that accepts, and never answers; reads are tried for ten minutes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        table = corpus._manifest  # which names its index files in full
        url = f"http://127.0.0.1:{server.getsockname()[1]}/a.tar"
        place = table.schema.get_field_index("shard")
        table = table.set_column(place, "shard", pa.array([url] * len(table)))
        remote = Corpus(table, 4, Storage(Access(("127.0.0.1",), timeout_s=60, retries=9)))
        with ThreadPoolExecutor(1) as pool:
            read = pool.submit(remote.read, 0)
            connection, _ = server.accept()
            began = time.monotonic()
            remote.close()
            assert {sample.reason for sample in read.result()} == {"unreadable"}
            assert time.monotonic() - began < 2
            connection.close()
        assert {sample.reason for sample in remote.read(1)} == {"unreadable"}


def test_blocks_are_kept_within_bounds(corpus, loader_of):
    """Blocks come round three times, each told of two steps before: at most 8 samples are kept, and
    the 4 of the batch in hand."""
    watched = Watched(corpus)
    works = [
        whole_block(corpus, step % 7, step)._replace(soon=((0, (step + 2) % 7),))
        for step in range(21)
    ]
    assert len(list(loader_of(watched, works, most_bytes=8000))) == 21
    assert watched.most_alive <= 8 + 4
    assert 21 <= len(watched.reads) <= 21 + 2  # the last steps tell of what does not come


def test_a_block_is_read_once_a_pass_and_no_longer_kept_than_its_windows(corpus, loader_of):
    """Three passes of lanes of 12 samples in windows of 8: at most those of two windows a lane."""
    watched = Watched(corpus)
    assert len(list(loader_of(watched, works_of(corpus, passes=3)))) == 9
    assert set(watched.reads) == set(range(7)) and len(watched.reads) <= 3 * 7
    few = loader_of(watched, works_of(corpus, passes=30))
    assert len(list(few)) == 90
    assert few.stages()["read_again"] == 0 and few.stages()["held_bytes"] <= 24_000


def test_what_does_not_fit_is_read_when_it_is_needed(corpus, loader_of):
    """8 samples fit, two blocks: the third is not read ahead, and what is used goes for it."""
    watched = Watched(corpus)
    works = [whole_block(corpus, block, step) for step, block in enumerate([0, 1, 3])]
    works[0] = works[0]._replace(soon=((0, 1), (0, 3)))
    loader = loader_of(watched, works, most_bytes=8000, ahead=1)
    wait_until(lambda: len(watched.reads) == 2)
    time.sleep(0.2)
    assert sorted(watched.reads) == [0, 1]
    assert [batch.work.step for batch in loader] == [0, 1, 2]
    assert sorted(watched.reads) == [0, 1, 3] and loader.stages()["read_again"] == 0


def test_a_window_that_does_not_fit_is_read_again_and_told_once(corpus, loader_of, capsys):
    """Each window goes over its two blocks twice, and there is room for one block. That a block
    comes again in the next pass is no fault of the memory."""
    windows = [[0, 1], [3, 4], [6, 2]] * 2
    works = []
    for number, window in enumerate(windows):
        for place, block in enumerate(window * 2):
            coming = windows[number + 1 - (number == 0) : number + 2] if place == 0 else []
            soon = tuple((0, b) for blocks in coming for b in blocks)
            works.append(whole_block(corpus, block, len(works))._replace(soon=soon))
    watched = Watched(corpus)
    loader = loader_of(watched, works, most_bytes=1)
    images = [batch.images_BCHW for batch in loader]
    assert len(watched.reads) == 6 * 4
    assert loader.stages()["read_again"] == 6 * 2
    assert capsys.readouterr().err.count("corpus.memory_gb") == 1
    room = loader_of(corpus, works)
    for image, other in zip(images, room, strict=True):
        assert torch.equal(image, other.images_BCHW)
    assert room.stages()["read_again"] == 0 and not capsys.readouterr().err


@pytest.mark.parametrize("most", [26, 20, 17, 12, 3])
def test_a_small_memory_reads_nothing_in_vain(most: int):
    """A pass over 200 blocks, of which 16 are in use at once, and room for `most`: a block is
    read once, but for those read again within a window."""

    class Counted:
        def __init__(self) -> None:
            self.reads: list[int] = []

        def read(self, block: int) -> list[Sample]:
            self.reads.append(block)
            return []

        def block_bytes(self, block: int) -> int:
            return 1

    order = Order(Blocks(np.full(20, 100), 10), lanes=4, batch=24, window_samples=40, seed=1)
    counted, most_waiting = Counted(), 0
    shelf = _Shelf(counted, most, Stopwatch(), threading.Event())
    for work in training_works(order, 1, 1, 0, 1, 0):
        needed = np.unique(work.share.blocks[work.share.valid]).tolist()
        shelf.take(needed, [block for _, block in work.soon])
        most_waiting = max(most_waiting, len(shelf._coming))
    shelf.close()
    assert len(counted.reads) == 200 + shelf.read_again
    assert most_waiting <= 3 * 16, "of the windows in sight"


def test_each_stage_tells_its_time_and_bytes(corpus, loader_of):
    loader = loader_of(corpus, list(works_of(corpus, passes=1)))
    assert len(list(loader)) == 3
    stages = loader.stages()
    images = sum(len(one.data) for block in range(7) for one in corpus.read(block))
    assert stages["decode"]["laps"] == 3 and stages["decode"]["bytes"] == images
    assert stages["read"]["laps"] >= 7 and stages["read"]["bytes"] > images
    assert stages["wait"]["laps"] == 4  # the last, for the end
    for stage in ("read", "decode", "wait"):
        assert 0 < stages[stage]["p50_s"] <= stages[stage]["p99_s"] <= stages[stage]["s"]


def test_soon_is_read_before_it_is_needed(corpus, loader_of):
    watched = Watched(corpus)
    work = whole_block(corpus, 0)._replace(soon=((0, 3), (0, 6)))
    list(loader_of(watched, [work]))
    wait_until(lambda: len(watched.reads) == 3)
    assert sorted(watched.reads) == [0, 3, 6]


def test_waiting_is_counted_where_it_is_done(corpus, loader_of):
    """Time spent waiting for a batch counts; time the consumer spends elsewhere does not."""

    def late() -> Iterator[Work]:
        for step in range(2):
            time.sleep(0.3)
            yield whole_block(corpus, step, step)

    loader = loader_of(corpus, late())
    for _ in loader:
        pass
    assert loader.waited_s > 0.2
    ready = loader_of(corpus, [whole_block(corpus, 0)])
    wait_until(lambda: ready._ready.full() or ready._ready.qsize() == 2)
    began = time.perf_counter()
    for _ in ready:
        time.sleep(0.5)
    assert ready.waited_s < time.perf_counter() - began - 0.45
