"""engine.data.order: each sample once a pass, the same steps at any world size."""

import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.data.batches import training_works
from engine.data.order import Blocks, Order, Share
from engine.train.loop import kept

SHARDS = st.lists(st.one_of(st.integers(0, 9), st.integers(0, 30)), min_size=1, max_size=12)


def corpus(samples: list[int], block_samples: int) -> Blocks:
    return Blocks(np.array(samples, np.int64), block_samples)


@st.composite
def orders(draw: st.DrawFn, multiple: int = 1) -> Order:
    lanes = multiple * draw(st.integers(1, 4))
    return Order(
        corpus(draw(SHARDS.filter(any)), draw(st.integers(1, 12))),
        lanes=lanes,
        batch=lanes * draw(st.integers(1, 7)),
        window_samples=draw(st.integers(1, 20)),
        seed=draw(st.integers(0, 2**63 - 1)),
    )


def ids(share: Share) -> list[tuple[int, int]]:
    valid = share.valid
    return list(zip(share.blocks[valid].tolist(), share.offsets[valid].tolist(), strict=True))


def pass_ids(order: Order, pass_: int) -> list[tuple[int, int]]:
    return [one for step in range(order.steps) for one in ids(order.share(pass_, step))]


def every_id(order: Order) -> list[tuple[int, int]]:
    lengths = [order.blocks.at(block).length for block in range(len(order.blocks))]
    return [(block, offset) for block, length in enumerate(lengths) for offset in range(length)]


@given(SHARDS, st.integers(1, 12))
def test_blocks_tile_every_shard(samples: list[int], most: int):
    blocks = corpus(samples, most)
    cut = [blocks.at(block) for block in range(len(blocks))]
    assert all(1 <= length <= most for _, _, length in cut)
    covered = [(s, at + i) for s, at, length in cut for i in range(length)]
    assert covered == [(s, i) for s, count in enumerate(samples) for i in range(count)]
    lengths = [length for _, _, length in cut]
    assert blocks.lengths(np.arange(len(blocks))).tolist() == lengths
    assert len(blocks) == sum(-(-count // most) for count in samples)
    assert blocks.samples == sum(samples) and blocks.largest == max(lengths, default=0)
    with pytest.raises(AssertionError):
        blocks.at(len(blocks))


@given(orders(), st.integers(0, 5))
def test_every_sample_comes_exactly_once_a_pass(order: Order, pass_: int):
    assert sorted(pass_ids(order, pass_)) == every_id(order)


@given(orders(multiple=4), st.integers(0, 5), st.sampled_from([1, 2, 4]))
def test_a_step_holds_the_same_samples_at_any_world_size(order: Order, pass_: int, world: int):
    for step in range(order.steps):
        shares = [order.share(pass_, step, rank, world) for rank in range(world)]
        assert {len(share.valid) for share in shares} == {order.batch // world}
        together = sorted(one for share in shares for one in ids(share))
        assert together == sorted(ids(order.share(pass_, step)))


@given(orders(multiple=4), st.sampled_from([1, 2, 4]))
def test_a_pass_has_no_step_too_many(order: Order, world: int):
    """Every step trains something, and one more than the last is refused on all ranks alike."""
    assert all(order.share(0, step).valid.any() for step in range(order.steps))
    for rank in range(world):
        with pytest.raises(AssertionError):
            order.share(0, order.steps, rank, world)


@given(orders())
def test_only_the_end_of_a_lane_is_padded(order: Order):
    per_lane = order.batch // order.lanes
    valid = [order.share(0, step).valid.reshape(-1, per_lane) for step in range(order.steps)]
    for lane in np.concatenate(valid, axis=1):
        assert not np.any(np.diff(lane.astype(int)) > 0)  # never valid again after padding
    if order.samples % order.batch == 0:
        assert np.concatenate(valid).all()


@given(orders(multiple=4), st.sampled_from([1, 2, 4]))
def test_coming_names_every_block_before_it_is_used(order: Order, world: int):
    """Also two windows ahead: a block of a window not yet entered has been asked for already."""
    per_lane = order.batch // order.lanes
    for rank in range(world):
        known: set[tuple[int, int]] = set()
        for pass_ in range(3):
            for step in range(order.steps):
                known.update(order.coming(pass_, step, rank, world))
                used = ids(order.share(pass_, step, rank, world))
                assert {(pass_, block) for block, _ in used} <= known
                entered = ((step + 1) * per_lane - 1) // order.window_samples
                ahead = (entered + 1) * order.window_samples // per_lane
                if ahead < order.steps:
                    early = order.share(pass_, ahead, rank, world)
                    firsts = early.blocks.reshape(-1, per_lane)
                    place = (entered + 1) * order.window_samples - ahead * per_lane
                    inside = early.valid.reshape(-1, per_lane)[:, place]
                    assert {(pass_, b) for b in firsts[inside, place].tolist()} <= known


@given(orders(multiple=4), st.integers(0, 10_000), st.sampled_from([1, 2, 4]))
def test_a_run_that_starts_in_mid_pass_learns_of_all_it_will_use(order: Order, at: int, world: int):
    at %= order.steps
    for rank in range(world):
        known = set(order.coming(0, at, rank, world, afresh=True))
        for step in range(at, order.steps):
            known.update(order.coming(0, step, rank, world))
            assert {(0, block) for block, _ in ids(order.share(0, step, rank, world))} <= known


@given(orders(multiple=4), st.sampled_from([1, 2, 4]))
def test_coming_names_only_what_its_rank_will_use(order: Order, world: int):
    for rank in range(world):
        used, named = set(), set()
        for step in range(order.steps):
            named.update(b for p, b in order.coming(0, step, rank, world) if p == 0)
            used.update(block for block, _ in ids(order.share(0, step, rank, world)))
        assert named == used


@given(orders(multiple=4), st.integers(0, 5), st.sampled_from([1, 2, 4]), st.data())
def test_a_step_needs_no_steps_before_it(order: Order, pass_: int, world: int, data: st.DataObject):
    fresh = Order(order.blocks, order.lanes, order.batch, order.window_samples, order.seed)
    rank = data.draw(st.integers(0, world - 1))
    at = data.draw(st.integers(0, order.steps - 1))
    shares = [order.share(pass_, step, rank, world) for step in range(at + 1)]
    coming = [order.coming(pass_, step, rank, world) for step in range(at + 1)]
    for column, alone in zip(shares[at], fresh.share(pass_, at, rank, world), strict=True):
        assert np.array_equal(column, alone)
    assert coming[at] == fresh.coming(pass_, at, rank, world)


@given(orders())
def test_padding_too_names_samples_that_there_are(order: Order):
    share = order.share(0, order.steps - 1)
    everything = {block for block, _ in every_id(order)}
    assert set(share.blocks.tolist()) <= everything
    assert (share.offsets < order.blocks.lengths(share.blocks)).all() and share.offsets.min() >= 0


@given(orders(multiple=4), st.sampled_from([1, 2, 4]))
def test_a_window_is_announced_once_a_pass(order: Order, world: int):
    """A block is named once for each window of a lane that has some of it; of the next pass, only
    the blocks of the lanes' first windows."""
    per_lane = order.batch // order.lanes
    for rank in range(world):
        named = Counter(
            one for step in range(order.steps) for one in order.coming(1, step, rank, world)
        )
        windows, first = set(), set()
        for step in range(order.steps):
            lists = [order.coming(1, step, rank, world)]
            assert all(len(set(one)) == len(one) for one in lists)
            within = np.arange(step * per_lane, (step + 1) * per_lane)
            for lane in range(rank, order.lanes, world):
                for pass_, found in ((1, windows), (2, first)):
                    share = order.share(pass_, step, lane, order.lanes)
                    window = within // order.window_samples
                    for b, w in zip(share.blocks[share.valid], window[share.valid], strict=True):
                        if pass_ == 1 or w == 0:
                            found.add((int(b), lane, int(w)))
        uses = Counter(block for block, _, _ in windows)
        assert all(named[1, block] <= count for block, count in uses.items())
        assert {b for p, b in named if p == 1} == set(uses)
        assert {b for p, b in named if p == 2} == {block for block, _, _ in first}
        of_next = Counter(block for block, _, _ in first)
        assert all(named[2, block] <= count for block, count in of_next.items())


def test_a_window_comes_one_window_ahead_and_no_earlier():
    order = Order(corpus([60], 10), lanes=1, batch=5, window_samples=10, seed=5)
    assert [len(order.coming(0, step)) for step in range(8)] == [2, 0, 1, 0, 1, 0, 1, 0]


def test_the_end_of_a_pass_brings_the_start_of_the_next():
    order = Order(corpus([60], 10), lanes=2, batch=4, window_samples=10, seed=5)
    named = {one for step in range(order.steps) for one in order.coming(0, step)}
    first = {(1, block) for step in range(5) for block, _ in ids(order.share(1, step))}
    assert len(first) == 2 and first == {one for one in named if one[0] == 1}


def test_a_window_of_short_blocks_brings_them_all():
    """Shards of 3: a unit of 10 has samples of four or five of them."""
    order = Order(corpus([3] * 40, 10), lanes=1, batch=5, window_samples=10, seed=5)
    for step in range(0, order.steps, 2):
        used = {(0, b) for half in (0, 1) for b, _ in ids(order.share(0, step + half))}
        assert len(used) in (4, 5)
        assert used <= set(order.coming(0, step, afresh=True))


def test_passes_and_seeds_differ():
    blocks = corpus([5] * 40, 5)
    orders_ = [Order(blocks, lanes=4, batch=20, window_samples=10, seed=seed) for seed in (1, 2)]
    seen = [pass_ids(order, pass_) for order in orders_ for pass_ in range(3)]
    assert len({tuple(one) for one in seen}) == 6
    assert [pass_ids(orders_[0], pass_) for pass_ in range(3)] == seen[:3]
    firsts = {tuple(block for block, _ in one[:10]) for one in seen}
    assert len({frozenset(first) for first in firsts}) == 6  # the blocks too, not only the samples


def test_samples_are_shuffled_within_windows_and_no_further():
    """One lane, windows of three blocks: samples 0-29 come from three blocks, mixed."""
    order = Order(corpus([90], 10), lanes=1, batch=5, window_samples=30, seed=3)
    came = pass_ids(order, 0)
    for low in range(0, 90, 30):
        blocks = [block for block, _ in came[low : low + 30]]
        assert len(set(blocks)) == 3
        assert len(set(blocks[:10])) > 1


def test_a_block_has_other_neighbours_in_every_pass():
    """Two of 1,000 blocks that share a window of two do so again as rarely as chance has it."""
    order = Order(corpus([10] * 1000, 10), lanes=1, batch=20, window_samples=20, seed=3)
    pairs = [
        {frozenset(order.share(pass_, step).blocks.tolist()) for step in range(order.steps)}
        for pass_ in range(4)
    ]
    assert all(len(one) == 500 for one in pairs)
    assert max(len(a & b) for i, a in enumerate(pairs) for b in pairs[:i]) <= 5  # 0.5 expected


@pytest.mark.parametrize("shards", [[23, 4, 0, 17, 9], [3] * 18, [6, 50]])
def test_every_sample_comes_anywhere_in_a_pass(shards: list[int]):
    """A sample's mean place over many passes is the middle: of whole, short and last blocks."""
    order = Order(corpus(shards, 5), lanes=1, batch=sum(shards), window_samples=5, seed=9)
    passes, n = 400, order.samples
    places = np.zeros((passes, n))
    row = {one: i for i, one in enumerate(every_id(order))}
    for pass_ in range(passes):
        places[pass_, [row[one] for one in pass_ids(order, pass_)]] = np.arange(n)
    deviation = np.sqrt((n**2 - 1) / 12)
    assert np.abs(places.mean(axis=0) - (n - 1) / 2).max() < 4.5 * deviation / np.sqrt(passes)
    assert places.std(axis=0).min() > 0.85 * deviation


def test_an_order_never_changes():
    """Resuming a run on a newer version relies on these numbers."""
    order = Order(corpus([7, 0, 3, 9], 4), lanes=2, batch=6, window_samples=8, seed=11)
    shares = [order.share(5, step) for step in range(order.steps)]
    assert [share.blocks[share.valid].tolist() for share in shares] == [
        [5, 3, 4, 0, 3, 2], [2, 4, 4, 1, 0, 1], [4, 2, 3, 0, 1, 0], [3]
    ]  # fmt: skip
    assert [share.offsets[share.valid].tolist() for share in shares] == [
        [0, 0, 1, 0, 3, 0], [1, 0, 2, 0, 1, 2], [3, 2, 2, 2, 1, 3], [1]
    ]  # fmt: skip


@pytest.mark.parametrize("block_samples", [64, 5])
def test_a_pass_over_short_blocks_reads_few_of_them_twice(block_samples: int):
    """Blocks held within kept(), those announced longest ago dropped first, as the loader does."""
    shards = np.random.default_rng(0).integers(1, 64, 800)
    order = Order(Blocks(shards, block_samples), 4, 32, 4 * block_samples, seed=1)
    held: dict[int, int] = {}
    reads = 0
    for work in training_works(order, 1, 1, 0, 1, 0):
        needed = np.unique(work.share.blocks[work.share.valid]).tolist()
        for block, announced in [*((b, False) for b in needed), *((b, True) for _, b in work.soon)]:
            reads += block not in held
            if announced or block not in held:
                held.pop(block, None)
                held[block] = order.blocks.at(block).length
            while sum(held.values()) > kept(order, 1):
                del held[next(iter(held))]
    assert reads < 1.6 * len(order.blocks)


@pytest.mark.parametrize("ragged", [False, True])
def test_a_billion_samples_are_planned_in_memory_of_the_shards(ragged: bool):
    """Ten times the samples in as many shards take no more."""
    peaks = []
    for samples in (1_000, 10_000):
        shards = np.full(100_000, samples, np.int64)
        if ragged:
            shards = np.random.default_rng(0).integers(0, 2 * samples, 100_000)
        tracemalloc.start()
        order = Order(Blocks(shards, 512), lanes=64, batch=4096, window_samples=2048, seed=1)
        share = order.share(1, order.steps // 2)
        coming = order.coming(1, order.steps // 2, afresh=True)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert order.samples == shards.sum() and share.valid.all() and coming
        assert {(1, block) for block in share.blocks.tolist()} <= set(coming)
    assert max(peaks) < 20 * 2**20 and peaks[1] < 1.2 * peaks[0]
