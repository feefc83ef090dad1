"""engine.data.order: each sample once a pass, the same steps at any world size."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.data.order import Order, Share, cut_blocks, permute


@st.composite
def orders(draw: st.DrawFn, multiple: int = 1) -> Order:
    lanes = multiple * draw(st.integers(1, 4))
    return Order(
        counts=np.array(draw(st.lists(st.integers(1, 9), min_size=1, max_size=12)), np.int64),
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
    return [(b, offset) for b, count in enumerate(order.counts.tolist()) for offset in range(count)]


@given(size=st.one_of(st.integers(1, 300), st.integers(1, 20_000)), key=st.integers(0, 2**64))
def test_permute_is_a_bijection(size: int, key: int):
    images = permute(np.arange(size), size, key, 3)
    assert np.array_equal(np.sort(images), np.arange(size))


@pytest.mark.parametrize("size", [2**40 - 1, 2**40, 2**40 + 1, 2**62])
def test_permute_stays_inside_a_huge_range_without_collisions(size: int):
    index = np.arange(50_000) * (size // 50_000)
    images = permute(index, size, 1)
    assert images.min() >= 0 and images.max() < size
    assert len(np.unique(images)) == len(index)


def test_permute_spreads_evenly():
    """The mean place that a sample goes to, over many keys, is the middle: for each sample."""
    size, keys = 37, 400
    places = np.stack([permute(np.arange(size), size, key) for key in range(keys)])
    deviation = np.sqrt((size**2 - 1) / 12 / keys)
    assert np.abs(places.mean(axis=0) - (size - 1) / 2).max() < 4.5 * deviation
    assert places.std(axis=0).min() > 0.85 * np.sqrt((size**2 - 1) / 12)


def test_permute_never_changes():
    """Resuming a run on a newer version relies on these numbers."""
    assert permute(np.arange(8), 8, 1, 2).tolist() == [4, 6, 5, 2, 1, 0, 3, 7]
    far = permute(np.array([0, 10**12]), 2 * 10**12, 7)
    assert far.tolist() == [1833591069713, 247722258708]


@given(st.lists(st.integers(0, 40), min_size=1, max_size=9), st.integers(1, 12))
def test_blocks_tile_every_shard(samples: list[int], most: int):
    blocks = cut_blocks(np.array(samples, np.int64), most)
    assert blocks[:, 2].max(initial=1) <= most and blocks[:, 2].min(initial=1) >= 1
    covered = [(s, at + i) for s, at, length in blocks.tolist() for i in range(length)]
    assert covered == [(s, i) for s, count in enumerate(samples) for i in range(count)]
    assert len(blocks) == sum(-(-count // most) for count in samples)


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


def test_a_window_comes_one_window_ahead_and_no_earlier():
    order = Order(np.full(6, 10, np.int64), lanes=1, batch=5, window_samples=10, seed=5)
    assert [len(order.coming(0, step)) for step in range(8)] == [2, 0, 1, 0, 1, 0, 1, 0]


def test_the_end_of_a_pass_brings_the_start_of_the_next():
    order = Order(np.full(6, 10, np.int64), lanes=2, batch=4, window_samples=10, seed=5)
    named = {one for step in range(order.steps) for one in order.coming(0, step)}
    first = {(1, block) for step in range(5) for block, _ in ids(order.share(1, step))}
    assert len(first) == 2 and first == {one for one in named if one[0] == 1}


def test_passes_and_seeds_differ():
    counts = np.full(40, 5, np.int64)
    orders_ = [Order(counts, lanes=4, batch=20, window_samples=10, seed=seed) for seed in (1, 2)]
    seen = [pass_ids(order, pass_) for order in orders_ for pass_ in range(3)]
    assert len({tuple(one) for one in seen}) == 6
    assert [pass_ids(orders_[0], pass_) for pass_ in range(3)] == seen[:3]
    blocks = {tuple(block for block, _ in one[:10]) for one in seen}
    assert len({frozenset(first) for first in blocks}) == 6  # the blocks too, not only the samples


def test_samples_are_shuffled_within_windows_and_no_further():
    """One lane, windows of three blocks: samples 0-29 come from three blocks, mixed."""
    order = Order(np.full(9, 10, np.int64), lanes=1, batch=5, window_samples=30, seed=3)
    came = pass_ids(order, 0)
    for low in range(0, 90, 30):
        blocks = [block for block, _ in came[low : low + 30]]
        assert len(set(blocks)) == 3
        assert len(set(blocks[:10])) > 1


def test_a_billion_samples_need_no_list_of_samples():
    """A step is planned in memory of the blocks' size (244,141 of them): a few dozen MB at most."""
    blocks = cut_blocks(np.full(100_000, 10_000, np.int64), 4096)
    order = Order(blocks[:, 2], lanes=64, batch=4096, window_samples=4 * 4096, seed=1)
    tracemalloc.start()
    share = order.share(1, order.steps // 2)
    coming = order.coming(1, order.steps // 2) or order.coming(1, 0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert order.samples == 10**9 and share.valid.all() and coming
    assert peak < 100 * 2**20 < order.samples
