"""engine.data.permute: a bijection that is the same on every machine, for ever."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.data.permute import key_of, lengthened, permute, permute_each


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


@given(
    st.lists(st.tuples(st.integers(1, 5000), *[st.integers(0, 2**40)] * 2), min_size=1),
    st.integers(0, 2**64),
)
def test_each_index_with_its_own_size_and_key_goes_where_it_goes_alone(
    rows: list[tuple[int, int, int]], seed: int
):
    sizes, a, b = np.array(rows, np.int64).T
    index = (a ^ b) % sizes
    keys = lengthened(lengthened(np.array(key_of(seed), np.uint64), a), b)
    assert keys.tolist() == [key_of(seed, *row[1:]) for row in rows]
    alone = [
        permute(index[[i]], size, seed, *words).item() for i, (size, *words) in enumerate(rows)
    ]
    assert permute_each(index, sizes, keys).tolist() == alone
