"""The block cache: damage is a miss, the size is kept, and a folder that fails is left alone."""

import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from engine.storage.cache import BlockCache

ROOT = Path(__file__).parents[1]


def block(key: str, size: int = 1000) -> bytes:
    return random.Random(key).randbytes(size)


def run(code: str, *args: str, prefix: tuple[str, ...] = ()) -> subprocess.Popen:
    return subprocess.Popen(
        [*prefix, sys.executable, "-c", code, *args],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        stderr=subprocess.PIPE,
        text=True,
    )


def held(folder: Path) -> int:
    """Bytes of the blocks in a folder; other processes may be at work there."""
    total = 0
    for entry in os.scandir(folder):
        try:
            total += entry.stat().st_size if entry.name.endswith(".block") else 0
        except FileNotFoundError:
            pass
    return total


def test_what_is_put_is_got(tmp_path):
    cache = BlockCache(tmp_path / "a" / "b", 10**6)
    assert cache.get("x") is None
    for key, data in (("x", b"1"), ("y", b""), ("../z\n\0é", block("z", 5000))):
        cache.put(key, data)
        cache.put(key, data)  # another process may have been faster
        assert BlockCache(tmp_path / "a" / "b", 10**6).get(key) == data
    assert sorted(p.suffix for p in (tmp_path / "a" / "b").iterdir()) == ["", *[".block"] * 3]
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


def test_every_damage_is_a_miss_and_is_removed(tmp_path):
    cache = BlockCache(tmp_path, 10**6)
    data = block("x", 60)
    cache.put("x", data)
    (path,) = tmp_path.glob("*.block")
    whole = path.read_bytes()
    flipped = [
        whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :] for i in range(len(whole))
    ]
    cut = [whole[:i] for i in range(len(whole))]
    for damaged in [*flipped, *cut, whole + b"x", bytes(len(whole))]:
        path.write_bytes(damaged)
        assert cache.get("x") is None and not path.exists()
    cache.put("x", data)
    assert cache.get("x") == data
    cache.put("y", block("y"))  # the block of another key is not taken for this one
    other = next(p for p in tmp_path.glob("*.block") if p != path)
    path.write_bytes(other.read_bytes())
    assert cache.get("x") is None and cache.get("y") == block("y")


def test_blocks_unused_for_longest_go_first(tmp_path):
    cache = BlockCache(tmp_path, 10_500)
    for key in "abcdefghij":  # 10 of 1032 bytes
        cache.put(key, block(key))
        time.sleep(0.01)  # a file's time has the grain of the kernel's tick
    assert cache.get("a") == block("a")
    time.sleep(0.01)
    cache.put("k", block("k"))
    assert [key for key in "abcdefghijk" if cache.get(key)] == list("adefghijk")
    assert held(tmp_path) <= 0.9 * 10_500
    cache.put("big", block("big", 10_000))  # would leave no room for another
    assert cache.get("big") is None and cache.get("k")


def test_half_written_files_are_cleared_away_once_they_are_old(tmp_path):
    old, new = tmp_path / "old.part", tmp_path / "new.part"
    for part in (old, new):
        part.write_bytes(b"half")
    os.utime(old, (1, 1))
    cache = BlockCache(tmp_path, 3000)
    for key in "abc":
        cache.put(key, block(key))
    assert not old.exists() and new.exists()


def test_a_lost_or_wrong_sum_is_mended(tmp_path):
    cache = BlockCache(tmp_path, 5000)
    for told in (b"", b"not a number", b"-1"):
        (tmp_path / "lock").write_bytes(told)
        for key in "abcdefgh":
            cache.put(key + str(told), block(key))
        assert held(tmp_path) <= 5000
        assert int((tmp_path / "lock").read_bytes()) == held(tmp_path)


HAMMER = """
import random, sys, time
from test_cache import block
from engine.storage.cache import BlockCache
folder, seed = sys.argv[1:]
cache, draw, hits = BlockCache(folder, 200_000), random.Random(seed), 0
until = time.monotonic() + 2.5
while time.monotonic() < until:
    key = str(int(draw.triangular(0, 60, 0)))
    data = block(key, 3000 + 100 * int(key))
    got = cache.get(key)
    assert got is None or got == data, key
    hits += got is not None
    if got is None:
        cache.put(key, data)
assert not cache._off and hits > 100, hits
"""


def test_two_processes_share_a_folder(tmp_path):
    running = [run(HAMMER, str(tmp_path), str(seed)) for seed in range(2)]
    most, damaged = 0, 0
    while any(process.poll() is None for process in running):
        if tmp_path.exists():
            most = max(most, held(tmp_path))
            if found := sorted(tmp_path.glob("*.block")):  # damage one now and then
                try:
                    with open(found[0], "r+b") as file:
                        file.seek(100)
                        file.write(b"\0\0\0\0")
                    damaged += 1
                except FileNotFoundError:
                    pass
        time.sleep(0.05)
    for process in running:
        assert process.wait() == 0, process.stderr.read()
    assert 100_000 < most <= 200_000 and damaged > 10
    assert held(tmp_path) <= 200_000 and not list(tmp_path.glob("*.part"))


def test_threads_share_a_cache(tmp_path):
    cache, wrong = BlockCache(tmp_path, 50_000), []

    def hammer(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(200):
            key = str(draw.randrange(80))
            if (got := cache.get(key)) is None:
                cache.put(key, block(key))
            elif got != block(key):
                wrong.append(key)

    threads = [threading.Thread(target=hammer, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and held(tmp_path) <= 50_000
    assert int((tmp_path / "lock").read_bytes()) >= held(tmp_path)


FILL = """
import sys
from test_cache import block
from engine.storage.cache import BlockCache
cache = BlockCache(sys.argv[1], 10**8)
for key in range(40):
    cache.put(str(key), block(str(key), 50_000))
assert cache._off and cache.get("0") is None
"""


def test_a_full_disk_turns_the_cache_off(tmp_path):
    mount = 'mount -t tmpfs -o size=1m tmpfs "$0" && exec "$@"'
    inside = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, str(tmp_path))
    if subprocess.run([*inside, "true"], capture_output=True).returncode:
        pytest.skip("cannot mount a small tmpfs in a namespace of its own")
    process = run(FILL, str(tmp_path), prefix=inside)
    _, told = process.communicate()
    assert process.returncode == 0, told
    assert told.count("\n") == 1 and "the cache is off: No space left on device" in told


def test_a_folder_that_cannot_be_used_turns_the_cache_off(tmp_path, capsys):
    (tmp_path / "file").touch()
    cache = BlockCache(tmp_path / "file", 10**6)
    cache.put("x", b"1")
    assert cache.get("x") is None
    told = capsys.readouterr().err
    assert told.count("the cache is off") == 1 and str(tmp_path / "file") in told


def test_a_folder_that_goes_away_is_no_error(tmp_path):
    cache = BlockCache(tmp_path / "cache", 10**6)
    cache.put("x", b"1")
    for file in (tmp_path / "cache").iterdir():
        file.unlink()
    (tmp_path / "cache").rmdir()
    assert cache.get("x") is None
    cache.put("x", b"1")
    assert cache.get("x") is None
