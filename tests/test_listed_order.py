"""The order over a list of samples: each of them once a pass, and no other."""

import tracemalloc
from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from engine.config import CorpusConfig
from engine.data.listed_order import ListedOrder, order_of
from engine.data.order import Blocks, Order, Share
from engine.data.sample_list import SampleList
from engine.train.bad_numbers import samples_of
from engine.train.loop import kept, training_works


def listed(blocks: Blocks, keep: np.ndarray) -> SampleList:
    """A list of the samples for which `keep`, bool [samples], is True."""
    ends = np.cumsum(blocks.lengths(np.arange(len(blocks))))
    counts = np.bincount(
        np.searchsorted(ends, np.flatnonzero(keep), side="right"), minlength=len(ends)
    )
    return SampleList(blocks, np.packbits(keep), counts)


def by_hand(blocks: Blocks, keep: np.ndarray) -> list[tuple[int, int]]:
    """(block, offset) of the listed samples."""
    lengths = [blocks.at(block).length for block in range(len(blocks))]
    every = [(block, offset) for block, length in enumerate(lengths) for offset in range(length)]
    return [one for one, stays in zip(every, keep.tolist(), strict=True) if stays]


@st.composite
def orders(draw: st.DrawFn, multiple: int = 4) -> tuple[ListedOrder, list[tuple[int, int]]]:
    """An order, and the ids that are listed."""
    shards = draw(st.lists(st.integers(0, 30), min_size=1, max_size=8).filter(any))
    blocks = Blocks(np.array(shards), draw(st.integers(1, 12)))
    draws = np.random.default_rng(draw(st.integers(0, 1000)))
    keep = draws.random(blocks.samples) < draw(st.sampled_from([0.05, 0.5, 0.95, 1.0]))
    keep[draws.integers(len(keep))] = True
    lanes = multiple * draw(st.integers(1, 3))
    order = ListedOrder(
        blocks,
        lanes=lanes,
        batch=lanes * draw(st.integers(1, 5)),
        window_samples=draw(st.integers(1, 20)),
        seed=draw(st.integers(0, 2**63 - 1)),
        listed=listed(blocks, keep),
    )
    return order, by_hand(blocks, keep)


def ids(share: Share) -> list[tuple[int, int]]:
    valid = share.valid
    return list(zip(share.blocks[valid].tolist(), share.offsets[valid].tolist(), strict=True))


@given(orders(), st.integers(0, 5))
def test_every_listed_sample_comes_exactly_once_a_pass(made, pass_: int):
    order, wanted = made
    came = [one for step in range(order.steps) for one in ids(order.share(pass_, step))]
    assert sorted(came) == wanted and order.samples == len(wanted)
    assert all(order.share(pass_, step).valid.any() for step in range(order.steps))
    assert (
        order.steps
        == Order(Blocks(np.array([len(wanted)]), 5), order.lanes, order.batch, 9, 0).steps
    )


@given(orders(), st.integers(0, 5), st.sampled_from([1, 2, 4]))
def test_a_step_holds_the_same_samples_at_any_world_size(made, pass_: int, world: int):
    order, _ = made
    for step in range(order.steps):
        shares = [order.share(pass_, step, rank, world) for rank in range(world)]
        assert {len(share.valid) for share in shares} == {order.batch // world}
        together = sorted(one for share in shares for one in ids(share))
        assert together == sorted(ids(order.share(pass_, step)))


@given(orders(), st.integers(0, 3), st.sampled_from([1, 2, 4]), st.data())
def test_a_step_needs_no_steps_before_it(made, pass_: int, world: int, data: st.DataObject):
    """Also in another process, and after other passes: it is a function of its arguments."""
    order, _ = made
    rank = data.draw(st.integers(0, world - 1))
    at = data.draw(st.integers(0, order.steps - 1))
    for other in range(5):
        order.share(other, 0)
    fresh = ListedOrder(
        order.blocks, order.lanes, order.batch, order.window_samples, order.seed, order.listed
    )
    pairs = zip(
        order.share(pass_, at, rank, world), fresh.share(pass_, at, rank, world), strict=True
    )
    assert all(np.array_equal(one, other) for one, other in pairs)
    assert order.coming(pass_, at, rank, world) == fresh.coming(pass_, at, rank, world)


@given(orders(), st.integers(0, 10_000), st.sampled_from([1, 2, 4]))
def test_coming_names_what_will_be_used_and_nothing_else(made, at: int, world: int):
    """From a pass's start, and for a run that goes on in the middle of one."""
    order, _ = made
    at %= order.steps
    for rank in range(world):
        named, used = set(), set()
        for step in range(order.steps):
            named.update(order.coming(0, step, rank, world))
            now = {(0, block) for block, _ in ids(order.share(0, step, rank, world))}
            assert now <= named
            used |= now
        assert {one for one in named if one[0] == 0} == used
        known = set(order.coming(0, at, rank, world, afresh=True))
        for step in range(at, order.steps):
            known.update(order.coming(0, step, rank, world))
            assert {(0, block) for block, _ in ids(order.share(0, step, rank, world))} <= known


@given(orders())
def test_padding_too_names_listed_samples(made):
    order, wanted = made
    share = order.share(0, order.steps - 1)
    assert set(zip(share.blocks.tolist(), share.offsets.tolist(), strict=True)) <= set(wanted)


@given(orders())
def test_samples_of_steps_are_told_by_their_place_in_the_corpus(made):
    order, wanted = made
    told = sorted((shard, position) for _, shard, position in samples_of(order, range(order.steps)))
    where = [order.blocks.at(block) for block, _ in wanted]
    assert told == [(b.shard, b.start + o) for b, (_, o) in zip(where, wanted, strict=True)]


def test_passes_and_seeds_differ_and_blocks_keep_together():
    blocks = Blocks(np.array([100] * 5), 10)
    keep = np.random.default_rng(0).random(500) < 0.8
    firsts = set()
    for seed in (1, 2):
        order = ListedOrder(blocks, 1, 8, 16, seed, listed(blocks, keep))
        for pass_ in range(3):
            came = [b for step in range(order.steps) for b, _ in ids(order.share(pass_, step))]
            firsts.add(tuple(came))
            windows = [came[low : low + 16] for low in range(0, len(came), 16)]
            assert max(Counter(b for w in windows for b in set(w)).values()) <= 2
            assert all(len(set(window)) <= 5 for window in windows[:-1])
    assert len(firsts) == 6


def test_what_is_held_of_blocks_counts_what_is_not_listed():
    """Blocks held within kept(), the longest ago dropped first: few come twice."""
    draws = np.random.default_rng(0)
    blocks = Blocks(draws.integers(1, 640, 50), 64)
    for share, most in ((0.95, 1.3), (0.3, 1.3)):
        keep = draws.random(blocks.samples) < share
        order = ListedOrder(blocks, 4, 32, 4 * 64, 1, listed(blocks, keep))
        held: dict[int, int] = {}
        reads = 0
        for work in training_works(order, 1, 1, 0, 1, 0):
            needed = np.unique(work.share.blocks[work.share.valid]).tolist()
            named = [*((b, False) for b in needed), *((b, True) for _, b in work.soon)]
            for block, announced in named:
                reads += block not in held
                if announced or block not in held:
                    held.pop(block, None)
                    held[block] = blocks.at(block).length
                while sum(held.values()) > kept(order, 1):
                    del held[next(iter(held))]
        assert reads < most * len(order.listed.used)


def test_a_list_of_all_is_no_other_set_and_none_is_the_plain_order():
    blocks = Blocks(np.array([7, 0, 3, 9]), 4)
    config = CorpusConfig(lanes=2, window_blocks=2, block_samples=4)
    plain = order_of(config, blocks, None, 6, 11)
    assert type(plain) is Order and plain.window_samples == 8 and plain.seed == 11
    whole = order_of(config, blocks, listed(blocks, np.ones(19, bool)), 6, 11)
    assert isinstance(whole, ListedOrder) and whole.steps == plain.steps
    assert whole.spread == 1


def test_an_order_never_changes():
    """Resuming a run on a newer version relies on these numbers."""
    blocks = Blocks(np.array([7, 0, 3, 9]), 4)
    order = ListedOrder(blocks, 2, 6, 8, 11, listed(blocks, np.arange(19) % 3 > 0))
    shares = [order.share(5, step) for step in range(order.steps)]
    assert [ids(share) for share in shares] == [
        [(4, 2), (3, 0), (0, 2), (2, 1), (3, 1), (2, 0)],
        [(4, 3), (0, 1), (4, 0), (3, 3), (1, 0), (1, 1)],
    ]


def test_lists_take_a_bit_a_sample_and_little_a_block():
    samples = 4_000_000
    blocks = Blocks(np.full(100, samples // 100), 512)
    keep = np.random.default_rng(0).random(samples) < 0.9
    order = ListedOrder(blocks, 64, 4096, 2048, 1, listed(blocks, keep))
    tracemalloc.start()
    share = order.share(1, order.steps // 2)
    coming = order.coming(1, order.steps // 2, afresh=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert share.valid.all() and {(1, b) for b in share.blocks.tolist()} <= set(coming)
    assert order.listed.bits.nbytes == samples // 8 and peak < 4 * 2**20 + 200 * len(blocks)
