"""A keyed bijection of the integers below any size: shuffles of anything, in constant memory."""

import numpy as np

__all__ = ["key_of", "lengthened", "permute", "permute_each"]

_64_BITS = 0xFFFFFFFFFFFFFFFF
_GOLDEN = 0x9E3779B97F4A7C15
_FEW = 10  # words that plain integers are faster for
# As arrays of no dimensions: numpy takes twice as long for scalars.
_30, _27, _31, _1 = (np.array(bits, np.uint64) for bits in (30, 27, 31, 1))
_FACTORS = [np.array(factor, np.uint64) for factor in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)]
_POWERS = np.uint64(1) << np.arange(64, dtype=np.uint64)


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele, Lea, Flood 2014): a bijection of 64-bit words."""
    x = (x ^ (x >> _30)) * _FACTORS[0]
    x = (x ^ (x >> _27)) * _FACTORS[1]
    return x ^ (x >> _31)


def _mix_int(x: int) -> int:
    """_mix() of one word, without numpy's cost of a call."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _64_BITS
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _64_BITS
    return x ^ (x >> 31)


def _spread_int(word: int) -> int:
    return _mix_int((word * _GOLDEN + 1) & _64_BITS)


_ROUNDS = np.array([_spread_int(round_) for round_ in range(6)], np.uint64)[:, None]


def key_of(*words: int) -> int:
    """A key of 64 bits for some integers."""
    key = 0
    for word in words:
        key = _mix_int(key ^ _spread_int(word))
    return key


def lengthened(keys: np.ndarray, words: np.ndarray) -> np.ndarray:
    """key_of() of one word more than made `keys` (uint64); the arrays broadcast."""
    return _mix(keys ^ _mix(words.astype(np.uint64) * np.uint64(_GOLDEN) + _1))


def permute(index: np.ndarray, size: int, *key: int) -> np.ndarray:
    """Images of `index` (ints in [0, size)) under a keyed bijection of [0, size).

    A six-round Feistel network over the next even number of bits, walked until it lands inside the
    range (Black and Rogaway 2002): constant memory at any size, and the same on every machine.
    """
    return permute_each(index, np.array([size]), np.array([key_of(*key)], np.uint64))


def permute_each(index: np.ndarray, sizes: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """permute() where each index has its own size, and its own key from key_of() (uint64)."""
    assert (index >= 0).all() and (index < sizes).all()
    sizes = np.broadcast_to(sizes.astype(np.uint64), index.shape)
    bits = np.searchsorted(_POWERS, sizes - _1, side="right")
    half = (np.maximum(bits + 1, 2) // 2).astype(np.uint64)
    rounds = np.broadcast_to(_mix(keys ^ _ROUNDS), (len(_ROUNDS), *index.shape))
    out = _walk(index.astype(np.uint64), half, rounds)
    rows = np.flatnonzero(out >= sizes)
    while len(rows) > _FEW:
        out[rows] = walked = _walk(out[rows], half[rows], rounds[:, rows])
        rows = rows[walked >= sizes[rows]]
    for row in rows.tolist():
        x = int(out[row])
        while x >= sizes[row]:
            x = _walk_int(x, int(half[row]), rounds[:, row].tolist())
        out[row] = x
    return out.astype(np.int64)


def _walk(x: np.ndarray, half: np.ndarray, rounds: np.ndarray) -> np.ndarray:
    """Six rounds of words of twice `half` bits."""
    low = (_1 << half) - _1
    left, right = x >> half, x & low
    for key in rounds:
        left, right = right, left ^ (_mix(right + key) & low)
    return (left << half) | right


def _walk_int(x: int, half: int, rounds: list[int]) -> int:
    """_walk() of one word."""
    low = (1 << half) - 1
    left, right = x >> half, x & low
    for key in rounds:
        left, right = right, left ^ (_mix_int((right + key) & _64_BITS) & low)
    return (left << half) | right
