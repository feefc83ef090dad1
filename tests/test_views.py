"""engine.data.views: the generator, and crops drawn as torchvision draws them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.data.crop import shrinkage
from engine.data.views import (
    TEST_VIEW,
    ViewPolicy,
    on_grid,
    philox,
    train_windows,
)
from engine.data.views import test_windows as clip_windows

# Random123 1.14.0, tests/kat_vectors, philox4x32 10: counter, key, expected.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_gives_the_published_numbers(counter: str, key: str, expected: str):
    low, high = words(key)
    out = philox(np.array([words(counter)], np.uint64), high << 32 | low)
    assert out.tolist() == [words(expected)]


@given(st.lists(st.tuples(*[st.integers(0, 2**32 - 1)] * 4), min_size=1, max_size=9))
def test_a_word_depends_on_its_own_counter(counters: list[tuple[int, int, int, int]]):
    """And neither on the others nor on their order."""
    together = philox(np.array(counters, np.uint64), 2**63 + 9)
    alone = [philox(np.array([one], np.uint64), 2**63 + 9)[0].tolist() for one in counters]
    assert together.tolist() == alone


def windows(n: int, width: int, height: int, seed: int = 7, view: int = 0, scale: float = 0.08):
    size_B2 = np.tile([width, height], (n, 1))
    return train_windows(seed, view, np.zeros(n, np.int64), np.arange(n), size_B2, scale)


def torchvision_windows(n: int, width: int, height: int, scale: float) -> np.ndarray:
    from torchvision.transforms import RandomResizedCrop

    image = torch.empty(1, height, width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        drawn = [
            RandomResizedCrop.get_params(image, [scale, 1.0], [3 / 4, 4 / 3]) for _ in range(n)
        ]
    return np.array([(left, top, w, h) for top, left, h, w in drawn], np.float64)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Two-sample Kolmogorov-Smirnov statistic, times sqrt(nm/(n+m)): above 1.95 at p < 0.001."""
    both = np.sort(np.concatenate([a, b]))
    cdf = [np.searchsorted(np.sort(x), both, side="right") / len(x) for x in (a, b)]
    return float(np.abs(cdf[0] - cdf[1]).max() * np.sqrt(len(a) * len(b) / (len(a) + len(b))))


MEASURES = {
    "area": lambda x, y, w, h: w * h,
    "log ratio": lambda x, y, w, h: np.log(w / h),
    "left": lambda x, y, w, h: x,
    "top": lambda x, y, w, h: y,
    "right": lambda x, y, w, h: x + w,
    "bottom": lambda x, y, w, h: y + h,
    "left of small": lambda x, y, w, h: x[w * h < np.median(w * h)],
}


@pytest.mark.parametrize(
    ("width", "height", "scale"), [(500, 375, 0.08), (300, 900, 0.08), (64, 64, 0.5)]
)
def test_windows_are_drawn_as_torchvision_draws_them(width: int, height: int, scale: float):
    ours = windows(20_000, width, height, scale=scale).xywh_B4
    theirs = torchvision_windows(4_000, width, height, scale)
    for name, measure in MEASURES.items():
        assert distance(measure(*ours.T), measure(*theirs.T)) < 1.95, name


def test_the_test_of_distributions_can_tell_a_scale_from_another():
    ours = windows(20_000, 500, 375, scale=0.12).xywh_B4
    theirs = torchvision_windows(4_000, 500, 375, 0.08)
    assert distance(MEASURES["area"](*ours.T), MEASURES["area"](*theirs.T)) > 1.95


@pytest.mark.parametrize("size", [(1000, 10), (10, 1000), (1001, 11), (11, 1001), (7, 100)])
def test_extreme_images_fall_back_to_the_centre_as_in_torchvision(size: tuple[int, int]):
    """No window of 0.9 of the area with a ratio in bounds fits: the fallback is all there is."""
    fallback = torchvision_windows(1, *size, 0.9)
    assert np.array_equal(windows(50, *size, scale=0.9).xywh_B4, np.tile(fallback, (50, 1)))


def test_every_try_is_used():
    """About 2 in 3 tries do not fit a 3:1 image; the fallback is as rare as ten tries make it."""
    ours = windows(20_000, 900, 300).xywh_B4
    central = np.all(ours == [250, 0, 400, 300], axis=1).mean()
    theirs = np.all(torchvision_windows(4_000, 900, 300, 0.08) == [250, 0, 400, 300], axis=1).mean()
    assert abs(central - theirs) < 4 * np.sqrt(max(theirs, 1e-3) / 4_000)


def test_the_coin_is_fair_and_independent_of_the_window():
    out = windows(20_000, 500, 375)
    left = out.xywh_B4[:, 0]
    assert abs(out.flip_B.mean() - 0.5) < 4 * 0.5 / np.sqrt(20_000)
    assert abs(np.corrcoef(out.flip_B, left)[0, 1]) < 4 / np.sqrt(20_000)


def test_the_coins_of_a_sample_are_fair_over_its_views():
    flips = np.stack([windows(50, 500, 375, view=view).flip_B for view in range(400)])
    assert np.abs(flips.mean(axis=0) - 0.5).max() < 4 * 0.5 / np.sqrt(400)


def test_draws_of_views_seeds_and_samples_are_unrelated():
    base = windows(5_000, 500, 375).xywh_B4
    shard_1 = train_windows(
        7, 0, np.ones(5_000, int), np.arange(5_000), np.tile([500, 375], (5_000, 1)), 0.08
    ).xywh_B4
    others = [windows(5_000, 500, 375, view=1).xywh_B4, windows(5_000, 500, 375, seed=8).xywh_B4]
    for other in [*others, shard_1, np.roll(base, 1, axis=0)]:
        for column in range(4):
            related = np.corrcoef(base[:, column], other[:, column])[0, 1]
            assert abs(related) < 4.5 / np.sqrt(5_000)


@given(st.lists(st.tuples(*[st.integers(1, 3000)] * 2), min_size=2, max_size=9), st.integers(0, 99))
def test_a_view_is_inside_its_image_and_depends_on_nothing_else(sizes, view: int):
    size_B2 = np.array(sizes)
    shard_B, position_B = np.arange(len(sizes)) % 3, np.arange(len(sizes)) * 11
    policy = ViewPolicy(seed=5, pixels=64)
    out = policy.windows(view, shard_B, position_B, size_B2)
    x, y, w, h = out.xywh_B4.T
    assert (x >= 0).all() and (y >= 0).all() and (w >= 1).all() and (h >= 1).all()
    assert (x + w <= size_B2[:, 0]).all() and (y + h <= size_B2[:, 1]).all()
    for i in reversed(range(len(sizes))):
        alone = policy.windows(view, shard_B[[i]], position_B[[i]], size_B2[[i]])
        assert np.array_equal(alone.xywh_B4[0], out.xywh_B4[i])
        assert alone.flip_B[0] == out.flip_B[i]


def test_windows_never_change():
    """Stored labels rely on these numbers."""
    out = windows(4, 640, 480, seed=2**40 + 3, view=4)
    assert out.xywh_B4.tolist() == [
        [42, 34, 269, 233],
        [50, 34, 485, 368],
        [263, 9, 201, 226],
        [129, 44, 487, 423],
    ]
    assert out.flip_B.tolist() == [True, True, True, False]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((224, 224), (0, 0, 224, 224)),
        ((448, 224), (112, 0, 224, 224)),
        ((1000, 500), (250, 0, 500, 500)),
        ((100, 400), (0, 150, 100, 100)),
        # 333 x 500 becomes 224 x 336 (336.3 cut); its crop starts at row 56 of 336
        ((333, 500), (0, 56 * 500 / 336, 333, 224 * 500 / 336)),
        # 300 x 225 becomes 298 x 224: an odd rest of 74 / 2 = 37
        ((300, 225), (37 * 300 / 298, 0, 224 * 300 / 298, 225)),
        # 225 x 224 becomes 225 x 224: half a pixel is rounded to even, as Python's round does
        ((225, 224), (0, 0, 224, 224)),
        ((227, 224), (2, 0, 224, 224)),
        ((1, 1), (0, 0, 1, 1)),
    ],
)
def test_the_test_view_is_clips_centre_crop(size, expected):
    out = ViewPolicy(seed=1, pixels=224).windows(
        TEST_VIEW, np.zeros(1, int), np.zeros(1, int), np.array([size])
    )
    assert out.xywh_B4[0] == pytest.approx(expected, abs=1e-9)
    assert not out.flip_B.any()
    assert np.array_equal(out.xywh_B4, clip_windows(np.array([size]), 224).xywh_B4)


@given(
    st.lists(
        st.tuples(*[st.integers(0, 5000)] * 2, *[st.integers(1, 5000)] * 2), min_size=1, max_size=9
    )
)
def test_large_windows_lie_on_a_grid_and_small_ones_as_they_are_drawn(drawn):
    windows = np.array(drawn, np.float64)
    laid = on_grid(windows)
    for (x, y, w, h), new in zip(windows.tolist(), laid.tolist(), strict=True):
        step = 8 if min(w, h) >= 448 else 1
        assert all(side % step == 0 for side in new)
        assert x - step < new[0] <= x and y - step < new[1] <= y
        assert w - step < new[2] <= w and h - step < new[3] <= h
        assert step == 1 or min(new[2:]) >= 448


@pytest.mark.parametrize("pixels", [224, 240, 336, 448])
def test_what_a_decoder_shrinks_has_whole_edges(pixels: int):
    policy, n = ViewPolicy(1, pixels), 2000
    size_B2 = np.random.default_rng(0).integers(300, 6000, (n, 2))
    drawn = policy.windows(0, np.zeros(n, int), np.arange(n), size_B2).xywh_B4.astype(int)
    factors = {1}
    for x, y, w, h in drawn.tolist():
        factor = shrinkage((x, y, x + w, y + h), pixels)
        factors.add(factor)
        assert not any(side % factor for side in (x, y, w, h))
    assert factors == {1, 2, 4, 8}


def test_a_view_is_the_same_window_whatever_its_size():
    size_B2 = np.tile([4000, 3000], (1000, 1))
    small, large = (
        ViewPolicy(1, pixels).windows(0, np.zeros(1000, int), np.arange(1000), size_B2)
        for pixels in (224, 336)
    )
    assert np.array_equal(small.xywh_B4, large.xywh_B4)
    assert np.array_equal(small.flip_B, large.flip_B)
