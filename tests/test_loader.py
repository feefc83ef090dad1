"""engine.data.loader: batches in order, ahead of their consumer, within bounds."""

import threading
import time
import weakref
from collections.abc import Iterator

import numpy as np
import pytest

from engine.data.corpus import Corpus, Sample
from engine.data.decode import Decoder
from engine.data.loader import Loader, Work
from engine.data.order import Order, Share
from engine.data.views import ViewPolicy

POLICY = ViewPolicy(seed=3, pixels=16)


class Kept(list):
    """A block whose life can be watched."""


class Watched:
    """A corpus that knows which of its blocks were read, and how many samples are alive."""

    def __init__(self, corpus: Corpus, fail_at: int = -1) -> None:
        self._corpus, self._fail_at = corpus, fail_at
        self.counts = corpus.counts
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

    def _died(self, samples: int) -> None:
        with self._lock:
            self.alive -= samples


@pytest.fixture
def corpus(corpus_folder) -> Corpus:
    return Corpus.open(str(corpus_folder), 4)  # blocks of 4, 4, 2, 4, 4, 2, 4


@pytest.fixture
def loader_of(request):
    """loader_of(corpus, works, ...): a Loader that is closed at the end of the test."""

    def make(corpus, works, kept_samples: int = 100, ahead: int = 2) -> Loader:
        decoder = Decoder(POLICY, "cpu", threads=1)
        loader = Loader(corpus, decoder, works, kept_samples, ahead)
        request.addfinalizer(loader.close)
        return loader

    return make


def works_of(corpus: Corpus, passes: int = 2) -> Iterator[Work]:
    order = Order(corpus.counts, lanes=2, batch=10, window_samples=8, seed=1)
    for pass_ in range(passes):
        for step in range(order.steps):
            soon = tuple((p, block) for p, block in order.coming(pass_, step) if p < passes)
            share = order.share(pass_, step)
            yield Work("shards", pass_ * order.steps + step, pass_, share, soon)


def whole_block(corpus: Corpus, block: int, step: int = 0) -> Work:
    count = int(corpus.counts[block])
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
            image = batch.images_BCHW[i].permute(1, 2, 0).numpy()
            assert batch.valid_B[i] == valid and batch.reasons[i] is None
            if valid:
                sample = corpus.read(int(block))[offset]
                assert np.array_equal(image, decoder.decode([sample], work.view)[0][0])
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
    watched = Watched(corpus)
    works = [whole_block(corpus, step % 7, step) for step in range(50)]
    loader = Loader(watched, Decoder(POLICY, "cpu", 1), works, 100, ahead=1)  # type: ignore[arg-type]
    wait_until(lambda: len(watched.reads) >= 2)  # one is ready, the next has nowhere to go
    loader.close()
    loader.close()  # once more does no harm
    assert set(threading.enumerate()) <= before
    assert len(set(watched.reads)) < 7


def test_blocks_are_kept_within_bounds(corpus, loader_of):
    """Blocks come round three times: at most 8 samples are kept, and the 4 of the batch in hand."""
    watched = Watched(corpus)
    works = [whole_block(corpus, step % 7, step) for step in range(21)]
    assert len(list(loader_of(watched, works, kept_samples=8))) == 21
    assert watched.most_alive <= 8 + 4
    assert len(watched.reads) == 21


def test_a_block_that_is_kept_is_read_once(corpus, loader_of):
    watched = Watched(corpus)
    assert len(list(loader_of(watched, works_of(corpus, passes=3), kept_samples=24))) == 9
    assert sorted(watched.reads) == list(range(7))


def test_a_block_announced_last_is_kept_longest(corpus, loader_of):
    """8 samples fit, two blocks. 3 is announced with 1 and used at the end: 0 goes, used or not."""
    watched = Watched(corpus)
    works = [whole_block(corpus, block, step) for step, block in enumerate([0, 1, 0, 3])]
    works[1] = works[1]._replace(soon=((0, 1), (0, 3)))
    list(loader_of(watched, works, kept_samples=8))
    assert sorted(watched.reads) == [0, 0, 1, 3] and watched.reads[-1] == 0


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
